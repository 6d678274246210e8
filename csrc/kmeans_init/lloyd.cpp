// k-means of short vectors: k-means++ and Lloyd's iterations. Sums are added by pieces whose bounds are a matter of the
// number of vectors, so that the result does not depend on the number of threads.
#include <algorithm>
#include <limits>

#include "core/parallel.h"
#include "kmeans_init/kernel.h"

namespace effkern::kmeans_init {
namespace {

// Uniform on [0, 1): SplitMix64 of a counter, the same in effkern/reference/kmeans_init.py.
double draw(uint64_t counter) {
  uint64_t z = (counter + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

struct Pieces {
  int64_t size, count;
  explicit Pieces(int64_t total)
      : size(std::max<int64_t>(4096, (total + 511) / 512)),
        count((total + size - 1) / size) {}
};

double mass_of(const Vectors& vectors, int64_t i) { return vectors.importance ? vectors.importance[i] : 1.0; }

// Draws one vector after the other, each with a probability that grows with its squared distance to those before it.
void seed(const Vectors& vectors, int64_t clusters, int64_t group, float* centroids) {
  const int64_t dim = vectors.dim;
  const Pieces pieces(vectors.count);
  std::vector<float> nearest(vectors.count, std::numeric_limits<float>::infinity());
  std::vector<double> totals(pieces.count);
  for (int64_t j = 0; j < clusters; ++j) {
    const float* newest = j ? centroids + (j - 1) * dim : nullptr;
    const auto weight = [&](int64_t i) { return mass_of(vectors, i) * (newest ? nearest[i] : 1.0); };
    parallel_tasks(pieces.count, [&](int64_t piece, int64_t) {
      double total = 0.0;
      for (int64_t i = piece * pieces.size; i < std::min(vectors.count, (piece + 1) * pieces.size); ++i) {
        if (newest) {
          float distance = 0.0f;
          for (int64_t d = 0; d < dim; ++d) {
            const float step = vectors.value[i * dim + d] - newest[d];
            distance += step * step;
          }
          nearest[i] = std::min(nearest[i], distance);
        }
        total += weight(i);
      }
      totals[piece] = total;
    });
    double sum = 0.0;
    for (const double total : totals) sum += total;
    double left = draw(static_cast<uint64_t>(group * clusters + j)) * sum;
    int64_t piece = 0;
    while (piece + 1 < pieces.count && left >= totals[piece]) left -= totals[piece++];
    int64_t chosen = piece * pieces.size;
    const int64_t last = std::min(vectors.count, chosen + pieces.size) - 1;
    while (chosen < last && left >= weight(chosen)) left -= weight(chosen++);
    std::copy_n(vectors.value + chosen * dim, dim, centroids + j * dim);
  }
}

// One of Lloyd's iterations. Whether any centroid moved.
bool step(const Vectors& vectors, int64_t clusters, float* centroids) {
  const int64_t dim = vectors.dim, entries = clusters * (dim + 1);
  const Pieces pieces(vectors.count);
  std::vector<double> sums(pieces.count * entries, 0.0);  // dim moments and the mass of every cluster
  std::vector<float> columns(clusters * dim);
  for (int64_t j = 0; j < clusters; ++j)
    for (int64_t d = 0; d < dim; ++d) columns[d * clusters + j] = centroids[j * dim + d];
  parallel_tasks(pieces.count, [&](int64_t piece, int64_t) {
    double* sum = sums.data() + piece * entries;
    float distance[256];
    for (int64_t i = piece * pieces.size; i < std::min(vectors.count, (piece + 1) * pieces.size); ++i) {
      const float* value = vectors.value + i * dim;
      for (int64_t j = 0; j < clusters; ++j) distance[j] = 0.0f;
      for (int64_t d = 0; d < dim; ++d)
        for (int64_t j = 0; j < clusters; ++j) {
          const float away = value[d] - columns[d * clusters + j];
          distance[j] += away * away;
        }
      const int64_t best = std::min_element(distance, distance + clusters) - distance;
      const double mass = mass_of(vectors, i);
      for (int64_t d = 0; d < dim; ++d) sum[best * (dim + 1) + d] += mass * value[d];
      sum[best * (dim + 1) + dim] += mass;
    }
  });
  bool moved = false;
  for (int64_t j = 0; j < clusters; ++j) {
    double total[5] = {};
    for (int64_t piece = 0; piece < pieces.count; ++piece)
      for (int64_t d = 0; d <= dim; ++d) total[d] += sums[piece * entries + j * (dim + 1) + d];
    if (!(total[dim] > 0.0)) continue;  // nobody's nearest: it stays
    for (int64_t d = 0; d < dim; ++d) {
      const auto mean = static_cast<float>(total[d] / total[dim]);
      moved = moved || mean != centroids[j * dim + d];
      centroids[j * dim + d] = mean;
    }
  }
  return moved;
}

}  // namespace

void lloyd_centroids(const Vectors& vectors, int64_t clusters, int64_t group, float* centroids) {
  seed(vectors, clusters, group, centroids);
  for (int round = 0; round < kRounds && step(vectors, clusters, centroids); ++round) {
  }
}

}  // namespace effkern::kmeans_init
