// Merging of attention results on the scalar level.
#define EFFKERN_UNIT merge_scalar
#define EFFKERN_UNIT_NAME "scalar"
#include "core/cpu/simd.h"

#include "attention_merge/body.h"

const effkern::attention_merge::Kernels& effkern::attention_merge::kernels_scalar(Dtype dtype) {
  return merge_scalar::kernels_for(dtype);
}
