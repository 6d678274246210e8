// Impulse responses of companion matrices on the avx2 level.
#if defined(__x86_64__)
#define EFFKERN_UNIT companion_avx2
#define EFFKERN_UNIT_AVX2 1
#define EFFKERN_UNIT_NAME "avx2"
#include "core/cpu/simd.h"

#include "companion_kernel/body.h"

const effkern::companion_kernel::Kernels& effkern::companion_kernel::kernels_avx2() { return companion_avx2::kKernels; }
#endif
