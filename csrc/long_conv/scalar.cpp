// Long convolutions on the scalar level.
#define EFFKERN_UNIT long_conv_scalar
#define EFFKERN_UNIT_NAME "scalar"
#include "core/cpu/simd.h"

#include "long_conv/kernel_table.h"

const effkern::long_conv::Kernels& effkern::long_conv::kernels_scalar(Dtype dtype) {
  return long_conv_scalar::kernels_for(dtype);
}
