// k-means in one dimension, exactly. Clusters of the optimum are intervals of the sorted points, so k - 1 boundaries
// are sought, and a dynamic programme finds them: layer m holds the least cost of the first j points in m clusters.
// The cost of an interval satisfies the quadrangle inequality, so the best last boundary moves right with j, and divide
// and conquer looks at n log n candidates a layer.
//
// Millions of points: boundaries are first sought among a few thousand cells of neighbouring positions, at the cost of
// the smallest interval between two cells. That is a lower bound which satisfies the same inequality. With any solution
// as upper bound, only cells that a path of no more than its cost goes through can hold a boundary of the optimum. They
// are cut up again, until cells are single positions and the programme is the exact one.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kmeans_init/kernel.h"
#include "kmeans_init/penalty.h"

namespace effkern::kmeans_init {
namespace {

// From so many clusters and points on the search by prices is the faster one.
constexpr int64_t kManyClusters = 24, kManyPoints = 4096;

// Sums of all points before a position. Only every 16th is kept.
class Prefix {
 public:
  using Long = Sums<long double>;

  explicit Prefix(const Points& points) : points_(points), centre_(points.value[points.value.size() / 2]) {
    const auto count = static_cast<int64_t>(points.value.size());
    Long sums;
    for (int64_t i = 0; i < count; ++i) {
      if (i % kStride == 0) anchors_.push_back(sums);
      add(sums, i);
    }
    anchors_.push_back(sums);
  }

  Long operator()(int64_t position) const {
    if (position == static_cast<int64_t>(points_.value.size())) return anchors_.back();
    Long sums = anchors_[position / kStride];
    for (int64_t i = position / kStride * kStride; i < position; ++i) add(sums, i);
    return sums;
  }

  // Those of ascending positions, which cost less than one by one where they are close.
  template <class Real>
  std::vector<Sums<Real>> at(const std::vector<int64_t>& positions) const {
    std::vector<Sums<Real>> all;
    all.reserve(positions.size());
    Long sums = (*this)(positions.front());
    int64_t reached = positions.front();
    for (const int64_t position : positions) {
      if (position - reached > kStride) sums = (*this)(position), reached = position;
      for (; reached < position; ++reached) add(sums, reached);
      all.push_back({static_cast<Real>(sums.mass), static_cast<Real>(sums.first), static_cast<Real>(sums.second)});
    }
    return all;
  }

  double mean(const Long& before, const Long& after) const {
    return static_cast<double>(centre_ + (after.first - before.first) / (after.mass - before.mass));
  }

  // From the points themselves: the mean of one point is that point.
  double mean(int64_t begin, int64_t end) const {
    Long sums;
    for (int64_t i = begin; i < end; ++i) add(sums, i);
    return mean({}, sums);
  }

  double cost(const std::vector<int64_t>& path) const {
    double sum = 0.0;
    for (size_t m = 1; m < path.size(); ++m) sum += spread((*this)(path[m - 1]), (*this)(path[m]));
    return sum;
  }

 private:
  static constexpr int64_t kStride = 16;

  void add(Long& sums, int64_t i) const {
    const long double distance = static_cast<long double>(points_.value[i]) - centre_, weight = points_.mass[i];
    sums.mass += weight;
    sums.first += weight * distance;
    sums.second += weight * distance * distance;
  }

  const Points& points_;
  double centre_;
  std::vector<Long> anchors_;
};

// Candidates for one boundary: cells of positions, [begin, end] each.
struct Cells {
  std::vector<int64_t> begin, end;

  Cells(int64_t low, int64_t high, int64_t most) {
    const int64_t size = high - low + 1, count = std::min(size, most);
    for (int64_t cell = 0; cell < count; ++cell) {
      begin.push_back(low + size * cell / count);
      end.push_back(low + size * (cell + 1) / count - 1);
    }
  }
  int64_t size() const { return static_cast<int64_t>(begin.size()); }
};

// One layer of the programme: cost[j] = min_i before[i] + spread(from[i], to[j]) over the first open[j] of them.
template <class Real>
struct Layer {
  const std::vector<Sums<Real>>& from;
  const std::vector<double>& before;
  const std::vector<Sums<Real>>& to;
  const std::vector<int64_t>& open;
  std::vector<double>& cost;
  std::vector<int32_t>& choice;

