// Attention decoding on the scalar level.
#define EFFKERN_UNIT decode_scalar
#define EFFKERN_UNIT_NAME "scalar"
#include "core/cpu/simd.h"

#include "attention_decode/body.h"

const effkern::attention_decode::Kernels& effkern::attention_decode::kernels_scalar(Dtype dtype) {
  return decode_scalar::kernels_for(dtype);
}
