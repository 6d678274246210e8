// The entry points of a unit, for every dtype. Included last.
#pragma once

#include "monarch/backward_body.h"

namespace effkern {
namespace EFFKERN_UNIT {

template <class T>
struct KernelTable {
  static constexpr monarch::Kernels value = {
      {"monarch_matmul:cpu/" EFFKERN_UNIT_NAME, "monarch_matmul_backward:cpu/" EFFKERN_UNIT_NAME,
       "block_diag_matmul:cpu/" EFFKERN_UNIT_NAME, "block_diag_matmul_backward:cpu/" EFFKERN_UNIT_NAME},
      kTokenTile,
      kLanes,
      kDotTokens,
      false,
      scratch_bytes<T>,
      widen<T>,
      prepared_bytes<T>,
      prepare<T>,
      first_stage<T>,
      second_stage<T>,
      second_backward<T>,
      first_backward<T>,
      mid_operand_bytes,
      mid_operand,
      first_gradient<T>,
      second_gradient,
      pack<T>,
      unpack_mid<T>,
      store_rows<T>};
};

static const monarch::Kernels& kernels_for(Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16: return KernelTable<Bf16>::value;
    case Dtype::fp16: return KernelTable<Fp16>::value;
    default: return KernelTable<float>::value;
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
