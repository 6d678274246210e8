// Backward ops of the Monarch family on the CPU.
//
// Tokens go in chunks of tiles: what a tile needs is made transposed, tile by tile, then every block of a factor adds
// the tiles to its gradient in their order. So sums depend neither on the chunk nor on the number of threads, and the
// middle, computed again, is never there for more than a chunk.
#include <tuple>

#include "core/trace.h"
#include "monarch/operands.h"

namespace effkern::monarch {
namespace {

int64_t chunk_tiles() { return std::max<int64_t>(8, 4 * thread_count()); }

// Slices of rows for the gradient of a factor: the sums of one stay in L2 while the tiles of a chunk are added to them,
// and there are enough of them for every thread.
struct Slices {
  int64_t blocks, rows, step, count;

  Slices(bool wanted, int64_t blocks, int64_t rows, int64_t columns) : blocks(wanted ? blocks : 0), rows(rows) {
    constexpr int64_t kSums = 1 << 16;  // 256 KiB
    const int64_t share = (rows * blocks + 4 * thread_count() - 1) / (4 * thread_count());
    step = std::max<int64_t>(32, std::min(kSums / columns, share) / 16 * 16);
    count = (rows + step - 1) / step;
  }
  int64_t tasks() const { return blocks * count; }
  Part part(int64_t task) const {
    const int64_t block = task / count, begin = task % count * step;
    return {block, block + 1, begin, std::min(begin + step, rows)};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> monarch_backward_cpu(const Tensor& grad_out_in, const Tensor& x_in,
                                                                const Tensor& w1_in, const Tensor& w2_in, bool l_major,
                                                                bool need_x, bool need_w1, bool need_w2,
                                                                bool need_bias) {
  Shape shape = check_monarch(x_in, w1_in, w2_in, std::nullopt);
  shape.l_major = l_major;
  const int64_t outputs = shape.l * shape.s, bias_size[1] = {need_bias ? outputs : 0};
  check_grad_out("monarch_matmul_backward", grad_out_in, x_in, outputs);
  const Kernels& kernels = select_kernels(x_in.scalar_type());
  Tensor grad_x = new_gradient(need_x, x_in), grad_w1 = new_gradient(need_w1, w1_in);
  Tensor grad_w2 = new_gradient(need_w2, w2_in), grad_bias = torch::stable::new_empty(x_in, {bias_size, 1});
  trace_record(kernels.paths[kMatmulBackward]);
  const Tensor x = as_rows(x_in), grad_out = as_rows(grad_out_in);
  const Tensor grad_x_rows = need_x ? as_rows(grad_x) : grad_x;
  const Tiles tiles(x, kernels);
  const bool often = tiles.count >= kOften, transposes = kernels.transposes;
  std::optional<Factor> w1, w1_back, w2_back;
  if (need_w2 || (need_x && !transposes)) w1.emplace(w1_in, kernels, often);
  if (need_x && transposes) w1_back.emplace(w1_in, kernels, often, true);
  if (need_x || need_w1) w2_back.emplace(w2_in, kernels, often, transposes);
  const Sums sums1(need_w1, grad_w1, w1_in, kernels), sums2(need_w2, grad_w2, w2_in, kernels);
  std::vector<float> bias_sums(need_bias ? outputs : 0, 0.0f);

  const int64_t chunk = chunk_tiles(), in_flight = std::min(chunk, tiles.count);
  const int64_t mid_bytes = tiles.bytes(shape.k * shape.q), out_bytes = tiles.bytes(outputs);
  const int64_t scratch_bytes = round_to_line(kernels.scratch_bytes(shape));
  Buffer mid, operands, grad_mid, grad_lanes, scratch;
  const bool small = (w1_in.numel() + w2_in.numel()) * int64_t{sizeof(float)} <= kSmallFactors;
  const int64_t operand_bytes = round_to_line(kernels.mid_operand_bytes(shape));
  mid.reserve(need_w2 ? mid_bytes * in_flight : 0);
  operands.reserve(need_w2 ? operand_bytes * in_flight : 0);
  grad_mid.reserve(mid_bytes * in_flight);
  grad_lanes.reserve(out_bytes * in_flight);
  scratch.reserve(scratch_bytes * thread_count());
  const Slices slices1(need_w1, shape.k, shape.q, shape.p), slices2(need_w2 || need_bias, shape.l, shape.s, shape.r);
  for (int64_t begin = 0; begin < tiles.count; begin += chunk) {
    const int64_t here = std::min(chunk, tiles.count - begin);
    const auto blocks = [](int64_t from, int64_t to, int64_t rows) { return Part{from, to, 0, rows}; };
    const auto pack = [&](int64_t i) {
      kernels.pack(tiles.of(grad_out, begin + i), l_major ? 1 : shape.l, l_major ? outputs : shape.s,
                   floats(grad_lanes, i * out_bytes));
    };
    const auto middle = [&](int64_t i, int64_t from, int64_t to, void* room) {
      kernels.first_stage(
          {shape, tiles.of(x, begin + i), w1->weights, blocks(from, to, shape.q), floats(mid, i * mid_bytes), room});
    };
    const auto operand = [&](int64_t i) {
      kernels.mid_operand(shape, floats(mid, i * mid_bytes), tiles.of(x, begin + i).count,
                          operands.data + i * operand_bytes);
    };
    const auto second = [&](int64_t i, int64_t from, int64_t to, void* room) {
      kernels.second_backward({shape, tiles.of(x, begin + i).count, floats(grad_lanes, i * out_bytes), w2_back->weights,
                               blocks(from, to, shape.s), floats(grad_mid, i * mid_bytes), room});
    };
    const auto first = [&](int64_t i, int64_t from, int64_t to, void* room) {
      kernels.first_backward({shape, floats(grad_mid, i * mid_bytes), (transposes ? w1_back : w1)->weights,
                              blocks(from, to, shape.q), tiles.of(grad_x_rows, begin + i), room});
    };
    const bool need_mid = need_x || need_w1;
    if (small) {
      parallel_tasks(here, [&](int64_t i, int64_t slot) {
        void* room = scratch.data + slot * scratch_bytes;
        if (need_w2) middle(i, 0, shape.k, room);
        if (need_w2) operand(i);
        pack(i);
        if (need_mid) second(i, 0, shape.l, room);
        if (need_x) first(i, 0, shape.k, room);
      });
    } else {
      // Block by block, and all tiles of the chunk for each: the factors come from memory once.
      const auto each = [&](bool wanted, int64_t count, const auto& body) {
        parallel_tasks(wanted ? count * here : 0, [&](int64_t task, int64_t slot) {
          body(task % here, task / here, task / here + 1, scratch.data + slot * scratch_bytes);
        });
      };
      each(need_w2, shape.k, middle);
      parallel_tasks(here, [&](int64_t i, int64_t) {
        if (need_w2) operand(i);
        pack(i);
      });
      each(need_mid, shape.l, second);
      each(need_x, shape.k, first);
    }
    parallel_tasks(slices1.tasks() + slices2.tasks(), [&](int64_t task, int64_t slot) {
      void* room = scratch.data + slot * scratch_bytes;
      const bool of_first = task < slices1.tasks();
      const Part part = of_first ? slices1.part(task) : slices2.part(task - slices1.tasks());
      for (int64_t i = 0; i < here; ++i) {
        const Tokens rows = tiles.of(x, begin + i);
        if (of_first)
          kernels.first_gradient({shape, rows, floats(grad_mid, i * mid_bytes), part, sums1.block(part.begin), room});
        else
          kernels.second_gradient({shape, rows.count, need_w2 ? operands.data + i * operand_bytes : nullptr,
                                   floats(grad_lanes, i * out_bytes), part, sums2.block(part.begin),
                                   need_bias ? bias_sums.data() : nullptr, room});
      }
    });
  }
  if (need_w1) sums1.store(kernels, grad_w1);
  if (need_w2) sums2.store(kernels, grad_w2);
  if (need_bias) kernels.store(bias_sums.data(), outputs, 1, outputs, grad_bias.mutable_data_ptr());
  return {grad_x, grad_w1, grad_w2, grad_bias};
}

std::tuple<Tensor, Tensor> block_diag_backward_cpu(const Tensor& grad_out_in, const Tensor& x_in, const Tensor& w_in,
                                                   bool need_x, bool need_w) {
  const Shape shape = check_block_diag(x_in, w_in);
  check_grad_out("block_diag_matmul_backward", grad_out_in, x_in, shape.k * shape.q);
  const Kernels& kernels = select_kernels(x_in.scalar_type());
  Tensor grad_x = new_gradient(need_x, x_in), grad_w = new_gradient(need_w, w_in);
  trace_record(kernels.paths[kBlockDiagBackward]);
  const Tensor x = as_rows(x_in), grad_out = as_rows(grad_out_in);
  const Tensor grad_x_rows = need_x ? as_rows(grad_x) : grad_x;
  const Tiles tiles(x, kernels);
  const Factor w(w_in, kernels, tiles.count >= kOften, kernels.transposes, need_x);
  const Sums sums(need_w, grad_w, w_in, kernels);
  const Slices slices(need_w, shape.k, shape.q, shape.p);
  const int64_t chunk = chunk_tiles(), in_flight = std::min(chunk, tiles.count);
  const int64_t mid_bytes = tiles.bytes(shape.k * shape.q);
  const int64_t scratch_bytes = round_to_line(kernels.scratch_bytes(shape));
  Buffer grad_mid, scratch;
  grad_mid.reserve(mid_bytes * in_flight);
  scratch.reserve(scratch_bytes * thread_count());
  for (int64_t begin = 0; begin < tiles.count; begin += chunk) {
    const int64_t here = std::min(chunk, tiles.count - begin);
    parallel_tasks(here, [&](int64_t i, int64_t slot) {
      float* grad = floats(grad_mid, i * mid_bytes);
      kernels.pack(tiles.of(grad_out, begin + i), 1, shape.k * shape.q, grad);
      if (need_x)
        kernels.first_backward({shape, grad, w.weights, Part{0, shape.k, 0, shape.q}, tiles.of(grad_x_rows, begin + i),
                                scratch.data + slot * scratch_bytes});
    });
    if (!need_w) continue;
    parallel_tasks(slices.tasks(), [&](int64_t task, int64_t slot) {
      const Part part = slices.part(task);
      for (int64_t i = 0; i < here; ++i)
        kernels.first_gradient({shape, tiles.of(x, begin + i), floats(grad_mid, i * mid_bytes), part,
                                sums.block(part.begin), scratch.data + slot * scratch_bytes});
    });
  }
  if (need_w) sums.store(kernels, grad_w);
  return {grad_x, grad_w};
}

}  // namespace
}  // namespace effkern::monarch

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("monarch_matmul_backward", TORCH_BOX(&effkern::monarch::monarch_backward_cpu));
  m.impl("block_diag_matmul_backward", TORCH_BOX(&effkern::monarch::block_diag_backward_cpu));
}
