// What passes between differentiable k-means (torch side) and the ISA units (raw pointers only).
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace effkern {
namespace dkm {

constexpr int64_t kMaxClusters = 256;
// A cluster whose soft count is below this is empty, as in effkern/reference/dkm.py.
constexpr float kEmpty = 0x1p-100f;
// Up to how many bits a squared distance that matters may take from a power of 2 for float32 to serve (see group.cpp).
// The exponent has room for them and for shares down to kEmpty.
constexpr int kMild = 24;

// The vectors [begin, end) of a group, `dim` adjacent numbers each.
struct Chunk {
  const void* weight;
  const void* grad;     // like weight; null where the pass has none
  const float* counts;  // how many equal vectors each stands for; null: one
  int64_t begin, end, clusters, dim;
  double scale;  // sqrt(log2(e) / temperature)
  float slope;   // 2 / temperature
  float steep;   // scale^2
  float* scratch;
};

// (clusters, dim). Where assignments are sharp, a weight between two centroids tells their distances apart by
// temperature / gap: distances are made of float64 numbers, times the chunk's scale. high + low are the same numbers
// for everything that is as exact as a difference in float32. Where assignments are `mild`, distances are made of
// those; of single numbers only, the smallest and the largest of which stand at `least` and `most`.
struct Centroids {
  const double* scaled;
  const float* high;
  const float* low;
  bool mild;
  int64_t least, most;
};

// One iteration seen from behind, all (clusters, dim): c^(t-1), c^t, and q = cbar^t / S^t.
struct Step {
  Centroids before, after;
  const float* pull;
  bool last;  // whose assignment makes the output, so that the output's gradient enters
};

// Sums are those of the chunk. `collect` and `reverse` sum what reaches c^t and c^(t-1), (clusters, dim).
struct Kernels {
  const char* forward_path;
  const char* forward_codes_path;
  const char* backward_path;
  const char* backward_codes_path;
  int64_t (*scratch_floats)(int64_t clusters, int64_t dim);
  // Of single numbers: the smallest and the largest.
  void (*range)(const Chunk&, double* extremes);
  // (clusters, 1 + dim): the soft count, and the sum of the vectors' distances from the centroid; then a number
  // that is not zero (NaN) if a weight is not finite.
  void (*accumulate)(const Chunk&, const Centroids& before, double* sums);
  void (*emit)(const Chunk&, const Centroids& before, const float* after, void* out);
  void (*collect)(const Chunk&, const Centroids& before, double* sums);
  // With `out`, of float32 vectors without counts, `reverse` also makes the step's part of the gradient in the same
  // pass: written there by the last step, added by others.
  void (*reverse)(const Chunk&, const Step&, void* out, double* sums);
  // Of these steps, the last of which is at the end; without it they are added to `out`.
  void (*gradient)(const Chunk&, const Step* steps, int64_t count, void* out);
  void (*widen)(const void* from, int64_t count, float* to);
  void (*narrow)(const float* from, int64_t count, void* to);
  // Of 16-bit numbers: adds grad to sums[index[code]]; out = grad slopes[code] + offsets[code].
  void (*sum_by_code)(const uint16_t* codes, const void* grad, int64_t begin, int64_t end, const uint16_t* index,
                      double* sums);
  void (*gradient_by_code)(const uint16_t* codes, const void* grad, int64_t begin, int64_t end, const float* slopes,
                           const float* offsets, void* out);
};

const Kernels& kernels_scalar(Dtype dtype);
const Kernels& kernels_avx2(Dtype dtype);
const Kernels& kernels_avx512(Dtype dtype);

}  // namespace dkm
}  // namespace effkern
