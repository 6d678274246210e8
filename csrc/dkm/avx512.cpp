// Differentiable k-means on the avx512 level.
#if defined(__x86_64__)
#define EFFKERN_UNIT dkm_avx512
#define EFFKERN_UNIT_AVX512 1
#define EFFKERN_UNIT_NAME "avx512"
#include "core/cpu/simd.h"

#include "dkm/kernel_table.h"

const effkern::dkm::Kernels& effkern::dkm::kernels_avx512(Dtype dtype) { return dkm_avx512::kernels_for(dtype); }
#endif
