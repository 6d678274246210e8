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
  int64_t iterate(double* trajectory, float* counts);
  void emit(const double* before, const double* after, void* out);
  // The steps of the backward pass; what they point to lives as long as this. With `out` (float32 vectors without
  // counts only) the gradient of all but the first is made on the way, and returned is the step that is left.
  std::vector<Step> reverse(const double* trajectory, const float* counts, int64_t count, void* out = nullptr);
  void gradient(const std::vector<Step>& steps, void* out);
  // How many of the iterations so far, or backwards of all of them, were mild.
  int64_t mild() const { return mild_; }

 private:
  // Tables of the centroids of `count` iterations, one after the other.
  void tabulate(const double* trajectory, int64_t count);
  Centroids centroids(int64_t t) const {
    const int64_t at = t * numbers_;
    const Extent& extent = extents_[static_cast<size_t>(t)];
    return {scaled_.data() + at, high_.data() + at, low_.data() + at, extent.mild, extent.least, extent.most};
  }
  struct Extent {
    bool mild;
    int64_t least, most;
  };
  Extent extent(const double* centroids);
  void find_range();
  template <class Pass>
  void over_chunks(const Pass& pass);
  template <class Pass>
  void sum(int64_t numbers, const Pass& pass);

  Options options_;
  Group group_;
  int64_t numbers_, step_, chunks_, scratch_floats_, mild_ = 0;
  double scale_;
  bool range_known_ = false;
  double lowest_ = 0, highest_ = 0;  // of the weight
  Buffer scratch_, partial_;
  std::vector<double> totals_, scaled_;
  std::vector<float> high_, low_, pulls_;
  std::vector<Extent> extents_;
};

}  // namespace effkern::dkm