  void solve(int64_t begin, int64_t end, int64_t low, int64_t high) const {
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2, last = std::min(high, open[middle] - 1);
      double least = std::numeric_limits<double>::infinity();
      int64_t best = low;
      for (int64_t i = low; i <= last; ++i) {
        if (before[i] >= least) break;  // costs of more points are no less
        const double sum = before[i] + spread(from[i], to[middle]);
        if (sum < least) least = sum, best = i;
      }
      cost[middle] = least;
      choice[middle] = static_cast<int32_t>(best);
      solve(begin, middle, low, best);
      begin = middle + 1;
      low = best;
    }
  }
};

template <class Real>
class Search {
 public:
  Search(const Points& points, const Prefix& prefix, int64_t clusters)
      : points_(points),
        prefix_(prefix),
        count_(static_cast<int64_t>(points.value.size())),
        clusters_(clusters) {
    for (int64_t m = 0; m <= clusters; ++m) {
      low_.push_back(m);
      high_.push_back(m == 0 ? 0 : count_ - clusters + m);
    }
    low_[clusters] = count_;
  }

  // The boundaries of the optimum, 0 and the number of points included.
  std::vector<int64_t> run() {
    for (int64_t most = 8192;; most *= 2) {
      cells_.clear();
      bool exact = true;
      for (int64_t m = 0; m <= clusters_; ++m) {
        cells_.emplace_back(low_[m], high_[m], most);
        exact = exact && cells_[m].size() == high_[m] - low_[m] + 1;
      }
      forward();
      std::vector<int64_t> path = trace();
      if (exact) return path;
      improve(path);
      backward();
      narrow();
    }
  }

 private:
  // done_[m][j]: least cost of m clusters up to cell j.
  void forward() {
    done_.assign(clusters_ + 1, {});
    choices_.assign(clusters_ + 1, {});
    done_[0] = {0.0};
    for (int64_t m = 1; m <= clusters_; ++m) {
      const Cells &from = cells_[m - 1], &to = cells_[m];
      std::vector<int64_t> open(to.size());
      for (int64_t j = 0, i = 0; j < to.size(); ++j) {
        while (i < from.size() && from.begin[i] < to.end[j]) ++i;
        open[j] = i;
      }
      done_[m].resize(to.size());
      choices_[m].resize(to.size());
      Layer<Real>{prefix_.template at<Real>(from.end),
                  done_[m - 1],
                  prefix_.template at<Real>(to.begin),
                  open,
                  done_[m],
                  choices_[m]}
          .solve(0, to.size(), 0, from.size() - 1);
    }
  }

  // rest_[m][j]: least cost of the other clusters from cell j on. The same programme, with positions counted from the
  // other side.
  void backward() {
    rest_.assign(clusters_ + 1, {});
    rest_[clusters_] = {0.0};
    for (int64_t m = clusters_ - 1; m >= 1; --m) {
      const Cells &from = cells_[m + 1], &to = cells_[m];
      std::vector<int64_t> open(to.size());
      for (int64_t j = 0, i = 0; j < to.size(); ++j) {
        while (i < from.size() && from.end[from.size() - 1 - i] > to.begin[to.size() - 1 - j]) ++i;
        open[j] = i;
      }
      std::vector<double> before(rest_[m + 1].rbegin(), rest_[m + 1].rend()), cost(to.size());
      std::vector<int32_t> choice(to.size());
      Layer<Real>{mirrored(from.begin), before, mirrored(to.end), open, cost, choice}.solve(0, to.size(), 0,
                                                                                            from.size() - 1);
      rest_[m].assign(cost.rbegin(), cost.rend());
    }
  }

