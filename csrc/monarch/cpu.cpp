// Forward ops of the Monarch family on the CPU: allocation and parallel loops. The arithmetic is in the ISA units.
#include "core/trace.h"
#include "monarch/operands.h"

namespace effkern::monarch {
namespace {

constexpr int64_t kTogether = 16;  // blocks whose outputs share cache lines

// Runs body(tile, part, slot) over a factor for tiles [begin, end): groups of blocks, and where those are few, slices
// of their rows. Tiles are the fastest index, so that a slice of the factor is in the cache for all tiles but the
// first.
template <class Body>
void for_parts(int64_t begin, int64_t end, int64_t blocks, int64_t group, int64_t rows, const Body& body) {
  const int64_t tiles = end - begin, groups = (blocks + group - 1) / group, wanted = 4 * thread_count();
  const int64_t least = (wanted + tiles * groups - 1) / (tiles * groups);
  const int64_t step = std::max<int64_t>(32, (rows / least + 15) / 16 * 16), slices = (rows + step - 1) / step;
  parallel_tasks(tiles * groups * slices, [&](int64_t task, int64_t slot) {
    const int64_t slice = task / tiles % slices * step, block = task / tiles / slices * group;
    body(begin + task % tiles, Part{block, std::min(block + group, blocks), slice, std::min(slice + step, rows)}, slot);
  });
}

Tensor monarch_cpu(const Tensor& x_in, const Tensor& w1_in, const Tensor& w2_in, std::optional<Tensor> bias_in,
                   bool l_major) {
  Shape shape = check_monarch(x_in, w1_in, w2_in, bias_in);
  shape.l_major = l_major;
  const Kernels& kernels = select_kernels(x_in.scalar_type());
  Tensor out = new_rows(x_in, shape.l * shape.s);
  trace_record(kernels.paths[kMatmul]);
  const Tensor x = as_rows(x_in), out_rows = as_rows(out);
  // Factors that fit a cache beside it: a whole tile passes both in the cache of its thread. Larger ones are read once
  // for a chunk of tiles, whose middle is small enough to stay in the last-level cache. And where all tokens are no
  // more than that, the blocks of the factors share out better among the threads than whole tiles do.
  constexpr int64_t kMiddle = 5 << 19;  // 2.5 MiB
  const int64_t threads = thread_count(), tile = kernels.token_tile;
  const int64_t tile_bytes = tile * shape.k * shape.q * int64_t{sizeof(float)};
  const int64_t factor_bytes = (w1_in.numel() + w2_in.numel()) * int64_t{sizeof(float)};
  const int64_t per_chunk = std::max(int64_t{1}, kMiddle / tile_bytes);
  const bool whole = threads == 1 || (factor_bytes <= kSmallFactors && x.size(0) > per_chunk * tile);
  const Tiles tiles(x, kernels, whole && x.size(0) < 8 * threads * tile ? threads : 0);
  if (tiles.tokens == 0) return out;
  shape.few = tiles.tokens <= kernels.few_tokens;
  const bool often = tiles.count >= kOften;
  const Factor w1(w1_in, kernels, often, false, !shape.few), w2(w2_in, kernels, often, false, !shape.few);
  std::optional<Bias> bias;
  if (bias_in) bias.emplace(*bias_in, kernels);

  const int64_t scratch_bytes = round_to_line(kernels.scratch_bytes(shape));
  const int64_t mid_bytes = tiles.bytes(shape.k * shape.q);
  Buffer mid, scratch;
  mid.reserve(mid_bytes * (whole ? slot_count(tiles.count) : std::min(per_chunk, tiles.count)));
  scratch.reserve(scratch_bytes * thread_count());
  const auto first = [&](int64_t tile, const Part& part, int64_t slot) {
    kernels.first_stage({shape, tiles.of(x, tile), w1.weights, part,
                         floats(mid, (whole ? slot : tile % per_chunk) * mid_bytes),
                         scratch.data + slot * scratch_bytes});
  };
  const auto second = [&](int64_t tile, const Part& part, int64_t slot) {
    kernels.second_stage({shape, floats(mid, (whole ? slot : tile % per_chunk) * mid_bytes), w2.weights,
                          bias ? bias->data : nullptr, part, tiles.of(out_rows, tile),
                          scratch.data + slot * scratch_bytes});
  };
  if (whole) {
    parallel_tasks(tiles.count, [&](int64_t tile, int64_t slot) {
      first(tile, {0, shape.k, 0, shape.q}, slot);
      second(tile, {0, shape.l, 0, shape.s}, slot);
    });
  } else {
    for (int64_t begin = 0; begin < tiles.count; begin += per_chunk) {
      const int64_t end = std::min(begin + per_chunk, tiles.count);
      for_parts(begin, end, shape.k, 1, shape.q, first);
      for_parts(begin, end, shape.l, l_major ? 1 : kTogether, shape.s, second);
    }
  }
  return out;
}

Tensor block_diag_cpu(const Tensor& x_in, const Tensor& w_in) {
  Shape shape = check_block_diag(x_in, w_in);
  const Kernels& kernels = select_kernels(x_in.scalar_type());
  Tensor out = new_rows(x_in, shape.k * shape.q);
  trace_record(kernels.paths[kBlockDiag]);
  const Tensor x = as_rows(x_in), out_rows = as_rows(out);
  const Tiles tiles(x, kernels);
  if (tiles.tokens == 0) return out;
  shape.few = tiles.tokens <= kernels.few_tokens;
  const Factor w(w_in, kernels, tiles.count >= kOften, false, !shape.few);
  const int64_t scratch_bytes = round_to_line(kernels.scratch_bytes(shape));
  const int64_t mid_bytes = tiles.bytes(shape.k * shape.q);
  Buffer mid, scratch;
  mid.reserve(mid_bytes * thread_count());
  scratch.reserve(scratch_bytes * thread_count());
  for_parts(0, tiles.count, shape.k, 1, shape.q, [&](int64_t tile, const Part& part, int64_t slot) {
    float* room = floats(mid, slot * mid_bytes);
    kernels.first_stage({shape, tiles.of(x, tile), w.weights, part, room, scratch.data + slot * scratch_bytes});
    kernels.unpack_mid(shape, room, part, tiles.of(out_rows, tile));
  });
  return out;
}

}  // namespace
}  // namespace effkern::monarch

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("monarch_matmul", TORCH_BOX(&effkern::monarch::monarch_cpu));
  m.impl("block_diag_matmul", TORCH_BOX(&effkern::monarch::block_diag_cpu));
}
