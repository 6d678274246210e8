// Products with palettised weights on the scalar level.
#define EFFKERN_UNIT palettized_scalar
#define EFFKERN_UNIT_NAME "scalar"
#include "core/cpu/simd.h"

#include "palettized_linear/body.h"

const effkern::palettized_linear::Kernels& effkern::palettized_linear::kernels_scalar(Dtype dtype) {
  return palettized_scalar::kernels_for(dtype);
}
