// Monarch products on fp32 vectors, for every input dtype: tokens run across the lanes, so that weights are read one
// scalar at a time in place, and the permutation between the factors is a stride.
#pragma once

#include "core/cpu/gemm_vector.h"
#include "core/cpu/pack.h"
#include "core/cpu/simd.h"
#include "monarch/dot_body.h"
#include "monarch/kernel.h"

namespace effkern {
namespace EFFKERN_UNIT {

using monarch::FirstBackward;
using monarch::FirstGradient;
using monarch::FirstStage;
using monarch::Part;
using monarch::SecondBackward;
using monarch::SecondGradient;
using monarch::SecondStage;
using monarch::Shape;
using monarch::Tokens;
using monarch::Weights;

#if defined(EFFKERN_UNIT_BF16)
constexpr int64_t kTokenTile = 64;
#else
constexpr int64_t kTokenTile = kMicroVectors * kLanes * (kLanes >= 16 ? 1 : 2);  // 48 tokens, 24 portable
#endif
// Blocks of the second factor whose outputs are neighbours in memory leave together, a vector of them a token.
constexpr int64_t kTogether = kLanes;

EFFKERN_INLINE int64_t padded(int64_t dim) { return round_up(dim, kLanes); }

// How deep a product goes at a time: the panel of B that a micro-tile walks along, 24 or 48 lanes, stays in L1.
constexpr int64_t kDepth = 192;
constexpr int64_t kPanelRows = 64;  // of a transposed factor that are packed at a time, in groups of a cache line
constexpr int64_t kPanelGroup = 16;

// One slice of tokens or of outputs, in lanes or as rows; then one block or panel of a factor in fp32.
EFFKERN_INLINE int64_t slice_floats(const Shape& shape) {
  const int64_t slice = max64(max64(shape.p, max64(shape.q, shape.r)), shape.s * min64(kTogether, shape.l));
  return (padded(slice) + 16) * kTokenTile;
}
template <class T>
static int64_t scratch_bytes(const Shape& shape) {
  const int64_t block = sizeof(T) == 2 ? max64(shape.q * shape.p, shape.s * shape.r) : 0;
  const int64_t floats = slice_floats(shape) + max64(block, kPanelRows * kDepth);
  return floats * static_cast<int64_t>(sizeof(float)) + 64;
}

EFFKERN_INLINE float* aligned(void* scratch) {
  return reinterpret_cast<float*>(round_up(reinterpret_cast<int64_t>(scratch), 64));
}

template <class T>
static void widen(const void* source, int64_t count, float* target) {
  convert_row(static_cast<const T*>(source), count, target);
}

// 16-bit factors that many token tiles use are widened once; for few tiles block by block, on the way.
template <class T>
static int64_t prepared_bytes(int64_t rows, int64_t columns, bool, bool often) {
  return often && sizeof(T) == 2 ? rows * columns * static_cast<int64_t>(sizeof(float)) : 0;
}
template <class T>
static void prepare(const void* block, int64_t rows, int64_t columns, bool, void* target) {
  convert_row(static_cast<const T*>(block), rows * columns, static_cast<float*>(target));
}

// Rows [first, first + rows) of a factor, counted through its blocks, in fp32.
EFFKERN_INLINE const float* wide_rows(const float* raw, const Weights&, int64_t first, int64_t, int64_t columns,
                                      const Shape&, void*) {
  return raw + first * columns;
}
template <class T>
EFFKERN_INLINE const float* wide_rows(const T* raw, const Weights& w, int64_t first, int64_t rows, int64_t columns,
                                      const Shape& shape, void* scratch) {
  if (w.prepared) return static_cast<const float*>(w.prepared) + first * columns;
  float* room = aligned(scratch) + slice_floats(shape);
  convert_row(raw + first * columns, rows * columns, room);
  return room;
}

template <class T>
static void first_stage_dot(const FirstStage& t) {
  const Shape& shape = t.shape;
  const int64_t numbers = shape.k * shape.q, width = padded(shape.p), count = t.x.count;
  const int64_t rows = t.part.row_end - t.part.row_begin;
  float* x = aligned(t.scratch);
  float* sums = x + width * kDotTokens;  // (rows, tokens)
  for (int64_t block = t.part.begin; block < t.part.end; ++block) {
    for (int64_t token = 0; token < count; ++token)
      convert_row(static_cast<const T*>(t.x.data) + token * t.x.stride + block * shape.p, shape.p, x + token * width);
    const int64_t first = block * shape.q + t.part.row_begin;
    if (!shape.l) sums = t.mid + first * count;
    dot_block(static_cast<const T*>(t.w1.raw) + first * shape.p, rows, shape.p, x, width, count, sums, count, 1);
    if (!shape.l) continue;
    int64_t index = first / shape.l, of = first % shape.l;
    for (int64_t j = 0; j < rows; ++j) {
      for (int64_t token = 0; token < count; ++token)
        t.mid[token * numbers + of * shape.r + index] = sums[j * count + token];
      if (++of == shape.l) of = 0, ++index;
    }
  }
}

// The middle in the order of the second factor, (l, r): it is read there many times, at a stride that would fall on few
// sets of the cache, and written here once.
struct MidRows {
  float* data;
  int64_t first, l, r, lanes;
  EFFKERN_MEMBER float* operator()(int64_t row) const {
    const int64_t number = first + row;
    return data + (number % l * r + number / l) * lanes;
  }
};

// C = A B with a depth of any size.
template <class Target>
EFFKERN_INLINE void deep_product(int64_t rows, int64_t lanes, int64_t depth, Strided a, const float* b, const Target& c,
                                 int64_t first = 0) {
  const int64_t stretches = (depth + kDepth - 1) / kDepth, step = (depth + stretches - 1) / stretches;
  gemm_rows<Fp32Product, false>(rows, lanes, min64(step, depth), a, b, lanes, c, first);
  for (int64_t d = step; d < depth; d += step)
    gemm_rows<Fp32Product, true>(rows, lanes, min64(step, depth - d), {a.data + d * a.depth, a.row, a.depth},
                                 b + d * lanes, lanes, c, first);
}

// A product with rows of a factor. Where few tokens use it, reading the factor is what takes time, and its rows are
// short streams, which hardware does not see coming: the next few are asked for while these are multiplied.
template <class Target>
EFFKERN_INLINE void factor_product(const float* w, int64_t rows, int64_t depth, int64_t lanes, const float* b,
                                   const Target& c) {
  if (lanes > 2 * kLanes) return deep_product(rows, lanes, depth, {w, depth, 1}, b, c);
  const int64_t step = max64(1, 8192 / (depth * static_cast<int64_t>(sizeof(float)) * 16)) * 16;
  for (int64_t row = 0; row < rows; row += step) {
    const int64_t here = min64(step, rows - row);
    const float* next = w + (row + here) * depth;
    for (int64_t i = 0; i < min64(step, rows - row - here) * depth; i += 16) __builtin_prefetch(next + i, 0, 2);
    deep_product(here, lanes, depth, {w + row * depth, depth, 1}, b, c, row);
  }
}

template <class T>
static void first_stage(const FirstStage& t) {
  if (t.shape.few) return first_stage_dot<T>(t);
  const Shape& shape = t.shape;
  const int64_t lanes = padded(t.x.count);
  float* x = aligned(t.scratch);
  for (int64_t block = t.part.begin; block < t.part.end; ++block) {
    pack_transposed(static_cast<const T*>(t.x.data) + block * shape.p, t.x.stride, t.x.count, shape.p, lanes, false, x,
                    lanes);
    const int64_t first = block * shape.q + t.part.row_begin, rows = t.part.row_end - t.part.row_begin;
    const float* w1 = wide_rows(static_cast<const T*>(t.w1.raw), t.w1, first, rows, shape.p, shape, t.scratch);
    if (shape.l)
      factor_product(w1, rows, shape.p, lanes, x, MidRows{t.mid, first, shape.l, shape.r, lanes});
    else
      factor_product(w1, rows, shape.p, lanes, x, EvenRows{t.mid + first * lanes, lanes});
  }
}

// Writes rows[i] of `lanes` tokens, i from 0 to `columns`, to the columns [begin, begin + columns) of the tokens; the
// rows of a vector of columns are `stride` numbers apart.
template <class T>
static void store_columns(const float* rows, int64_t stride, int64_t columns, int64_t begin, const SecondStage& t) {
  T* out = static_cast<T*>(t.out.data) + begin;
  for (int64_t token = 0; token < t.out.count; token += kLanes) {
    const int64_t tokens = min64(kLanes, t.out.count - token);
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t count = min64(kLanes, columns - column);
      Vec block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) block[i] = i < count ? vload(rows + (column + i) * stride + token) : vzero();
      transpose(block);
      const Vec bias = t.bias ? load_some(t.bias + begin + column, count) : vzero();
      for (int64_t i = 0; i < tokens; ++i)
        store_some(out + (token + i) * t.out.stride + column, vadd(block[i], bias), count);
    }
  }
}

