// Differentiable k-means on the scalar level.
#define EFFKERN_UNIT dkm_scalar
#define EFFKERN_UNIT_NAME "scalar"
#include "core/cpu/simd.h"

#include "dkm/kernel_table.h"

const effkern::dkm::Kernels& effkern::dkm::kernels_scalar(Dtype dtype) { return dkm_scalar::kernels_for(dtype); }
