// The short convolution on the scalar level.
#define EFFKERN_UNIT short_conv_scalar
#define EFFKERN_UNIT_NAME "scalar"
#include "core/cpu/simd.h"

#include "short_conv/kernel_table.h"

const effkern::short_conv::Kernels& effkern::short_conv::kernels_scalar(Dtype dtype) {
  return short_conv_scalar::kernels_for(dtype);
}
