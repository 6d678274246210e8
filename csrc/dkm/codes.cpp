#include "dkm/codes.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/count_codes.h"
#include "core/parallel.h"

namespace effkern::dkm {
namespace {

constexpr int64_t kStretch = 65536;     // weights of a task
constexpr int64_t kSumBytes = 1 << 21;  // for all tables of gradient sums
constexpr uint16_t kMinusZero = 0x8000;

template <class T>
T* as(const Buffer& buffer) {
  return reinterpret_cast<T*>(buffer.data);
}

template <class Body>
void over_stretches(int64_t count, const Body& body) {
  parallel_tasks((count + kStretch - 1) / kStretch,
                 [&](int64_t task, int64_t) { body(task * kStretch, std::min(count, (task + 1) * kStretch)); });
}

}  // namespace

Codes::Codes(const Kernels& narrow, const void* weight, int64_t count)
    : kernels_(narrow),
      codes_(static_cast<const uint16_t*>(weight)),
      count_(count) {
  const std::vector<int64_t> table = count_codes(codes_, count_);
  index_.reserve(kCodes * 2);
  uint16_t* index = as<uint16_t>(index_);
  std::vector<uint16_t> present;
  std::vector<float> counts;
  for (int64_t code = 0; code < kCodes; ++code) {
    int64_t sum = code == kMinusZero ? 0 : table[code];
    if (code == 0) sum += table[kMinusZero];
    index[code] = static_cast<uint16_t>(present.size());
    if (!sum) continue;
    present.push_back(static_cast<uint16_t>(code));
    counts.push_back(static_cast<float>(sum));
  }
  index[kMinusZero] = index[0];
  unique_ = static_cast<int64_t>(present.size());
  values_.reserve(2 * unique_ * 4);
  kernels_.widen(present.data(), unique_, as<float>(values_));
  std::copy(counts.begin(), counts.end(), as<float>(values_) + unique_);
  finite_ = std::all_of(as<float>(values_), as<float>(values_) + unique_, [](float x) { return std::isfinite(x); });
}

Group Codes::group(const Kernels& wide, const float* grad) const {
  return {&wide, as<float>(values_), grad, as<float>(values_) + unique_, unique_};
}

const float* Codes::grad_sums(const void* grad) {
  // Parts by the sizes alone: the order of a sum must not depend on the threads.
  const int64_t fit = kSumBytes / (8 * unique_), parts = std::max<int64_t>(1, std::min(fit, count_ / kStretch));
  Buffer tables;
  tables.reserve(parts * unique_ * 8);
  parallel_tasks(parts, [&](int64_t part, int64_t) {
    double* sums = as<double>(tables) + part * unique_;
    memset(sums, 0, unique_ * 8);
    kernels_.sum_by_code(codes_, grad, bound_of_part(count_, parts, part), bound_of_part(count_, parts, part + 1),
                         as<uint16_t>(index_), sums);
  });
  grads_.reserve(unique_ * 4);
  for (int64_t u = 0; u < unique_; ++u) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += as<double>(tables)[part * unique_ + u];
    as<float>(grads_)[u] = static_cast<float>(sum);
  }
  return as<float>(grads_);
}

void Codes::spread(const float* of_values, float* table) const {
  const uint16_t* index = as<uint16_t>(index_);
  // Codes that do not occur may stand for a value behind the last one.
  for (int64_t code = 0; code < kCodes; ++code) table[code] = index[code] < unique_ ? of_values[index[code]] : 0.0f;
}

void Codes::emit(const float* of_values, void* out) const {
  Buffer wide, narrow;
  wide.reserve(kCodes * 4);
  narrow.reserve(kCodes * 2);
  spread(of_values, as<float>(wide));
  kernels_.narrow(as<float>(wide), kCodes, narrow.data);
  const uint16_t* table = as<uint16_t>(narrow);
  uint16_t* to = static_cast<uint16_t*>(out);
  over_stretches(count_, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = table[codes_[i]];
  });
}

void Codes::gradient(const float* slopes, const float* offsets, const void* grad, void* out) const {
  Buffer tables;
  tables.reserve(2 * kCodes * 4);
  float *slope = as<float>(tables), *offset = slope + kCodes;
  spread(slopes, slope);
  spread(offsets, offset);
  over_stretches(count_, [&](int64_t begin, int64_t end) {
    kernels_.gradient_by_code(codes_, grad, begin, end, slope, offset, out);
  });
}

}  // namespace effkern::dkm
