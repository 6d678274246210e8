// The backward pass of Monarch products on fp32 vectors, one token tile at a time. Included after body.h.
#pragma once

#include "monarch/body.h"

namespace effkern {
namespace EFFKERN_UNIT {

// C = W^T B for W (depth, rows) as it stands. Read in place, the neighbours along the depth would be a row apart, often
// a whole page; so a panel is packed first, in groups of rows that fill a cache line.
template <class S>
static void transposed_product(const S* w, int64_t depth, int64_t rows, const float* b, int64_t lanes,
                               const EvenRows& c, float* room) {
  constexpr int64_t kColumns = kMicroVectors * kLanes;
  const int64_t stretches = (depth + kDepth - 1) / kDepth, step = (depth + stretches - 1) / stretches;
  for (int64_t d = 0; d < depth; d += step) {
    const int64_t deep = min64(step, depth - d);
    for (int64_t r = 0; r < rows; r += kPanelRows) {
      const int64_t here = min64(kPanelRows, rows - r);
      for (int64_t i = 0; i < deep; ++i)
        for (int64_t j = 0; j < here; j += kLanes) {
          float* group = room + (j / kPanelGroup * deep + i) * kPanelGroup + j % kPanelGroup;
          vstore(group, load_some(w + (d + i) * rows + r + j, here - j));
        }
      for (int64_t column = 0; column < lanes; column += kColumns) {
        const int64_t width = min64(kColumns, lanes - column);
        for (int64_t j = 0; j < here; j += kPanelGroup) {
          const Strided a{room + j * deep, 1, kPanelGroup};
          const EvenRows target{c.data + column, c.stride};
          const int64_t count = min64(kPanelGroup, here - j);
          if (d)
            gemm_rows<Fp32Product, true>(count, width, deep, a, b + d * lanes + column, lanes, target, r + j);
          else
            gemm_rows<Fp32Product, false>(count, width, deep, a, b + column, lanes, target, r + j);
        }
      }
    }
  }
}

// Block `index` of a factor (depth, rows), transposed; scratch as `wide_rows` uses it.
template <class T>
static void block_product(const Weights& w, int64_t index, int64_t depth, int64_t rows, const float* b, int64_t lanes,
                          const EvenRows& c, const Shape& shape, void* scratch) {
  constexpr int64_t kNarrow = 384;  // rows up to here are close enough together to be read in place
  const int64_t first = index * depth;
  const T* raw = static_cast<const T*>(w.raw);
  float* room = aligned(scratch) + slice_floats(shape);
  if (rows <= kNarrow)
    deep_product(rows, lanes, depth, {wide_rows(raw, w, first, depth, rows, shape, scratch), 1, rows}, b, c);
  else if (w.prepared)
    transposed_product(static_cast<const float*>(w.prepared) + first * rows, depth, rows, b, lanes, c, room);
  else
    transposed_product(raw + first * rows, depth, rows, b, lanes, c, room);
}

template <class T>
static void second_backward(const SecondBackward& t) {
  const Shape& shape = t.shape;
  const int64_t lanes = padded(t.tokens);
  for (int64_t block = t.part.begin; block < t.part.end; ++block)
    block_product<T>(t.w2, block, shape.s, shape.r, t.grad_out_lanes + block * shape.s * lanes, lanes,
                     {t.grad_mid + block * lanes, shape.l * lanes}, shape, t.scratch);
}

template <class T>
static void first_backward(const FirstBackward& t) {
  const Shape& shape = t.shape;
  const int64_t lanes = padded(t.grad_x.count);
  float* grad_x = aligned(t.scratch);
  for (int64_t block = t.part.begin; block < t.part.end; ++block) {
    block_product<T>(t.w1, block, shape.q, shape.p, t.grad_mid + block * shape.q * lanes, lanes, {grad_x, lanes}, shape,
                     t.scratch);
    unpack_transposed(grad_x, lanes, static_cast<const float*>(nullptr), 1.0f, t.grad_x.count, shape.p,
                      static_cast<T*>(t.grad_x.data) + block * shape.p, t.grad_x.stride);
  }
}

// Rows of one token each, as B operand: one vector and a line longer than they are, so that a column of them does not
// fall on few sets of the cache.
EFFKERN_INLINE int64_t operand_stride(int64_t width) { return padded(width) + 16; }

// grad_w1[j][i] += sum over tokens of grad_mid[j] x[i]
template <class T>
static void first_gradient(const FirstGradient& t) {
  const Shape& shape = t.shape;
  const int64_t lanes = padded(t.x.count), width = padded(shape.p), row = t.part.row_begin;
  const int64_t stride = operand_stride(shape.p);
  float* x = aligned(t.scratch);
  for (int64_t token = 0; token < t.x.count; ++token) {
    const T* source = static_cast<const T*>(t.x.data) + token * t.x.stride + t.part.begin * shape.p;
    for (int64_t i = 0; i < shape.p; i += kLanes) vstore(x + token * stride + i, load_some(source + i, shape.p - i));
  }
  gemm_vector<Fp32Product, true>(t.part.row_end - row, width, t.x.count,
                                 {t.grad_mid + (t.part.begin * shape.q + row) * lanes, lanes, 1}, x, stride,
                                 t.grad_w1 + row * width, width);
}

[[maybe_unused]] static int64_t mid_operand_bytes(const Shape& shape) {
  return shape.l * kTokenTile * operand_stride(shape.r) * static_cast<int64_t>(sizeof(float));
}
// (l, tokens, operand_stride(r))
[[maybe_unused]] static void mid_operand(const Shape& shape, const float* mid, int64_t tokens, void* target) {
  const int64_t lanes = padded(tokens), stride = operand_stride(shape.r);
  for (int64_t of = 0; of < shape.l; ++of) {
    float* rows = static_cast<float*>(target) + of * kTokenTile * stride;
    for (int64_t r = 0; r < shape.r; r += kLanes) {
      const int64_t count = min64(kLanes, shape.r - r);
      for (int64_t token = 0; token < lanes; token += kLanes) {
        Vec block[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          block[i] = i < count ? vload(mid + (of * shape.r + r + i) * lanes + token) : vzero();
        transpose(block);
        for (int64_t i = 0; i < kLanes; ++i) vstore(rows + (token + i) * stride + r, block[i]);
      }
    }
  }
}

static void add_bias_gradient(const SecondGradient& t) {
  const Shape& shape = t.shape;
  const int64_t lanes = padded(t.tokens), step = shape.l_major ? 1 : shape.l;
  float* grad_bias = t.grad_bias + (shape.l_major ? t.part.begin * shape.s : t.part.begin);
  for (int64_t index = t.part.row_begin; index < t.part.row_end; ++index) {
    const float* row = t.grad_out_lanes + (t.part.begin * shape.s + index) * lanes;
    Vec sum = vzero();  // lanes past the last token are zero
    for (int64_t token = 0; token < lanes; token += kLanes) sum = vadd(sum, vload(row + token));
    float parts[kLanes];
    vstore(parts, sum);
    for (int64_t i = 1; i < kLanes; ++i) parts[0] += parts[i];
    grad_bias[index * step] += parts[0];
  }
}

// grad_w2[s][r] += sum over tokens of grad_out[s] mid[r], and the same sum without mid for the bias.
[[maybe_unused]] static void second_gradient(const SecondGradient& t) {
  const Shape& shape = t.shape;
  if (t.grad_bias) add_bias_gradient(t);
  if (!t.grad_w2) return;
  const int64_t lanes = padded(t.tokens), width = padded(shape.r), row = t.part.row_begin;
  const int64_t stride = operand_stride(shape.r);
  const float* mid = static_cast<const float*>(t.mid_operand) + t.part.begin * kTokenTile * stride;
  gemm_vector<Fp32Product, true>(t.part.row_end - row, width, t.tokens,
                                 {t.grad_out_lanes + (t.part.begin * shape.s + row) * lanes, lanes, 1}, mid, stride,
                                 t.grad_w2 + row * width, width);
}

template <class T>
static void store_rows(const float* source, int64_t stride, int64_t rows, int64_t columns, void* target) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < columns; i += kLanes)
      store_some(static_cast<T*>(target) + row * columns + i, load_some(source + row * stride + i, columns - i),
                 columns - i);
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
