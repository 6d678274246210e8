#include "long_conv/plan.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "core/cpu/fft_build.h"

namespace effkern::long_conv {
namespace {

constexpr int64_t kLargestWhole = 32768;  // a row of 256 KiB, in the second-level cache
constexpr int64_t kColumns = 16384;       // of a larger plan: rows of 128 KiB, few of them beside their tables
constexpr int64_t kTileNumbers = 2048;    // of a tile of columns: 16 KiB

// Radices whose product is `count`, odd ones first. Sixteen vector registers hold a pass of radix 4 with its factors,
// and one of radix 8 with few spills; larger ones cost more in spills than they save in passes.
std::vector<int> radices_of(int64_t count, int64_t lanes) {
  std::vector<int> radices;
  for (int odd : {3, 5})
    for (; count % odd == 0; count /= odd) radices.push_back(odd);
  const int64_t largest = lanes == 16 ? 8 : 4;
  while (count > 1) {
    const int64_t radix = count == 8 ? 8 : std::min(count, largest);  // 8 rather than 4 and 2
    radices.push_back(static_cast<int>(radix));
    count /= radix;
  }
  return radices;
}

struct OwnedPlan {
  Plan plan{};
  FftStorage storage;
};

std::unique_ptr<OwnedPlan> make_plan(int64_t size, int64_t lanes) {
  auto owned = std::make_unique<OwnedPlan>();
  Plan& plan = owned->plan;
  FftStorage& storage = owned->storage;
  const int64_t leaf = lanes * lanes;
  plan.size = size;
  plan.whole = size <= std::max(kLargestWhole, leaf);
  if (plan.whole) {
    std::vector<int> radices = radices_of(size / leaf, lanes);
    if (radices.empty()) radices.push_back(1);
    plan.rows = radices[0];
    plan.columns = plan.row_stride = plan.tile = size / plan.rows;
    plan.inner = make_ring(storage, radices, leaf, 0.25, lanes);
    plan.outer = plan.inner;
    plan.outer.depth = 1;
    return owned;
  }
  plan.columns = std::max(kColumns, leaf);
  while (size % plan.columns != 0) plan.columns /= 2;
  plan.rows = size / plan.columns;
  plan.row_stride = plan.columns + lanes;
  plan.tile = std::clamp<int64_t>(kTileNumbers / plan.rows, std::max<int64_t>(16, lanes), plan.columns);
  while (plan.columns % plan.tile != 0 || plan.tile % lanes != 0) --plan.tile;
  std::vector<double> phases;
  plan.outer = make_ring(storage, radices_of(plan.rows, lanes), plan.tile, 0.25, 0, &phases);
  plan.inner = make_ring(storage, radices_of(plan.columns / leaf, lanes), leaf, 0.25, lanes);

  // Row p is modulo x^columns = e^(2 pi i phase): scaling x by the root of the difference makes that a quarter turn.
  float* low = storage.floats(2 * plan.rows * plan.tile);
  float* high = storage.floats(2 * plan.rows * (plan.columns / plan.tile));
  plan.turn_low = low;
  plan.turn_high = high;
  const auto turns = [&](int64_t p, int64_t j) {
    return static_cast<double>(j) * (phases[p] - 0.25) / static_cast<double>(plan.columns);
  };
  for (int64_t p = 0; p < plan.rows; ++p)
    for (int64_t c = 0; c < plan.tile; ++c) {
      float point[2];
      circle_point(turns(p, c), point);
      float* at = low + 2 * (p * plan.tile + c / lanes * lanes) + c % lanes;
      at[0] = point[0];
      at[lanes] = point[1];
    }
  for (int64_t tile = 0; tile < plan.columns / plan.tile; ++tile)
    for (int64_t p = 0; p < plan.rows; ++p, high += 2) circle_point(turns(p, tile * plan.tile), high);
  return owned;
}

// Rough time of a ring of this size, in passes over its numbers.
double cost(int64_t size) {
  const double passes = std::log2(static_cast<double>(size)) + 6.0;
  return static_cast<double>(size) * passes * (size > kLargestWhole ? 1.25 : 1.0);
}

}  // namespace

int64_t smallest_size(int64_t length, int64_t lanes) {
  int64_t best = 0;
  for (int64_t odd : {1, 3, 5, 15}) {
    int64_t size = lanes * lanes * odd;
    while (size < length) size *= 2;
    if (best == 0 || size < best) best = size;
  }
  return best;
}

int64_t transform_size(int64_t length, int64_t taps, bool causal, int64_t lanes) {
  const int64_t whole = smallest_size(std::max(length, taps), lanes);
  if (!causal) return whole;
  int64_t best = whole;
  double least = cost(whole);
  for (int64_t size = smallest_size(taps, lanes); size < whole; size = smallest_size(size + 1, lanes)) {
    // Every block but the first has an imaginary part.
    const double time = static_cast<double>((length + size - 1) / size) * cost(size) * 1.1;
    if (time < least) least = time, best = size;
  }
  return best;
}

Choice choose(int64_t length, int64_t taps, bool causal, int64_t lanes) {
  // Up to so many outputs, or taps, a product for every pair is less than the passes of a transform.
  constexpr int64_t kOutputs = 32, kTaps = 64;
  if (causal && length <= kOutputs) return {kFewOutputs, 0};
  if (causal && taps <= kTaps) return {kFewTaps, 0};
  return {kTransform, transform_size(length, taps, causal, lanes)};
}

const Plan& plan_for(int64_t size, int64_t lanes) {
  static std::mutex mutex;
  static auto& plans = *new std::map<std::pair<int64_t, int64_t>, std::unique_ptr<OwnedPlan>>;
  const std::lock_guard lock(mutex);
  std::unique_ptr<OwnedPlan>& owned = plans[{size, lanes}];
  if (!owned) owned = make_plan(size, lanes);
  return owned->plan;
}

}  // namespace effkern::long_conv
