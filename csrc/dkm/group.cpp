#include "dkm/group.h"

#include <algorithm>
#include <cmath>

#include "core/parallel.h"

namespace effkern::dkm {
namespace {

// So large that a chunk is worth a task, and so few that their sums are little beside the weight.
constexpr int64_t kLeast = 4096, kMostChunks = 256;
// Weights a cluster from which on the errors of single assignments average out in the centroids. Where a handful decide
// about a centroid, later iterations magnify what float32 has lost in an earlier one.
constexpr int64_t kEnough = 1024;

int64_t chunk_of(int64_t vectors) {
  const int64_t even = (vectors + kMostChunks - 1) / kMostChunks;
  return std::max(kLeast, (even + 255) / 256 * 256);
}

}  // namespace

GroupPasses::GroupPasses(const Options& options, const Group& group)
    : options_(options),
      group_(group),
      numbers_(options.clusters * options.dim),
      step_(chunk_of(group.vectors)),
      chunks_((group.vectors + step_ - 1) / step_) {
  constexpr double kLog2e = 1.4426950408889634;
  options_.temperature = std::max(options.temperature, kColdest);
  scale_ = std::sqrt(kLog2e / options_.temperature);
  scratch_floats_ = round_to_line(4 * group.kernels->scratch_floats(options.clusters, options.dim)) / 4;
  scratch_.reserve(4 * scratch_floats_ * slot_count(chunks_));
}

void GroupPasses::tabulate(const double* trajectory, int64_t count) {
  high_.assign(trajectory, trajectory + count * numbers_);
  low_.resize(high_.size());
  for (size_t i = 0; i < low_.size(); ++i) low_[i] = static_cast<float>(trajectory[i] - static_cast<double>(high_[i]));
  scaled_.assign(trajectory, trajectory + count * numbers_);
  for (double& number : scaled_) number *= scale_;
  extents_.clear();
  for (int64_t t = 0; t < count; ++t) extents_.push_back(extent(trajectory + t * numbers_));
}

void GroupPasses::find_range() {
  if (range_known_) return;
  range_known_ = true;
  std::vector<double> ends(static_cast<size_t>(2 * chunks_));
  over_chunks([&](const Chunk& chunk, int64_t task) { group_.kernels->range(chunk, ends.data() + 2 * task); });
  for (int64_t task = 0; task < chunks_; ++task) {
    lowest_ = task ? std::min(lowest_, ends[2 * task]) : ends[0];
    highest_ = task ? std::max(highest_, ends[2 * task + 1]) : ends[1];
  }
}

// Float32 errs in a logit, in bits, by a few 2^-24 times the squared distances |w - c_j|^2 scale^2 that are compared,
// and in the assignments by as much of it as they share: a distance counts a_j times. Of a weight between neighbouring
// centroids the nearest is at most half their gap away. One that is e beyond the outermost centroid has a distance of
// e^2 from it, and the next one, another gap away, a share of 2^-(2 e gap): e^2 times that is at most 0.28 / gap^2.
// Where both are below kMild, the errors are those of kMild / 2^23, which leaves the gradient at a few 1e-6.
GroupPasses::Extent GroupPasses::extent(const double* centroids) {
  const double* end = centroids + numbers_;
  const auto [least, most] = std::minmax_element(centroids, end);
  Extent found = {false, least - centroids, most - centroids};
  if (options_.dim != 1 || group_.counts || group_.vectors < kEnough * options_.clusters) return found;
  std::vector<double> sorted(centroids, end);
  std::sort(sorted.begin(), sorted.end());
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  for (size_t j = 1; j < sorted.size(); ++j)
    if (!(std::fabs(sorted[j] - sorted[j - 1]) * scale_ <= 2 * std::sqrt(static_cast<double>(kMild)))) return found;
  find_range();
  const auto outside = [&](double beyond, size_t outermost, size_t next) {
    const double far = beyond > 0 ? beyond * scale_ * beyond * scale_ : 0.0;
    const double gap = sorted.size() > 1 ? (sorted[outermost] - sorted[next]) * scale_ : INFINITY;
    // Its square's own error, which all clusters share, has to fit the exponent.
    return far <= 0x1p20 && std::min(far, 0.28 / (gap * gap)) <= kMild;
  };
  constexpr double kLargest = 1e18;  // whose square is a float32 number
  const size_t count = sorted.size();
  found.mild = std::max(-lowest_, highest_) <= kLargest && std::max(-sorted[0], sorted[count - 1]) <= kLargest &&
               outside(sorted[0] - lowest_, 0, std::min<size_t>(1, count - 1)) &&
               outside(highest_ - sorted[count - 1], count - 1, count - std::min<size_t>(2, count));
  return found;
}

template <class Pass>
void GroupPasses::over_chunks(const Pass& pass) {
  parallel_tasks(chunks_, [&](int64_t task, int64_t slot) {
    const Chunk chunk = {group_.weight,
                         group_.grad,
                         group_.counts,
                         task * step_,
                         std::min(group_.vectors, (task + 1) * step_),
                         options_.clusters,
                         options_.dim,
                         scale_,
                         static_cast<float>(2 / options_.temperature),
                         static_cast<float>(scale_ * scale_),
                         reinterpret_cast<float*>(scratch_.data) + slot * scratch_floats_};
    pass(chunk, task);
  });
}

// What `pass` sums over each chunk, `numbers` of them, to totals_: chunk by chunk, in float64.
template <class Pass>
void GroupPasses::sum(int64_t numbers, const Pass& pass) {
  partial_.reserve(std::max<int64_t>(1, 8 * numbers * chunks_));
  double* partial = reinterpret_cast<double*>(partial_.data);
  over_chunks([&](const Chunk& chunk, int64_t task) { pass(chunk, partial + task * numbers); });
  totals_.assign(static_cast<size_t>(numbers), 0.0);
  for (int64_t task = 0; task < chunks_; ++task)
    for (int64_t i = 0; i < numbers; ++i) totals_[i] += partial[task * numbers + i];
}

int64_t GroupPasses::iterate(double* trajectory, float* counts) {
  const int64_t clusters = options_.clusters, dim = options_.dim;
  for (int64_t t = 0; t < options_.iterations; ++t) {
    const double* before = trajectory + t * numbers_;
    double* after = trajectory + (t + 1) * numbers_;
    tabulate(before, 1);
    mild_ += centroids(0).mild;
    sum(clusters * (1 + dim) + 1,
        [&](const Chunk& chunk, double* sums) { group_.kernels->accumulate(chunk, centroids(0), sums); });
    if (totals_.back() != 0) return -1;
    double farthest = 0;
    for (int64_t j = 0; j < clusters; ++j) {
      const double* mine = totals_.data() + j * (1 + dim);
      const float count = static_cast<float>(mine[0]);
      counts[t * clusters + j] = count;
      for (int64_t d = 0; d < dim; ++d) {
        const double old = before[j * dim + d], now = count < kEmpty ? old : old + mine[1 + d] / mine[0];
        farthest = std::max(farthest, std::fabs(now - old));
        after[j * dim + d] = now;
      }
    }
    if (options_.tolerance > 0 && farthest <= options_.tolerance) {
      for (int64_t later = t + 1; later < options_.iterations; ++later) {
        std::copy_n(after, numbers_, trajectory + (later + 1) * numbers_);
        std::copy_n(counts + t * clusters, clusters, counts + later * clusters);
      }
      return t + 1;
    }
  }
  return options_.iterations;
}

void GroupPasses::emit(const double* before, const double* after, void* out) {
  tabulate(before, 1);
  const std::vector<float> rounded(after, after + numbers_);
  over_chunks([&](const Chunk& chunk, int64_t) { group_.kernels->emit(chunk, centroids(0), rounded.data(), out); });
}

std::vector<Step> GroupPasses::reverse(const double* trajectory, const float* counts, int64_t count, void* out) {
  const int64_t clusters = options_.clusters, dim = options_.dim;
  std::vector<Step> steps(static_cast<size_t>(count));
  std::vector<double> bar;
  tabulate(trajectory, count + 1);
  pulls_.resize(static_cast<size_t>(count * numbers_));
  for (int64_t t = count; t > 0; --t) {
    Step& step = steps[t - 1];
    float* pull = pulls_.data() + (t - 1) * numbers_;
    step = {centroids(t - 1), centroids(t), pull, t == count};
    mild_ += step.before.mild;
    if (step.last) {
      sum(numbers_, [&](const Chunk& chunk, double* sums) { group_.kernels->collect(chunk, step.before, sums); });
      bar = totals_;
    }
    for (int64_t j = 0; j < clusters; ++j) {
      const float soft = counts[(t - 1) * clusters + j];
      for (int64_t d = 0; d < dim; ++d)
        pull[j * dim + d] = soft < kEmpty ? 0.0f : static_cast<float>(bar[j * dim + d] / static_cast<double>(soft));
    }
    if (t == 1) break;  // the first centroids have no gradient
    sum(numbers_, [&](const Chunk& chunk, double* sums) { group_.kernels->reverse(chunk, step, out, sums); });
    for (int64_t i = 0; i < numbers_; ++i) {
      const bool empty = counts[(t - 1) * clusters + i / dim] < kEmpty;
      bar[i] = totals_[i] + (empty ? bar[i] : 0.0);
    }
  }
  if (out) steps.resize(1);
  return steps;
}

void GroupPasses::gradient(const std::vector<Step>& steps, void* out) {
  over_chunks([&](const Chunk& chunk, int64_t) {
    group_.kernels->gradient(chunk, steps.data(), static_cast<int64_t>(steps.size()), out);
  });
}

}  // namespace effkern::dkm
