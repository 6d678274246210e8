// Makes the tables of core/cpu/fft_tables.h. Host code for every CPU: the units see only the result.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/cpu/fft_tables.h"

namespace effkern {

// Tables that live as long as their owner, each starting on a cache line.
class FftStorage {
 public:
  float* floats(int64_t count);

 private:
  std::vector<std::unique_ptr<char[]>> pieces_;
};

// e^(2 pi i turns), exact to the last bit or two of a float however large `turns` is.
void circle_point(double turns, float* point);

// A ring of the given radices on blocks of their product times `rest` numbers, starting from x^size = e^(2 pi i phase).
// With lanes > 0 leaves take over where the levels stop, at rest = lanes^2. `phases` gets those of the last level's
// remainders.
FftRing make_ring(FftStorage& storage, const std::vector<int>& radices, int64_t rest, double phase, int64_t lanes,
                  std::vector<double>* phases = nullptr);

}  // namespace effkern
