// The kernel table of a unit whose arithmetic is fp32 vectors. Included last by <isa>.cpp, which defines EFFKERN_UNIT
// and EFFKERN_UNIT_NAME.
#pragma once

#include "attention/backward_body.h"
#include "attention/engine_fp32.h"
#include "attention/forward_body.h"

namespace effkern {
namespace EFFKERN_UNIT {

template <class Engine>
struct KernelTable {
  static constexpr attention::Kernels value = {"attention:cpu/" EFFKERN_UNIT_NAME,
                                               "attention_backward:cpu/" EFFKERN_UNIT_NAME,
                                               Engine::kQueryTile,
                                               Engine::kKeyTile,
                                               Engine::kBackwardQueryTile,
                                               Engine::kBackwardKeyTile,
                                               Engine::key_bytes,
                                               query_block_bytes<Engine>,
                                               forward_scratch_bytes<Engine>,
                                               backward_scratch_bytes<Engine>,
                                               Engine::pack_keys,
                                               forward_tile<Engine>,
                                               pack_queries<Engine>,
                                               backward_tile<Engine>};
};

static const attention::Kernels& kernels_for(attention::Dtype dtype) {
  switch (dtype) {
    case attention::Dtype::bf16: return KernelTable<EngineFp32<Bf16>>::value;
    case attention::Dtype::fp16: return KernelTable<EngineFp32<Fp16>>::value;
    default: return KernelTable<EngineFp32<float>>::value;
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
