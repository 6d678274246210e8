// Attention for bf16 on the amx level.
#if defined(__x86_64__)
#define EFFKERN_UNIT unit_amx
#define EFFKERN_UNIT_AVX512 1
#define EFFKERN_UNIT_BF16 1
#define EFFKERN_UNIT_AMX 1
#define EFFKERN_UNIT_NAME "amx"
#include "core/cpu/simd.h"

#include "attention/engine_bf16.h"
#include "attention/kernel_table.h"

const effkern::attention::Kernels& effkern::attention::kernels_amx() {
  return unit_amx::KernelTable<unit_amx::EngineBf16>::value;
}
#endif
