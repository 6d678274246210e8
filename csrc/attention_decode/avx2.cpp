// Attention decoding on the avx2 level.
#if defined(__x86_64__)
#define EFFKERN_UNIT decode_avx2
#define EFFKERN_UNIT_AVX2 1
#define EFFKERN_UNIT_NAME "avx2"
#include "core/cpu/simd.h"

#include "attention_decode/body.h"

const effkern::attention_decode::Kernels& effkern::attention_decode::kernels_avx2(Dtype dtype) {
  return decode_avx2::kernels_for(dtype);
}
#endif
