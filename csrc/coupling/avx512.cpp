// Couplings on the avx512 level.
#if defined(__x86_64__)
#define EFFKERN_UNIT coupling_avx512
#define EFFKERN_UNIT_AVX512 1
#define EFFKERN_UNIT_NAME "avx512"
#include "core/cpu/simd.h"

#include "coupling/body.h"

const effkern::coupling::Kernels& effkern::coupling::kernels_avx512() { return coupling_avx512::kKernels; }
#endif
