// Couplings on the scalar level.
#define EFFKERN_UNIT coupling_scalar
#define EFFKERN_UNIT_NAME "scalar"
#include "core/cpu/simd.h"

#include "coupling/body.h"

const effkern::coupling::Kernels& effkern::coupling::kernels_scalar() { return coupling_scalar::kKernels; }
