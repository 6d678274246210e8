// Element types the kernels take. No torch: the units include this.
#pragma once

namespace effkern {

enum class Dtype : int { fp32, bf16, fp16 };

}  // namespace effkern
