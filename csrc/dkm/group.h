// The iterations of one group, forward and backward, over chunks whose order of summation depends on the sizes alone.
#pragma once

#include <vector>

#include "core/buffer.h"
#include "dkm/kernel.h"

namespace effkern::dkm {

struct Options {
  int64_t clusters, dim, iterations;
  double temperature, tolerance;
};

// The vectors of a group; `kernels` are those of the dtype that they and their gradient have.
struct Group {
  const Kernels* kernels;
  const void* weight;
  const void* grad;
  const float* counts;  // how many equal vectors each stands for; null: one
  int64_t vectors;
};

// Below this a temperature acts as this: squares stay within float32, and assignments have long been hard.
constexpr double kColdest = 1e-30;

class GroupPasses {
 public:
  GroupPasses(const Options& options, const Group& group);

  // From trajectory[0] on: centroids (T + 1, K, dim) and soft counts (T, K). Returns how many iterations ran, or -1
  // where a weight is not finite.
  int64_t iterate(float* trajectory, float* counts);
  void emit(const float* before, const float* after, void* out);
  // The steps of the backward pass, their q in `pulls` (T, K, dim).
  std::vector<Step> reverse(const float* trajectory, const float* counts, int64_t count, float* pulls);
  void gradient(const std::vector<Step>& steps, void* out);

 private:
  template <class Pass>
  void over_chunks(const Pass& pass);
  template <class Pass>
  void sum(int64_t numbers, const Pass& pass);

  Options options_;
  Group group_;
  int64_t numbers_, step_, chunks_, scratch_floats_;
  Buffer scratch_, partial_;
  std::vector<double> totals_;
};

}  // namespace effkern::dkm
