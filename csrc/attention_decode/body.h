// Attention of few queries to a long cache: bound by reading keys and values, so each is read once, for all rows of a
// kv head, and widened in registers. Here the lanes run along the keys (scores) and along the value dimension.
#pragma once

#include "attention/mask_body.h"
#include "attention_decode/kernel.h"
#include "core/cpu/gemm_vector.h"
#include "core/cpu/pack.h"
#include "core/cpu/simd.h"

namespace effkern {
namespace EFFKERN_UNIT {

using attention_decode::Cache;
using attention_decode::Chunk;
using attention_decode::Merge;

constexpr int64_t kStep = 64;    // keys whose scores, keys and values are in L1 together
constexpr int64_t kFewRows = 2;  // up to here dot products along the head dimension beat transposing the keys
constexpr float kLog2e = 1.44269504088896341f;

EFFKERN_INLINE int64_t padded(int64_t dim) { return round_up(dim, kLanes); }

struct Scratch {
  float *q, *scores, *tile;
};

static int64_t layout(int64_t rows, int64_t head_dim, int64_t value_dim, void* base, Scratch* scratch) {
  const int64_t widest = padded(max64(head_dim, value_dim));
  const int64_t sizes[3] = {rows * padded(head_dim), rows * kStep, widest * kStep};
  int64_t offsets[4] = {0};
  for (int i = 0; i < 3; ++i) offsets[i + 1] = round_up(offsets[i] + sizes[i], 16);
  if (scratch) {
    float* start = reinterpret_cast<float*>(round_up(reinterpret_cast<int64_t>(base), 64));
    *scratch = {start + offsets[0], start + offsets[1], start + offsets[2]};
  }
  return offsets[3] * static_cast<int64_t>(sizeof(float)) + 64;
}

static int64_t scratch_bytes(int64_t rows, int64_t head_dim, int64_t value_dim) {
  return layout(rows, head_dim, value_dim, nullptr, nullptr);
}

template <class T>
EFFKERN_INLINE const T* cache_row(const Cache& cache, int64_t key) {
  const T* data = static_cast<const T*>(cache.data);
  if (!cache.pages) return data + key * cache.row_stride;
  return data + cache.pages[key / cache.page_size] * cache.page_stride + key % cache.page_size * cache.row_stride;
}

// Row pointers of up to kStep keys. Past the last one the last is repeated: what lies behind must not be read.
template <class T>
EFFKERN_INLINE void cache_rows(const Cache& cache, int64_t begin, int64_t count, const T** rows) {
  for (int64_t i = 0; i < kStep; ++i) rows[i] = i < count ? cache_row<T>(cache, begin + i) : rows[count - 1];
}

// s[key] = q . k[key] for one row, a vector of keys at a time.
template <class T>
static void dot_scores(const float* q, const T* const* rows, int64_t head_dim, int64_t count, float* s) {
  const int64_t whole = head_dim / kLanes * kLanes;
  for (int64_t key = 0; key < count; key += kLanes) {
    Vec sums[kLanes];
    for (int i = 0; i < kLanes; ++i) sums[i] = vzero();
    for (int64_t d = 0; d < whole; d += kLanes) {
      const Vec x = vload(q + d);
      for (int i = 0; i < kLanes; ++i) sums[i] = vfma(load_full(rows[key + i] + d), x, sums[i]);
    }
    if (whole < head_dim)
      for (int i = 0; i < kLanes; ++i)
        sums[i] = vfma(load_some(rows[key + i] + whole, head_dim - whole), vload(q + whole), sums[i]);
    transpose(sums);
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) sums[i] = vadd(sums[i], sums[i + width]);
    vstore(s + key, sums[0]);
  }
}

// target[d][key] = k[key][d], so that many rows can share the keys.
template <class T>
static void transpose_keys(const T* const* rows, int64_t head_dim, int64_t count, float* target) {
  for (int64_t key = 0; key < count; key += kLanes)
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      Vec block[kLanes];
      const int64_t width = min64(kLanes, head_dim - d);
      for (int i = 0; i < kLanes; ++i) block[i] = load_some(rows[key + i] + d, width);
      transpose(block);
      for (int64_t i = 0; i < width; ++i) vstore(target + (d + i) * kStep + key, block[i]);
    }
}

