// The kernels of a unit whose arithmetic is fp32 vectors, for every input dtype.
#pragma once

#include "attention/engine_fp32.h"
#include "attention/kernel_table.h"

namespace effkern {
namespace EFFKERN_UNIT {

static const attention::Kernels& kernels_for(Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16: return KernelTable<EngineFp32<Bf16>>::value;
    case Dtype::fp16: return KernelTable<EngineFp32<Fp16>>::value;
    default: return KernelTable<EngineFp32<float>>::value;
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
