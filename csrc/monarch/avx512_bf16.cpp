// Monarch products of bf16 on the avx512_bf16 level.
#if defined(__x86_64__)
#define EFFKERN_UNIT monarch_avx512_bf16
#define EFFKERN_UNIT_AVX512 1
#define EFFKERN_UNIT_BF16 1
#define EFFKERN_UNIT_NAME "avx512_bf16"
#include "core/cpu/simd.h"

#include "monarch/bf16_body.h"

const effkern::monarch::Kernels& effkern::monarch::kernels_avx512_bf16() { return monarch_avx512_bf16::kernels_pairs; }
#endif