// out[d] += sum over keys of p[key] v[key][d], eight vectors of d in registers at a time.
template <class T>
static void add_values(const float* p, const T* const* rows, int64_t value_dim, int64_t count, float* out) {
  constexpr int kVectors = 8;
  int64_t d = 0;
  for (; d + kVectors * kLanes <= value_dim; d += kVectors * kLanes) {
    Vec sums[kVectors];
    for (int i = 0; i < kVectors; ++i) sums[i] = vload(out + d + i * kLanes);
    for (int64_t key = 0; key < count; ++key) {
      const Vec weight = vbroadcast(p + key);
      for (int i = 0; i < kVectors; ++i) sums[i] = vfma(load_full(rows[key] + d + i * kLanes), weight, sums[i]);
    }
    for (int i = 0; i < kVectors; ++i) vstore(out + d + i * kLanes, sums[i]);
  }
  for (; d < value_dim; d += kLanes) {
    const int64_t width = min64(kLanes, value_dim - d);
    Vec sum = load_some(out + d, width);
    for (int64_t key = 0; key < count; ++key) sum = vfma(load_some(rows[key] + d, width), vbroadcast(p + key), sum);
    store_some(out + d, sum, width);
  }
}

EFFKERN_INLINE float largest(const float* s, int64_t count) {
  Vec top = vset(-INFINITY);
  for (int64_t key = 0; key < count; key += kLanes) top = vmax(vload(s + key), top);
  float lanes[kLanes], result = -INFINITY;
  vstore(lanes, top);
  for (int i = 0; i < kLanes; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}

// q.k to logits, minus infinity where a key is hidden or past the end of the step.
static void finish_scores(const Chunk& t, int64_t row, int64_t begin, int64_t count, float* s) {
  const Vec scale = vset(t.scale), cap = vset(t.softcap);
  for (int64_t key = 0; key < count; key += kLanes) {
    Vec z = vmul(vload(s + key), scale);
    if (t.softcap != 0.0f) z = vmul(cap, vtanh(vdiv(z, cap)));
    vstore(s + key, z);
  }
  if (t.partial)
    for (int64_t word = 0; word < count; word += kWordKeys) {
      const uint32_t bits = visible_bits(*t.mask, row % t.queries, begin + word);
      for (int64_t i = 0; i < min64(kWordKeys, count - word); ++i)
        if (!(bits >> i & 1u)) s[word + i] = -INFINITY;
    }
  for (int64_t key = count; key < padded(count); ++key) s[key] = -INFINITY;
}

// Scores to weights relative to the running maximum, which may rise: then what was summed shrinks.
static void weigh(float* s, int64_t count, int64_t value_dim, float* values, float* top, float* total) {
  const float rise = largest(s, padded(count));
  if (rise > *top) {
    if (*top != -INFINITY) {
      const float keep = exp2f((*top - rise) * kLog2e);
      *total *= keep;
      for (int64_t d = 0; d < value_dim; ++d) values[d] *= keep;
    }
    *top = rise;
  }
  const float reference = *top == -INFINITY ? 0.0f : *top;
  Vec sum = vzero();
  for (int64_t key = 0; key < count; key += kLanes) {
    const Vec p = vexp2(vmul(vsub(vload(s + key), vset(reference)), vset(kLog2e)));
    sum = vadd(sum, p);
    vstore(s + key, p);
  }
  float lanes[kLanes];
  vstore(lanes, sum);
  for (int i = 0; i < kLanes; ++i) *total += lanes[i];
}

template <class T>
static void chunk(const Chunk& t) {
  const int64_t rows = t.group * t.queries, width = padded(t.head_dim);
  Scratch scratch;
  layout(rows, t.head_dim, t.value_dim, t.scratch, &scratch);
  for (int64_t row = 0; row < rows; ++row) {
    const T* q = static_cast<const T*>(t.q) + row / t.queries * t.q_head_stride + row % t.queries * t.q_row_stride;
    for (int64_t d = 0; d < t.head_dim; d += kLanes)
      vstore(scratch.q + row * width + d, load_some(q + d, t.head_dim - d));
    t.top[row] = -INFINITY;
    t.total[row] = 0.0f;
  }
  memset(t.values, 0, rows * t.value_dim * sizeof(float));
  for (int64_t begin = t.begin; begin < t.end; begin += kStep) {
    const int64_t count = min64(kStep, t.end - begin);
    const T* keys[kStep];
    const T* values[kStep];
    cache_rows<T>(t.k, begin, count, keys);
    cache_rows<T>(t.v, begin, count, values);
    if (rows <= kFewRows) {
      for (int64_t row = 0; row < rows; ++row)
        dot_scores(scratch.q + row * width, keys, t.head_dim, count, scratch.scores + row * kStep);
    } else {
      transpose_keys(keys, t.head_dim, count, scratch.tile);
      gemm_vector<Fp32Product, false>(rows, padded(count), t.head_dim, {scratch.q, width, 1}, scratch.tile, kStep,
                                      scratch.scores, kStep);
    }
    for (int64_t row = 0; row < rows; ++row) {
      float* s = scratch.scores + row * kStep;
      finish_scores(t, row, begin, count, s);
      weigh(s, count, t.value_dim, t.values + row * t.value_dim, t.top + row, t.total + row);
    }
    if (rows <= kFewRows || t.value_dim % kLanes != 0) {
      for (int64_t row = 0; row < rows; ++row)
        add_values(scratch.scores + row * kStep, values, t.value_dim, count, t.values + row * t.value_dim);
    } else {
      for (int64_t i = 0; i < count; ++i) convert_row(values[i], t.value_dim, scratch.tile + i * t.value_dim);
      gemm_vector<Fp32Product, true>(rows, t.value_dim, count, {scratch.scores, kStep, 1}, scratch.tile, t.value_dim,
                                     t.values, t.value_dim);
    }
  }
}

// l = log sum_c exp(top_c) total_c, with the sink as one more term; out = sum_c exp(top_c - l) values_c.
template <class T>
static void merge(const Merge& t) {
  const int64_t rows = t.group * t.queries;
  for (int64_t row = 0; row < rows; ++row) {
    const float sink = t.sinks ? t.sinks[row / t.queries] : -INFINITY;
    float top = sink;  // the largest of all logits
    for (int64_t c = 0; c < t.chunks; ++c) top = t.top[c * rows + row] > top ? t.top[c * rows + row] : top;
    const float reference = top == -INFINITY ? 0.0f : top;
    float total = expf(sink - reference);
    for (int64_t c = 0; c < t.chunks; ++c) total += expf(t.top[c * rows + row] - reference) * t.total[c * rows + row];
    t.lse[row] = top == -INFINITY ? -INFINITY : reference + logf(total);
    T* out = static_cast<T*>(t.out) + row * t.value_dim;
    for (int64_t d = 0; d < t.value_dim; d += kLanes) {
      const int64_t width = min64(kLanes, t.value_dim - d);
      Vec sum = vzero();
      for (int64_t c = 0; c < t.chunks; ++c) {
        if (t.top[c * rows + row] == -INFINITY) continue;  // saw nothing
        const float share = expf(t.top[c * rows + row] - reference) / total;
        sum = vfma(load_some(t.values + (c * rows + row) * t.value_dim + d, width), vset(share), sum);
      }
      store_some(out + d, sum, width);
    }
  }
}

template <class T>
struct KernelTable {
  static constexpr attention_decode::Kernels value = {"attention_decode:cpu/" EFFKERN_UNIT_NAME, scratch_bytes,
                                                      chunk<T>, merge<T>};
};

static const attention_decode::Kernels& kernels_for(Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16: return KernelTable<Bf16>::value;
    case Dtype::fp16: return KernelTable<Fp16>::value;
    default: return KernelTable<float>::value;
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
