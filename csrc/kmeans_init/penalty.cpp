// Many clusters of many points: k-means with a price for every cluster in place of their number. The least cost is
// convex in the number of clusters, so some price has the number asked for among its optima. At a given price one pass
// over the points is enough: a later start of the last cluster, once it is better, stays so (the quadrangle
// inequality), and a queue holds the starts that are best somewhere, with the position from which each of them is.
#include "kmeans_init/penalty.h"

#include <algorithm>
#include <cmath>

namespace effkern::kmeans_init {
namespace {

constexpr int kPasses = 100;

struct Priced {
  std::vector<int64_t> path;  // boundaries, 0 and the number of points included
  double cost = 0.0;          // without the price

  int64_t clusters() const { return static_cast<int64_t>(path.size()) - 1; }
};

class Pricing {
 public:
  explicit Pricing(const std::vector<Sums<double>>& sums)
      : sums_(sums),
        count_(static_cast<int64_t>(sums.size()) - 1),
        least_(sums.size()),
        choice_(sums.size()) {}

  Priced at(double price) {
    struct Start {
      int64_t position, from;
    };
    std::vector<Start> queue{{0, 1}};
    size_t head = 0;
    least_[0] = 0.0;
    for (int64_t j = 1; j <= count_; ++j) {
      while (head + 1 < queue.size() && queue[head + 1].from <= j) ++head;
      choice_[j] = queue[head].position;
      least_[j] = value(choice_[j], j) + price;
      if (j == count_) break;
      int64_t worse = j;  // the last position known at which j is no better than the queue
      while (queue.size() > head) {
        const Start& last = queue.back();
        const int64_t from = std::max(last.from, j + 1);
        worse = from;
        if (value(j, from) > value(last.position, from)) break;
        queue.pop_back();
        worse = j;
      }
      if (queue.size() <= head) {
        queue.push_back({j, j + 1});
        continue;
      }
      // From there in growing steps: it is near, as it was for the start before.
      int64_t better = worse, step = 1;
      const auto wins = [&](int64_t p) { return value(j, p) <= value(queue.back().position, p); };
      while (better < count_) {
        better = std::min(count_, worse + step);
        if (wins(better)) break;
        worse = better;
        step *= 2;
      }
      if (worse == count_) continue;
      while (better - worse > 1) {
        const int64_t middle = worse + (better - worse) / 2;
        (wins(middle) ? better : worse) = middle;
      }
      queue.push_back({j, better});
    }
    Priced found;
    for (int64_t j = count_; j > 0; j = choice_[j]) {
      found.path.push_back(j);
      found.cost += spread(sums_[choice_[j]], sums_[j]);
    }
    found.path.push_back(0);
    std::reverse(found.path.begin(), found.path.end());
    return found;
  }

 private:
  double value(int64_t i, int64_t j) const { return least_[i] + spread(sums_[i], sums_[j]); }

  const std::vector<Sums<double>>& sums_;
  int64_t count_;
  std::vector<double> least_;
  std::vector<int64_t> choice_;
};

// Two optima at one price, of fewer and of more clusters than asked for: where a cluster of `many` lies within the
// one of `few` that is as many places behind as clusters are missing, the first goes over into the second. That
// costs no more than either, by the quadrangle inequality.
std::vector<int64_t> spliced(const std::vector<int64_t>& few, const std::vector<int64_t>& many, int64_t clusters) {
  const auto missing = clusters - (static_cast<int64_t>(few.size()) - 1);
  int64_t s = missing;
  while (few[s + 1 - missing] <= many[s + 1]) ++s;
  std::vector<int64_t> path(many.begin(), many.begin() + s + 1);
  path.insert(path.end(), few.begin() + (s + 1 - missing), few.end());
  return path;
}

}  // namespace

std::vector<int64_t> priced_bounds(const std::vector<Sums<double>>& sums, int64_t clusters, bool* fine) {
  const double all = spread(sums.front(), sums.back()), wanted = static_cast<double>(clusters);
  Pricing pricing(sums);
  Priced few, many;  // known on each side of the number asked for, and their prices
  double high = 0.0, low = 0.0, price = 5.0 * all / (wanted * wanted * wanted);  // of Gaussian points
  double push = 1.0;  // at least so much the price changes while one side is unknown
  for (int pass = 0; pass < kPasses; ++pass) {
    if (!(price > 0.0)) break;
    Priced found = pricing.at(price);
    if (found.clusters() == clusters) return found.path;
    const double ratio = static_cast<double>(found.clusters()) / wanted;
    // At the price where both sides cost the same, nothing cheaper: both are optima.
    const bool met = !few.path.empty() && !many.path.empty() &&
                     found.cost + price * static_cast<double>(found.clusters()) >=
                         (few.cost + price * static_cast<double>(few.clusters())) * (1 - 1e-13) &&
                     pass % 2 == 1;
    if (met) return spliced(few.path, many.path, clusters);
    if (found.clusters() < clusters) {
      // No further cluster saves more than the price, so that no more than this is left.
      *fine = price * static_cast<double>(sums.size()) < kFine * all;
      if (*fine) break;
      few = std::move(found), high = price;
    } else {
      many = std::move(found), low = price;
    }
    if (few.path.empty() || many.path.empty()) {
      // Cost falls with the square of the number of clusters; but of clumps that are clusters by themselves the next
      // one costs orders of magnitude less, which their number does not show: in ever larger steps.
      const double step = std::max(std::pow(std::max(ratio, 1.0 / ratio), 3.0), push);
      price *= ratio > 1.0 ? step : 1.0 / step;
      push *= 4.0;
    } else if (pass % 2 == 0) {
      price = (few.cost - many.cost) / static_cast<double>(many.clusters() - few.clusters());
    } else {
      const double span = std::log(static_cast<double>(many.clusters()) / static_cast<double>(few.clusters()));
      price = low * std::pow(high / low, std::log(static_cast<double>(many.clusters()) / wanted) / span);
    }
  }
  return {};
}

}  // namespace effkern::kmeans_init
