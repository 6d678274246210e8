// Impulse responses of companion matrices on the avx512 level.
#if defined(__x86_64__)
#define EFFKERN_UNIT companion_avx512
#define EFFKERN_UNIT_AVX512 1
#define EFFKERN_UNIT_NAME "avx512"
#include "core/cpu/simd.h"

#include "companion_kernel/body.h"

const effkern::companion_kernel::Kernels& effkern::companion_kernel::kernels_avx512() {
  return companion_avx512::kKernels;
}
#endif
