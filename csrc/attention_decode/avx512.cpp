// Attention decoding on the avx512 level.
#if defined(__x86_64__)
#define EFFKERN_UNIT decode_avx512
#define EFFKERN_UNIT_AVX512 1
#define EFFKERN_UNIT_NAME "avx512"
#include "core/cpu/simd.h"

#include "attention_decode/body.h"

const effkern::attention_decode::Kernels& effkern::attention_decode::kernels_avx512(Dtype dtype) {
  return decode_avx512::kernels_for(dtype);
}
#endif
