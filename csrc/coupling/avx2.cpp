// Couplings on the avx2 level.
#if defined(__x86_64__)
#define EFFKERN_UNIT coupling_avx2
#define EFFKERN_UNIT_AVX2 1
#define EFFKERN_UNIT_NAME "avx2"
#include "core/cpu/simd.h"

#include "coupling/body.h"

const effkern::coupling::Kernels& effkern::coupling::kernels_avx2() { return coupling_avx2::kKernels; }
#endif
