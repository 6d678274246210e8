// 16-bit numbers by their codes, of which there are 65,536.
#pragma once

#include <cstdint>
#include <vector>

namespace effkern {

constexpr int64_t kCodes = 1 << 16;
// From how many numbers on they are worth tables by code.
constexpr int64_t kWorthCodes = 32768;

// Where part `i` of `parts` of `count` numbers begins, and so where the one before it ends; their sizes differ by one
// at the most.
inline int64_t bound_of_part(int64_t count, int64_t parts, int64_t i) {
  return count / parts * i + (count % parts < i ? count % parts : i);
}

// How often each code occurs, on all threads of the pool.
std::vector<int64_t> count_codes(const uint16_t* codes, int64_t count);

}  // namespace effkern
