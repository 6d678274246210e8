// The kernel table of an ISA unit: one body, one engine. The unit defines EFFKERN_UNIT and EFFKERN_UNIT_NAME.
#pragma once

#include "attention/backward_body.h"
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
                                               Engine::kMostQueries,
                                               Engine::kLaneMultiple,
                                               Engine::kKeyGranule,
                                               Engine::key_bytes,
                                               query_block_bytes<Engine>,
                                               forward_scratch_bytes<Engine>,
                                               backward_scratch_bytes<Engine>,
                                               Engine::pack_keys,
                                               forward_tile<Engine>,
                                               pack_queries<Engine>,
                                               backward_tile<Engine>};
};

}  // namespace EFFKERN_UNIT
}  // namespace effkern
