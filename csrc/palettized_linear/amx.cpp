// Products with palettised weights of bf16 on the amx level.
#if defined(__x86_64__)
#define EFFKERN_UNIT palettized_amx
#define EFFKERN_UNIT_AVX512 1
#define EFFKERN_UNIT_BF16 1
#define EFFKERN_UNIT_AMX 1
#define EFFKERN_UNIT_NAME "amx"
#include "core/cpu/simd.h"

#include "palettized_linear/bf16_body.h"

const effkern::palettized_linear::PairKernels& effkern::palettized_linear::pair_kernels_amx(Dtype out) {
  return palettized_amx::pair_kernels_for(out);
}
#endif