// Columns of the output that are neighbours: `count` stretches of `width`, the first at `column`, `step` apart.
struct Stretches {
  int64_t count, width, column, step;
};
EFFKERN_INLINE Stretches stretches(const Shape& shape, const Part& part, int64_t begin, int64_t blocks) {
  const int64_t rows = part.row_end - part.row_begin;
  if (shape.l_major) return {blocks, rows, begin * shape.s + part.row_begin, shape.s};
  if (blocks == shape.l) return {1, rows * blocks, part.row_begin * shape.l, 0};
  return {rows, blocks, part.row_begin * shape.l + begin, shape.l};
}

// Results (row, block of this group, lanes) of `blocks` blocks from `begin` on to where the output has them.
template <class T>
static void store_group(const float* results, int64_t lanes, const SecondStage& t, int64_t begin, int64_t blocks) {
  const Stretches all = stretches(t.shape, t.part, begin, blocks);
  const int64_t step = t.shape.l_major ? blocks * lanes : lanes, next = t.shape.l_major ? lanes : blocks * lanes;
  for (int64_t i = 0; i < all.count; ++i)
    store_columns<T>(results + i * next, step, all.width, all.column + i * all.step, t);
}

template <class T>
static void second_stage_dot(const SecondStage& t) {
  const Shape& shape = t.shape;
  const int64_t numbers = shape.l * shape.r, tokens = t.out.count, rows = t.part.row_end - t.part.row_begin;
  float* sums = aligned(t.scratch);
  for (int64_t begin = t.part.begin; begin < t.part.end; begin += kTogether) {
    const int64_t blocks = min64(kTogether, t.part.end - begin);
    // Neighbours in the output stand together: (token, row, block) or (token, block, row).
    const int64_t row_step = shape.l_major ? 1 : blocks, block_step = shape.l_major ? rows : 1;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = (begin + i) * shape.s + t.part.row_begin;
      dot_block(static_cast<const T*>(t.w2.raw) + first * shape.r, rows, shape.r, t.mid + (begin + i) * shape.r,
                numbers, tokens, sums + i * block_step, row_step, blocks * rows);
    }
    const Stretches all = stretches(shape, t.part, begin, blocks);
    for (int64_t token = 0; token < tokens; ++token)
      for (int64_t stretch = 0; stretch < all.count; ++stretch) {
        const int64_t column = all.column + stretch * all.step;
        const float* source = sums + token * blocks * rows + stretch * all.width;
        T* out = static_cast<T*>(t.out.data) + token * t.out.stride + column;
        for (int64_t i = 0; i < all.width; i += kLanes) {
          const int64_t width = all.width - i;
          const Vec bias = t.bias ? load_some(t.bias + column + i, width) : vzero();
          store_some(out + i, vadd(load_some(source + i, width), bias), width);
        }
      }
  }
}

