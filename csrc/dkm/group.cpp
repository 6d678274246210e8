#include "dkm/group.h"

#include <algorithm>
#include <cmath>

#include "core/parallel.h"

namespace effkern::dkm {
namespace {

// So large that a chunk is worth a task, and so few that their sums are little beside the weight.
constexpr int64_t kLeast = 4096, kMostChunks = 256;

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
  options_.temperature = std::max(options.temperature, kColdest);
  scratch_floats_ = round_to_line(4 * group.kernels->scratch_floats(options.clusters, options.dim)) / 4;
  scratch_.reserve(4 * scratch_floats_ * slot_count(chunks_));
}

template <class Pass>
void GroupPasses::over_chunks(const Pass& pass) {
  constexpr double kLog2e = 1.4426950408889634;
  parallel_tasks(chunks_, [&](int64_t task, int64_t slot) {
    const Chunk chunk = {group_.weight,
                         group_.grad,
                         group_.counts,
                         task * step_,
                         std::min(group_.vectors, (task + 1) * step_),
                         options_.clusters,
                         options_.dim,
                         static_cast<float>(kLog2e / options_.temperature),
                         static_cast<float>(2 / options_.temperature),
                         reinterpret_cast<float*>(scratch_.data) + slot * scratch_floats_};
    pass(chunk, task);
  });
}

// What `pass` sums over each chunk, `numbers` of them, to totals_: chunk by chunk, in float64.
template <class Pass>
void GroupPasses::sum(int64_t numbers, const Pass& pass) {
  partial_.reserve(std::max<int64_t>(1, 4 * numbers * chunks_));
  float* partial = reinterpret_cast<float*>(partial_.data);
  over_chunks([&](const Chunk& chunk, int64_t task) { pass(chunk, partial + task * numbers); });
  totals_.assign(static_cast<size_t>(numbers), 0.0);
  for (int64_t task = 0; task < chunks_; ++task)
    for (int64_t i = 0; i < numbers; ++i) totals_[i] += static_cast<double>(partial[task * numbers + i]);
}

int64_t GroupPasses::iterate(float* trajectory, float* counts) {
  const int64_t clusters = options_.clusters, dim = options_.dim;
  for (int64_t t = 0; t < options_.iterations; ++t) {
    const float* before = trajectory + t * numbers_;
    float* after = trajectory + (t + 1) * numbers_;
    sum(clusters * (1 + dim) + 1,
        [&](const Chunk& chunk, float* sums) { group_.kernels->accumulate(chunk, before, sums); });
    if (totals_.back() != 0) return -1;
    float farthest = 0;
    for (int64_t j = 0; j < clusters; ++j) {
      const double* mine = totals_.data() + j * (1 + dim);
      const float count = static_cast<float>(mine[0]);
      counts[t * clusters + j] = count;
      for (int64_t d = 0; d < dim; ++d) {
        const float old = before[j * dim + d];
        const float now = count < kEmpty ? old : static_cast<float>(static_cast<double>(old) + mine[1 + d] / mine[0]);
        farthest = std::max(farthest, std::fabs(now - old));
        after[j * dim + d] = now;
      }
    }
    if (options_.tolerance > 0 && static_cast<double>(farthest) <= options_.tolerance) {
      for (int64_t later = t + 1; later < options_.iterations; ++later) {
        std::copy_n(after, numbers_, trajectory + (later + 1) * numbers_);
        std::copy_n(counts + t * clusters, clusters, counts + later * clusters);
      }
      return t + 1;
    }
  }
  return options_.iterations;
}

void GroupPasses::emit(const float* before, const float* after, void* out) {
  over_chunks([&](const Chunk& chunk, int64_t) { group_.kernels->emit(chunk, before, after, out); });
}

std::vector<Step> GroupPasses::reverse(const float* trajectory, const float* counts, int64_t count, float* pulls) {
  const int64_t clusters = options_.clusters, dim = options_.dim;
  std::vector<Step> steps(static_cast<size_t>(count));
  std::vector<double> bar;
  for (int64_t t = count; t > 0; --t) {
    Step& step = steps[t - 1];
    float* pull = pulls + (t - 1) * numbers_;
    step = {trajectory + (t - 1) * numbers_, trajectory + t * numbers_, pull, t == count};
    if (step.last) {
      sum(numbers_, [&](const Chunk& chunk, float* sums) { group_.kernels->collect(chunk, step.before, sums); });
      bar = totals_;
    }
    for (int64_t j = 0; j < clusters; ++j) {
      const float soft = counts[(t - 1) * clusters + j];
      for (int64_t d = 0; d < dim; ++d)
        pull[j * dim + d] = soft < kEmpty ? 0.0f : static_cast<float>(bar[j * dim + d] / static_cast<double>(soft));
    }
    if (t == 1) break;  // the first centroids have no gradient
    sum(numbers_, [&](const Chunk& chunk, float* sums) { group_.kernels->reverse(chunk, step, sums); });
    for (int64_t i = 0; i < numbers_; ++i) {
      const bool empty = counts[(t - 1) * clusters + i / dim] < kEmpty;
      bar[i] = totals_[i] + (empty ? bar[i] : 0.0);
    }
  }
  return steps;
}

void GroupPasses::gradient(const std::vector<Step>& steps, void* out) {
  over_chunks([&](const Chunk& chunk, int64_t) {
    group_.kernels->gradient(chunk, steps.data(), static_cast<int64_t>(steps.size()), out);
  });
}

}  // namespace effkern::dkm
