// The entry points of a unit, for every dtype. Included last.
#pragma once

#include "long_conv/few_body.h"
#include "long_conv/taps_body.h"

namespace effkern {
namespace EFFKERN_UNIT {

template <class T>
struct KernelTable {
  static constexpr long_conv::Kernels value = {"long_conv:cpu/" EFFKERN_UNIT_NAME,
                                               "long_conv_backward:cpu/" EFFKERN_UNIT_NAME,
                                               kLanes,
                                               spectrum,
                                               {{scratch_floats, forward<T>, backward<T>},
                                                {few_scratch_floats, few_forward<T>, few_backward<T>},
                                                {taps_scratch_floats, taps_forward<T>, taps_backward<T>}}};
};

static const long_conv::Kernels& kernels_for(Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16: return KernelTable<Bf16>::value;
    case Dtype::fp16: return KernelTable<Fp16>::value;
    default: return KernelTable<float>::value;
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