template <class T>
static void second_stage(const SecondStage& t) {
  if (t.shape.few) return second_stage_dot<T>(t);
  const Shape& shape = t.shape;
  const int64_t lanes = padded(t.out.count), rows = t.part.row_end - t.part.row_begin;
  float* results = aligned(t.scratch);
  for (int64_t begin = t.part.begin; begin < t.part.end; begin += kTogether) {
    const int64_t blocks = min64(kTogether, t.part.end - begin);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = (begin + i) * shape.s + t.part.row_begin;
      const float* w2 = wide_rows(static_cast<const T*>(t.w2.raw), t.w2, first, rows, shape.r, shape, t.scratch);
      factor_product(w2, rows, shape.r, lanes, t.mid + (begin + i) * shape.r * lanes,
                     EvenRows{results + i * lanes, blocks * lanes});
    }
    store_group<T>(results, lanes, t, begin, blocks);
  }
}

// Columns of the caller's rows to lanes; column index * blocks + block becomes row block * size + index.
template <class T>
static void pack(const Tokens& rows, int64_t blocks, int64_t size, float* target) {
  const T* source = static_cast<const T*>(rows.data);
  const int64_t features = blocks * size, lanes = padded(rows.count);
  for (int64_t token = 0; token < lanes; token += kLanes) {
    int64_t index = 0, of = 0;
    for (int64_t d = 0; d < features; d += kLanes) {
      Vec block[kLanes];
      const int64_t width = min64(kLanes, features - d);
      for (int64_t i = 0; i < kLanes; ++i)
        block[i] = token + i < rows.count ? load_some(source + (token + i) * rows.stride + d, width) : vzero();
      transpose(block);
      for (int64_t c = 0; c < width; ++c) {
        vstore(target + (of * size + index) * lanes + token, block[c]);
        if (++of == blocks) of = 0, ++index;
      }
    }
  }
}

template <class T>
static void unpack_mid(const Shape& shape, const float* mid, const Part& part, const Tokens& rows) {
  const bool dot = shape.few;
  const SecondStage as_output{shape, nullptr, {nullptr, nullptr}, nullptr, part, rows, nullptr};
  const int64_t stride = dot ? rows.count : padded(rows.count);
  for (int64_t block = part.begin; block < part.end; ++block) {
    const int64_t first = block * shape.q + part.row_begin, last = block * shape.q + part.row_end;
    if (!dot) {
      store_columns<T>(mid + first * stride, stride, last - first, first, as_output);
      continue;
    }
    for (int64_t token = 0; token < rows.count; ++token)
      for (int64_t i = first; i < last; ++i)
        store_some(static_cast<T*>(rows.data) + token * rows.stride + i, vset(mid[i * stride + token]), 1);
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
