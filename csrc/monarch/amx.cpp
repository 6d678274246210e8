// Monarch products of bf16 on the amx level.
#if defined(__x86_64__)
#define EFFKERN_UNIT monarch_amx
#define EFFKERN_UNIT_AVX512 1
#define EFFKERN_UNIT_BF16 1
#define EFFKERN_UNIT_AMX 1
#define EFFKERN_UNIT_NAME "amx"
#include "core/cpu/simd.h"

#include "monarch/bf16_body.h"

const effkern::monarch::Kernels& effkern::monarch::kernels_amx() { return monarch_amx::kernels_pairs; }
#endif
