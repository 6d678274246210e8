#include "core/cpu/fft_build.h"

#include <cmath>
#include <stdexcept>

namespace effkern {

float* FftStorage::floats(int64_t count) {
  pieces_.push_back(std::make_unique<char[]>(static_cast<size_t>(count) * sizeof(float) + 64));
  const auto address = reinterpret_cast<uintptr_t>(pieces_.back().get());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

void circle_point(double turns, float* point) {
  const double angle = 6.283185307179586476925 * (turns - std::floor(turns));
  point[0] = static_cast<float>(std::cos(angle));
  point[1] = static_cast<float>(std::sin(angle));
}

namespace {

// Every block has `radix` remainders, one after the other.
std::vector<double> remainders(const std::vector<double>& phases, int64_t radix) {
  std::vector<double> next;
  next.reserve(phases.size() * radix);
  for (double phase : phases)
    for (int64_t p = 0; p < radix; ++p) next.push_back((phase + static_cast<double>(p)) / static_cast<double>(radix));
  return next;
}

}  // namespace

FftRing make_ring(FftStorage& storage, const std::vector<int>& radices, int64_t rest, double phase, int64_t lanes,
                  std::vector<double>* phases) {
  if (radices.size() > kFftLevels) throw std::length_error("fft: too many passes");
  FftRing ring{};
  ring.size = rest;
  for (int radix : radices) ring.size *= radix;
  ring.depth = static_cast<int>(radices.size());
  std::vector<double> current{phase};
  int64_t length = ring.size;
  for (int d = 0; d < ring.depth; ++d) {
    const int radix = radices[d];
    length /= radix;
    float* factors = storage.floats(static_cast<int64_t>(current.size()) * 2 * (radix - 1));
    ring.levels[d] = {radix, length, factors};
    for (double p : current)
      for (int q = 1; q < radix; ++q, factors += 2) circle_point(q * p / radix, factors);
    current = remainders(current, radix);
  }
  if (phases) *phases = current;
  if (lanes == 0) return ring;
  float* leaf = storage.floats(static_cast<int64_t>(current.size()) * 2 * lanes * lanes);
  ring.leaves = leaf;
  for (double p : current) {
    const std::vector<double> blocks = remainders({p}, lanes);
    for (int64_t q = 0; q < lanes; ++q)
      circle_point(static_cast<double>(q) * p / static_cast<double>(lanes), leaf + 2 * q);
    for (int64_t q = 1; q < lanes; ++q) {
      float* row = leaf + 2 * lanes * q;
      for (int64_t b = 0; b < lanes; ++b) {
        float point[2];
        circle_point(static_cast<double>(q) * blocks[b] / static_cast<double>(lanes), point);
        row[b] = point[0];
        row[lanes + b] = point[1];
      }
    }
    leaf += 2 * lanes * lanes;
  }
  return ring;
}

}  // namespace effkern
