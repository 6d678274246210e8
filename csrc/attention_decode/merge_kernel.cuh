// The parts of a row come together: a block of four warps a row, each warp a quarter of the parts, in a fixed order.
//
// Status: unverified. No GPU has run it yet; a software model of a thread block has (tests/cuda_host).
#pragma once

#include "attention_decode/rows_kernel.cuh"

namespace effkern::attention_decode {

EFFKERN_DEVICE float warp_max(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = fmaxf(value, cuda::shuffle_xor(value, mask));
  return value;
}

EFFKERN_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += cuda::shuffle_xor(value, mask);
  return value;
}

template <class Element>
EFFKERN_DEVICE void attention_decode_merge(const SplitParams& p, uint32_t shared) {
  using cuda::Vector16;
  const int line = cuda::block_index(), unit = line / p.rows(), row = line - unit * p.rows();
  const int batch = unit / p.kv_heads, kv_head = unit - batch * p.kv_heads;
  const int lane = cuda::thread_index() % 32, warp = cuda::thread_index() / 32;
  const int length = clamped_length(p.lengths[batch], p.capacity);
  const int tiles = tile_walk(visible_keys(length, p.queries, p.bands)).count;
  const int parts = parts_of(tiles, p.splits, p.warps).used();
  const int64_t first = int64_t{unit} * p.splits * p.rows() + row;
  const auto top_of = [&](int part) { return p.tops + (first + int64_t{part} * p.rows()) * 2; };

  float top = -INFINITY;
  for (int part = lane; part < parts; part += 32) top = fmaxf(top, top_of(part)[0]);
  top = warp_max(top);
  const float origin = top == -INFINITY ? 0.f : top;
  float total = 0.f;
  for (int part = lane; part < parts; part += 32) total += cuda::exp2_fast(top_of(part)[0] - origin) * top_of(part)[1];
  total = warp_sum(total);

  const int quarter = (parts + MergeShape::kWarps - 1) / MergeShape::kWarps;
  const int begin = warp * quarter, end = begin + quarter < parts ? begin + quarter : parts;
  for (int column = lane * 4; column < p.value_dim; column += 128) {
    float sums[4] = {};
#pragma unroll 4
    for (int part = begin; part < end; ++part) {
      const float share = cuda::exp2_fast(top_of(part)[0] - origin);
      const float* values = p.values + (first + int64_t{part} * p.rows()) * p.value_dim + column;
      const Vector16 four = *reinterpret_cast<const Vector16*>(values);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] += share * std::bit_cast<float>(four.words[i]);
    }
    Vector16 four;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.words[i] = std::bit_cast<uint32_t>(sums[i]);
    cuda::store_shared(shared + (warp * Features::kMaxDim + column) * 4, four);
  }
  cuda::sync_block();

  const Finish finished = finish(top, total, sink_of<Element>(p, kv_head * p.group + p.query_divisor.divide(row)));
  if (cuda::thread_index() == 0) p.lse[line] = finished.lse;
  for (int column = cuda::thread_index() * 8; column < p.value_dim; column += MergeShape::kThreads * 8) {
    float sums[8] = {};
#pragma unroll
    for (int from = 0; from < MergeShape::kWarps; ++from)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Vector16 four = cuda::load_shared(shared + (from * Features::kMaxDim + column + half * 4) * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[half * 4 + i] += std::bit_cast<float>(four.words[i]);
      }
    Vector16 packed;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      packed.words[i] = cuda::pack(sums[2 * i] * finished.factor, sums[2 * i + 1] * finished.factor, Element{});
    cuda::store_global(p.out + int64_t{line} * p.value_dim + column, packed);
  }
}

}  // namespace effkern::attention_decode
