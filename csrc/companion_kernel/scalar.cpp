// Impulse responses of companion matrices on the scalar level.
#define EFFKERN_UNIT companion_scalar
#define EFFKERN_UNIT_NAME "scalar"
#include "core/cpu/simd.h"

#include "companion_kernel/body.h"

const effkern::companion_kernel::Kernels& effkern::companion_kernel::kernels_scalar() {
  return companion_scalar::kKernels;
}
