// Differentiable k-means on the avx2 level.
#if defined(__x86_64__)
#define EFFKERN_UNIT dkm_avx2
#define EFFKERN_UNIT_AVX2 1
#define EFFKERN_UNIT_NAME "avx2"
#include "core/cpu/simd.h"

#include "dkm/kernel_table.h"

const effkern::dkm::Kernels& effkern::dkm::kernels_avx2(Dtype dtype) { return dkm_avx2::kernels_for(dtype); }
#endif
