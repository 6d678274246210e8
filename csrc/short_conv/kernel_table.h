// The entry points of a unit, for every dtype. Included last.
#pragma once

#include "short_conv/backward_body.h"

namespace effkern {
namespace EFFKERN_UNIT {

template <class T>
static void widen_parameters(const void* from, int64_t count, float* to) {
  const T* source = static_cast<const T*>(from);
  for (int64_t i = 0; i < count; i += kLanes) store_some(to + i, load_some(source + i, count - i), count - i);
}

template <class T>
static void narrow_parameters(const float* from, int64_t count, void* to) {
  T* target = static_cast<T*>(to);
  for (int64_t i = 0; i < count; i += kLanes) store_some(target + i, load_some(from + i, count - i), count - i);
}

template <class T>
struct KernelTable {
  static constexpr short_conv::Kernels value = {"short_conv:cpu/" EFFKERN_UNIT_NAME,
                                                "short_conv_backward:cpu/" EFFKERN_UNIT_NAME,
                                                scratch_floats,
                                                forward<T>,
                                                backward<T>,
                                                widen_parameters<T>,
                                                narrow_parameters<T>};
};

static const short_conv::Kernels& kernels_for(Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16: return KernelTable<Bf16>::value;
    case Dtype::fp16: return KernelTable<Fp16>::value;
    default: return KernelTable<float>::value;
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