  std::vector<Sums<Real>> mirrored(const std::vector<int64_t>& positions) const {
    std::vector<Sums<Real>> sums = prefix_.template at<Real>(positions);
    std::reverse(sums.begin(), sums.end());
    for (Sums<Real>& one : sums) one = {-one.mass, -one.first, -one.second};
    return sums;
  }

  std::vector<int64_t> trace() const {
    std::vector<int64_t> path(clusters_ + 1);
    int64_t cell = 0;
    for (int64_t m = clusters_; m >= 0; --m) {
      path[m] = cells_[m].begin[cell];
      if (m) cell = choices_[m][cell];
    }
    return path;
  }

  // Lowers the upper bound: Lloyd's iterations from a path of cells.
  void improve(std::vector<int64_t> path) {
    for (int round = 0; round < 16; ++round) {
      for (int64_t m = 1; m <= clusters_; ++m)
        if (path[m] <= path[m - 1]) return;
      bound_ = std::min(bound_, prefix_.cost(path));
      std::vector<double> means;
      for (int64_t m = 0; m < clusters_; ++m) means.push_back(prefix_.mean(prefix_(path[m]), prefix_(path[m + 1])));
      for (int64_t m = 1; m < clusters_; ++m) {
        const double between = (means[m - 1] + means[m]) / 2;
        path[m] = std::lower_bound(points_.value.begin(), points_.value.end(), between) - points_.value.begin();
      }
    }
  }

  // Leaves the cells that a path within the upper bound goes through, and what lies between them.
  void narrow() {
    const Prefix::Long all = prefix_(count_);
    // What rounding may have added to a lower bound.
    const double most = bound_ * (1.0 + 1e-9) + static_cast<double>(all.second) * 1e-16;
    for (int64_t m = 1; m < clusters_; ++m) {
      const Cells& cells = cells_[m];
      int64_t first = 0, last = cells.size() - 1;
      while (first < last && done_[m][first] + rest_[m][first] > most) ++first;
      while (last > first && done_[m][last] + rest_[m][last] > most) --last;
      low_[m] = cells.begin[first];
      high_[m] = cells.end[last];
    }
    for (int64_t m = 1; m < clusters_; ++m) low_[m] = std::max(low_[m], low_[m - 1] + 1);
    for (int64_t m = clusters_ - 1; m >= 1; --m) high_[m] = std::min(high_[m], high_[m + 1] - 1);
  }

  const Points& points_;
  const Prefix& prefix_;
  int64_t count_, clusters_;
  std::vector<int64_t> low_, high_;  // where each boundary of the optimum lies
  double bound_ = std::numeric_limits<double>::infinity();
  std::vector<Cells> cells_;
  std::vector<std::vector<double>> done_, rest_;
  std::vector<std::vector<int32_t>> choices_;
};

}  // namespace

void exact_centroids(const Points& points, int64_t clusters, float* centroids) {
  const auto count = static_cast<int64_t>(points.value.size());
  if (count <= clusters) {
    for (int64_t m = 0; m < clusters; ++m) centroids[m] = points.value[std::min(m, count - 1)];
    return;
  }
  const Prefix prefix(points);
  std::vector<int64_t> bounds;
  bool fine = false;
  if (clusters >= kManyClusters && count >= kManyPoints) {
    std::vector<int64_t> positions(count + 1);
    std::iota(positions.begin(), positions.end(), int64_t{0});
    bounds = priced_bounds(prefix.at<double>(positions), clusters, &fine);
  }
  if (bounds.empty() && !fine) bounds = Search<double>(points, prefix, clusters).run();
  // Clumps far from each other lose what is inside them to differences of large numbers in float64.
  const auto all = static_cast<double>(prefix(count).second);
  if (fine || prefix.cost(bounds) < kFine * all) bounds = Search<long double>(points, prefix, clusters).run();
  for (int64_t m = 0; m < clusters; ++m) centroids[m] = static_cast<float>(prefix.mean(bounds[m], bounds[m + 1]));
}

}  // namespace effkern::kmeans_init
