// Monarch products on the scalar level.
#define EFFKERN_UNIT monarch_scalar
#define EFFKERN_UNIT_NAME "scalar"
#include "core/cpu/simd.h"

#include "monarch/kernel_table.h"

const effkern::monarch::Kernels& effkern::monarch::kernels_scalar(Dtype dtype) {
  return monarch_scalar::kernels_for(dtype);
}
