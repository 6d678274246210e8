// Attention on the scalar level.
#define EFFKERN_UNIT unit_scalar
#define EFFKERN_UNIT_NAME "scalar"
#include "core/cpu/simd.h"

#include "attention/unit_fp32.h"

const effkern::attention::Kernels& effkern::attention::kernels_scalar(Dtype dtype) {
  return unit_scalar::kernels_for(dtype);
}
