// Factors of the passes of core/cpu/fft.h, as the units read them.
#pragma once

#include <stdint.h>

namespace effkern {

constexpr int kFftLevels = 12;

// Radices are 1, 2, 3, 4, 5 and 8. Splits every block of radix * remainder numbers into `radix` remainders. `factors`
// has the powers 1 to radix - 1 of a complex number for each block, blocks in order.
struct FftLevel {
  int radix;
  int64_t remainder;
  const float* factors;
};

// The passes from one block of `size` numbers down to blocks of lanes^2, and the factors of the two passes of a leaf,
// which end in single numbers: 2 lanes^2 floats a leaf. Row 0 has lanes complex numbers, the powers of the first pass;
// row q, lanes real and then lanes imaginary parts, is power q of the factors of the blocks of the second pass.
struct FftRing {
  int64_t size;
  int depth;
  FftLevel levels[kFftLevels];
  const float* leaves;  // null: the passes stop at what the last level leaves
};

}  // namespace effkern
