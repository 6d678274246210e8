// k-means in one dimension by prices: for many clusters, where a layer of the programme for each takes too long.
#pragma once

#include <cstdint>
#include <vector>

#include "kmeans_init/spread.h"

namespace effkern::kmeans_init {

// Of a cost below this share of that of one cluster, float64 sums over all points lose too much to differences.
constexpr double kFine = 1e-6;

// The boundaries of the optimum, 0 and the number of points included, from the sums before every position. Empty where
// no price could be found: for the other search to take over. `fine`: whether the reason is a cost below kFine.
std::vector<int64_t> priced_bounds(const std::vector<Sums<double>>& sums, int64_t clusters, bool* fine);

}  // namespace effkern::kmeans_init
