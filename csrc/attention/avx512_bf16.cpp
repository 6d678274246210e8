// Attention for bf16 on the avx512_bf16 level.
#if defined(__x86_64__)
#define EFFKERN_UNIT unit_avx512_bf16
#define EFFKERN_UNIT_AVX512 1
#define EFFKERN_UNIT_BF16 1
#define EFFKERN_UNIT_NAME "avx512_bf16"
#include "core/cpu/simd.h"

#include "attention/engine_bf16.h"
#include "attention/kernel_table.h"

const effkern::attention::Kernels& effkern::attention::kernels_avx512_bf16() {
  return unit_avx512_bf16::KernelTable<unit_avx512_bf16::EngineBf16>::value;
}
#endif
