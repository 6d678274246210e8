// Start values of weight clustering: what passes between the torch side and the searches (raw pointers only).
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"

namespace effkern::kmeans_init {

// `count` weights of a group, contiguous, and what each counts (null: one each).
struct Group {
  const void* weight;
  const float* importance;
  int64_t count;
  Dtype dtype;
};

// Distinct values, ascending, and how much each counts, more than nothing.
struct Points {
  std::vector<float> value;
  std::vector<double> mass;
};

struct Faults {
  bool weight = false;      // some weight is not finite
  bool importance = false;  // some importance is negative or not finite
};

// The points of a group. Where the importance is zero throughout, every weight counts once.
Points distinct_points(const Group& group, Faults* faults);

// The exact optimum of weighted k-means in one dimension: ascending, the largest repeated where there are fewer points
// than clusters.
void exact_centroids(const Points& points, int64_t clusters, float* centroids);

// `count` vectors of `dim` numbers: k-means++ with draws of its own for every group index, then Lloyd's iterations.
struct Vectors {
  const float* value;
  const float* importance;  // one a vector, may be null
  int64_t count, dim;
};
constexpr int kRounds = 25;  // of Lloyd's iterations, at most
void lloyd_centroids(const Vectors& vectors, int64_t clusters, int64_t group, float* centroids);

}  // namespace effkern::kmeans_init
