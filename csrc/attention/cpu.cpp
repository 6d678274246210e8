// The attention ops on the CPU: checks, allocation, parallel loops. The arithmetic is in the ISA units.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "attention/checks.h"
#include "attention/kernel.h"
#include "attention/tiles.h"
#include "core/cpu/isa.h"
#include "core/parallel.h"
#include "core/trace.h"

namespace effkern::attention {
namespace {

using torch::stable::Device;

// Packed operands of the (sequence, kv head) units in flight. Enough units to feed the threads, few enough that
// what is packed is still in cache when it is read.
constexpr int64_t kPackedBudget = int64_t{32} << 20;

const Kernels& select_kernels(ScalarType dtype) {
  const Isa level = isa_active();
  const Dtype kind = dtype == ScalarType::Float ? Dtype::fp32 : dtype == ScalarType::Half ? Dtype::fp16 : Dtype::bf16;
#if defined(__x86_64__)
  if (kind == Dtype::bf16 && level == Isa::amx) return kernels_amx();
  if (kind == Dtype::bf16 && level == Isa::avx512_bf16) return kernels_avx512_bf16();
  if (level >= Isa::avx512) return kernels_avx512(kind);
  if (level == Isa::avx2) return kernels_avx2(kind);
#endif
  return kernels_scalar(kind);
}

// A byte buffer from torch's allocator, so that profilers and memory limits see it.
struct Buffer {
  Tensor storage;
  char* data = nullptr;

  explicit Buffer(int64_t bytes) {
    if (bytes == 0) return;
    const int64_t size[1] = {bytes + 64};
    storage = torch::stable::empty({size, 1}, ScalarType::Byte);
    const auto address = reinterpret_cast<uintptr_t>(storage.mutable_data_ptr());
    data = reinterpret_cast<char*>((address + 63) / 64 * 64);
  }
};

Tensor empty_like_shape(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, dtype);
}

// Element offsets of one operand: data + batch * batch_stride + head * head_stride + row * row_stride.
struct Operand {
  char* data;
  int64_t batch_stride, head_stride, row_stride, element;

  Operand(const Tensor& t, bool packed)
      : data(static_cast<char*>(t.data_ptr())),
        batch_stride(packed ? 0 : t.stride(0)),
        head_stride(t.stride(packed ? 0 : 1)),
        row_stride(t.stride(packed ? 1 : 2)),
        element(static_cast<int64_t>(t.element_size())) {}

  char* at(int64_t batch, int64_t head, int64_t row) const {
    return data + element * (batch * batch_stride + head * head_stride + row * row_stride);
  }
  Rows rows(int64_t batch, int64_t head, int64_t row) const { return {at(batch, head, row), row_stride}; }
};

// The tile lists of every sequence; a dense batch shares one.
struct Lists {
  std::vector<KeyRunLists> keys;
  std::vector<QueryRunLists> queries;
  std::vector<Window> windows;
  bool shared;

  Lists(const Geometry& g, const std::vector<Sequence>& sequences, bool causal, bool top_left, int64_t query_tile,
        int64_t key_tile, bool backward)
      : shared(!g.packed) {
    for (size_t i = 0; i < (shared ? std::min<size_t>(1, sequences.size()) : sequences.size()); ++i) {
      const Sequence& s = sequences[i];
      windows.push_back({s.keys, top_left ? 0 : s.keys - s.queries, causal});
      keys.push_back(key_run_lists(windows.back(), s.queries, query_tile, key_tile));
      if (backward) queries.push_back(query_run_lists(keys.back(), s.keys, key_tile));
    }
  }
  size_t index(int64_t sequence) const { return shared ? 0 : static_cast<size_t>(sequence); }
};

int64_t listed_keys(const KeyRunLists& list, int64_t tile) {
  int64_t keys = 0;
  for (int64_t i = list.first[tile]; i < list.first[tile + 1]; ++i) keys += list.entries[i].end - list.entries[i].begin;
  return keys;
}

// One (sequence, kv head); `batch` indexes the dense batch axis.
struct Unit {
  int64_t sequence, batch, kv_head;
  const Sequence* range;
};

std::vector<Unit> list_units(const Geometry& g, const std::vector<Sequence>& sequences) {
  std::vector<Unit> units;
  for (size_t s = 0; s < sequences.size(); ++s)
    for (int64_t head = 0; head < g.heads_kv; ++head)
      units.push_back({static_cast<int64_t>(s), g.packed ? 0 : static_cast<int64_t>(s), head, &sequences[s]});
  return units;
}

// Units [begin, end) processed together: at least one per thread, then as many as the budget holds.
template <class Bytes>
size_t block_end(const std::vector<Unit>& units, size_t begin, const Bytes& bytes) {
  int64_t total = 0;
  size_t end = begin;
  while (end < units.size()) {
    total += bytes(units[end]);
    const bool enough_for_threads = end - begin >= static_cast<size_t>(thread_count());
    if (enough_for_threads && total > kPackedBudget) break;
    ++end;
  }
  return end;
}

// Packs the keys of a block of units in parallel, a stretch of kPackStretch keys a task.
void pack_key_block(const Kernels& kernels, const Problem& problem, const std::vector<Unit>& units, size_t begin,
                    size_t end, const Operand& k, const Operand& v, bool backward, char* packed,
                    const std::vector<int64_t>& offsets) {
  constexpr int64_t kPackStretch = 1024;
  static_assert(kPackStretch % 128 == 0, "stretches must end on key tiles");
  std::vector<std::pair<size_t, int64_t>> tasks;
  for (size_t u = begin; u < end; ++u)
    if (kernels.key_bytes(problem, units[u].range->keys, backward) > 0)
      for (int64_t key = 0; key < units[u].range->keys; key += kPackStretch) tasks.emplace_back(u, key);
  parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t task, int64_t) {
    const auto [u, key] = tasks[task];
    const Unit& unit = units[u];
    kernels.pack_keys({problem, k.rows(unit.batch, unit.kv_head, unit.range->key_begin),
                       v.rows(unit.batch, unit.kv_head, unit.range->key_begin), unit.range->keys, key,
                       std::min(key + kPackStretch, unit.range->keys), backward, packed + offsets[u - begin]});
  });
}

std::tuple<Tensor, Tensor> attention_cpu(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                         std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
                                         std::optional<double> scale, bool causal, bool top_left,
                                         std::vector<int64_t> bands, std::vector<int64_t> groups,
                                         std::optional<Tensor> layout, int64_t, std::optional<Tensor> ids,
                                         std::optional<Tensor> visible, std::optional<Tensor> bias, double softcap,
                                         std::optional<Tensor> sink_logits, std::optional<Tensor> alibi_slopes,
                                         double dropout_p, std::optional<Tensor>) {
  EFFKERN_CHECK(bands.empty() && groups.empty() && !layout && !ids && !visible && !bias && softcap == 0 &&
                    !sink_logits && !alibi_slopes && dropout_p == 0,
                "attention: options not implemented yet");
  const Geometry g = check_arguments(q_in, k_in, v_in, cu_seqlens_q, cu_seqlens_k, scale);
  const std::vector<Sequence> sequences = read_sequences(g, cu_seqlens_q, cu_seqlens_k);
  const Kernels& kernels = select_kernels(q_in.scalar_type());
  const Tensor q = unit_last_stride(q_in), k = unit_last_stride(k_in), v = unit_last_stride(v_in);
  Tensor out = empty_like_shape(q, g.output_shape(), q.scalar_type());
  Tensor lse = empty_like_shape(q, g.lse_shape(), ScalarType::Float);
  trace_record(kernels.forward_path);

  const Problem problem{g.head_dim, g.value_dim, static_cast<float>(g.scale)};
  const Operand q_op(q, g.packed), k_op(k, g.packed), v_op(v, g.packed), out_op(out, g.packed);
  float* lse_data = static_cast<float*>(lse.mutable_data_ptr());
  const Lists lists(g, sequences, causal, top_left, kernels.query_tile, kernels.key_tile, false);
  const std::vector<Unit> units = list_units(g, sequences);
  const int64_t group = g.heads_kv ? g.group() : 0;
  const int64_t scratch_bytes = (kernels.forward_scratch_bytes(problem) + 63) / 64 * 64;

  struct Task {
    size_t unit;
    int64_t head, tile, keys;
  };
  for (size_t begin = 0, end; begin < units.size(); begin = end) {
    const auto bytes = [&](const Unit& u) { return (kernels.key_bytes(problem, u.range->keys, false) + 63) / 64 * 64; };
    end = block_end(units, begin, bytes);
    std::vector<int64_t> offsets{0};
    std::vector<Task> tasks;
    for (size_t u = begin; u < end; ++u) {
      offsets.push_back(offsets.back() + bytes(units[u]));
      const KeyRunLists& list = lists.keys[lists.index(units[u].sequence)];
      for (int64_t head = 0; head < group; ++head)
        for (int64_t tile = 0; tile + 1 < static_cast<int64_t>(list.first.size()); ++tile)
          tasks.push_back({u, units[u].kv_head * group + head, tile, listed_keys(list, tile)});
    }
    // Longest first, so that no thread is left with a long tile at the end; coarsely, and the sort is stable, so that
    // tiles of one head stay together and its keys stay in cache.
    std::stable_sort(tasks.begin(), tasks.end(),
                     [](const Task& a, const Task& b) { return a.keys / 1024 > b.keys / 1024; });
    const Buffer packed(offsets.back());
    pack_key_block(kernels, problem, units, begin, end, k_op, v_op, false, packed.data, offsets);

    const int64_t count = static_cast<int64_t>(tasks.size());
    const Buffer scratch(scratch_bytes * slot_count(count));
    parallel_tasks(count, [&](int64_t index, int64_t slot) {
      const Task& task = tasks[index];
      const Unit& unit = units[task.unit];
      const size_t list_index = lists.index(unit.sequence);
      const KeyRunLists& list = lists.keys[list_index];
      const int64_t first = task.tile * kernels.query_tile, row = unit.range->query_begin + first;
      const int64_t lse_offset = (unit.batch * g.heads_q + task.head) * g.queries + row;
      kernels.forward(
          {problem, q_op.rows(unit.batch, task.head, row), std::min(kernels.query_tile, unit.range->queries - first),
           first, lists.windows[list_index], k_op.rows(unit.batch, unit.kv_head, unit.range->key_begin),
           v_op.rows(unit.batch, unit.kv_head, unit.range->key_begin), packed.data + offsets[task.unit - begin],
           list.entries.data() + list.first[task.tile], list.first[task.tile + 1] - list.first[task.tile],
           out_op.at(unit.batch, task.head, row), lse_data + lse_offset, scratch.data + slot * scratch_bytes});
    });
  }
  return {out, lse};
}

void check_backward_arguments(const Geometry& g, const Tensor& q, const Tensor& grad_out,
                              const std::optional<Tensor>& grad_lse, const Tensor& out, const Tensor& lse) {
  const auto check = [&](const char* name, const Tensor& t, const std::vector<int64_t>& shape, ScalarType dtype) {
    bool same = t.dim() == static_cast<int64_t>(shape.size());
    for (int64_t axis = 0; same && axis < t.dim(); ++axis) same = t.size(axis) == shape[axis];
    EFFKERN_CHECK(same, "attention_backward: ", name, " has shape ", shape_string(t), ", which does not match q and v");
    EFFKERN_CHECK(t.scalar_type() == dtype, "attention_backward: ", name, " must be ", dtype_name(dtype), ", got ",
                  dtype_name(t.scalar_type()));
    EFFKERN_CHECK(t.is_cpu(), "attention_backward: ", name, " is on another device than q");
  };
  check("grad_out", grad_out, g.output_shape(), q.scalar_type());
  check("out", out, g.output_shape(), q.scalar_type());
  check("lse", lse, g.lse_shape(), ScalarType::Float);
  if (grad_lse) check("grad_lse", *grad_lse, g.lse_shape(), ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& grad_out_in, std::optional<Tensor> grad_lse_in, const Tensor& q_in, const Tensor& k_in,
    const Tensor& v_in, const Tensor& out_in, const Tensor& lse_in, std::optional<Tensor> cu_seqlens_q,
    std::optional<Tensor> cu_seqlens_k, std::optional<double> scale, bool causal, bool top_left,
    std::vector<int64_t> bands, std::vector<int64_t> groups, std::optional<Tensor> layout, int64_t,
    std::optional<Tensor> ids, std::optional<Tensor> visible, std::optional<Tensor> bias, double softcap,
    std::optional<Tensor> sink_logits, std::optional<Tensor> alibi_slopes, double dropout_p, std::optional<Tensor>,
    bool bias_grad) {
  EFFKERN_CHECK(bands.empty() && groups.empty() && !layout && !ids && !visible && !bias && softcap == 0 &&
                    !sink_logits && !alibi_slopes && dropout_p == 0 && !bias_grad,
                "attention: options not implemented yet");
  const Geometry g = check_arguments(q_in, k_in, v_in, cu_seqlens_q, cu_seqlens_k, scale);
  check_backward_arguments(g, q_in, grad_out_in, grad_lse_in, out_in, lse_in);
  const std::vector<Sequence> sequences = read_sequences(g, cu_seqlens_q, cu_seqlens_k);
  const Kernels& kernels = select_kernels(q_in.scalar_type());
  const Tensor q = unit_last_stride(q_in), k = unit_last_stride(k_in), v = unit_last_stride(v_in);
  const Tensor grad_out = unit_last_stride(grad_out_in), out = unit_last_stride(out_in);
  const Tensor lse = torch::stable::contiguous(lse_in);
  const Tensor grad_lse = grad_lse_in ? torch::stable::contiguous(*grad_lse_in) : lse;  // lse: unused stand-in
  const auto shape = [](const Tensor& t) { return std::vector<int64_t>(t.sizes().begin(), t.sizes().end()); };
  Tensor grad_q = empty_like_shape(q, shape(q), q.scalar_type());
  Tensor grad_k = empty_like_shape(q, shape(k), q.scalar_type());
  Tensor grad_v = empty_like_shape(q, shape(v), q.scalar_type());
  trace_record(kernels.backward_path);

  const Problem problem{g.head_dim, g.value_dim, static_cast<float>(g.scale)};
  const Operand q_op(q, g.packed), k_op(k, g.packed), v_op(v, g.packed), do_op(grad_out, g.packed),
      out_op(out, g.packed), dq_op(grad_q, g.packed), dk_op(grad_k, g.packed), dv_op(grad_v, g.packed);
  const float* lse_data = static_cast<const float*>(lse.const_data_ptr());
  const float* grad_lse_data = grad_lse_in ? static_cast<const float*>(grad_lse.const_data_ptr()) : nullptr;
  const int64_t query_tile = kernels.backward_query_tile, key_tile = kernels.backward_key_tile;
  const Lists lists(g, sequences, causal, top_left, query_tile, key_tile, true);
  const std::vector<Unit> units = list_units(g, sequences);
  const int64_t group = g.heads_kv ? g.group() : 0;
  const int64_t scratch_bytes = (kernels.backward_scratch_bytes(problem) + 63) / 64 * 64;
  const int64_t query_bytes = kernels.query_bytes(problem);

  struct Task {
    size_t unit;
    int64_t tile;
  };
  for (size_t begin = 0, end; begin < units.size(); begin = end) {
    const auto key_bytes = [&](const Unit& u) {
      return (kernels.key_bytes(problem, u.range->keys, true) + 63) / 64 * 64;
    };
    const auto blocks = [&](const Unit& u) { return group * ceil_div(u.range->queries, query_tile); };
    end = block_end(units, begin, [&](const Unit& u) { return key_bytes(u) + blocks(u) * query_bytes; });
    std::vector<int64_t> key_offsets{0}, query_offsets{0};  // bytes; blocks
    std::vector<Task> query_tasks, key_tasks;
    int64_t most_key_tiles = 0;
    for (size_t u = begin; u < end; ++u) {
      key_offsets.push_back(key_offsets.back() + key_bytes(units[u]));
      query_offsets.push_back(query_offsets.back() + blocks(units[u]));
      for (int64_t block = 0; block < blocks(units[u]); ++block) query_tasks.push_back({u, block});
      most_key_tiles = std::max(most_key_tiles, ceil_div(units[u].range->keys, key_tile));
    }
    // Key tiles of different units in turn: neighbours in the queue then add to different query gradients and
    // rarely wait for each other.
    for (int64_t tile = 0; tile < most_key_tiles; ++tile)
      for (size_t u = begin; u < end; ++u)
        if (tile * key_tile < units[u].range->keys) key_tasks.push_back({u, tile});

    const Buffer packed_keys(key_offsets.back()), packed_queries(query_offsets.back() * query_bytes);
    std::vector<int> progress(query_offsets.back(), 0);
    pack_key_block(kernels, problem, units, begin, end, k_op, v_op, true, packed_keys.data, key_offsets);

    parallel_tasks(static_cast<int64_t>(query_tasks.size()), [&](int64_t index, int64_t) {
      const auto [u, block] = query_tasks[index];
      const Unit& unit = units[u];
      const int64_t tiles = ceil_div(unit.range->queries, query_tile), tile = block % tiles;
      const int64_t head = unit.kv_head * group + block / tiles;
      const int64_t first = tile * query_tile, row = unit.range->query_begin + first;
      const int64_t queries = std::min(query_tile, unit.range->queries - first);
      const int64_t lse_offset = (unit.batch * g.heads_q + head) * g.queries + row;
      kernels.pack_queries({problem, q_op.rows(unit.batch, head, row), do_op.rows(unit.batch, head, row),
                            out_op.rows(unit.batch, head, row), lse_data + lse_offset,
                            grad_lse_data ? grad_lse_data + lse_offset : nullptr, queries,
                            packed_queries.data + (query_offsets[u - begin] + block) * query_bytes});
      const KeyRunLists& list = lists.keys[lists.index(unit.sequence)];
      if (list.first[tile] == list.first[tile + 1])  // no key tile will ever write these rows
        std::memset(dq_op.at(unit.batch, head, row), 0, queries * g.head_dim * dq_op.element);
    });

    const int64_t count = static_cast<int64_t>(key_tasks.size());
    const Buffer scratch(scratch_bytes * slot_count(count));
    parallel_tasks(count, [&](int64_t index, int64_t slot) {
      const auto [u, tile] = key_tasks[index];
      const Unit& unit = units[u];
      const size_t list_index = lists.index(unit.sequence);
      const QueryRunLists& visits = lists.queries[list_index];
      const int64_t key_begin = tile * key_tile, head = unit.kv_head * group;
      const int64_t query_begin = unit.range->query_begin, block = query_offsets[u - begin];
      BackwardTile t{};
      t.problem = problem;
      t.k = k_op.rows(unit.batch, unit.kv_head, unit.range->key_begin);
      t.v = v_op.rows(unit.batch, unit.kv_head, unit.range->key_begin);
      t.packed_keys = packed_keys.data + key_offsets[u - begin];
      t.key_begin = key_begin;
      t.keys = std::min(key_tile, unit.range->keys - key_begin);
      t.window = lists.windows[list_index];
      t.runs = visits.entries.data() + visits.first[tile];
      t.run_count = visits.first[tile + 1] - visits.first[tile];
      t.key_runs = lists.keys[list_index].entries.data();
      t.key_runs_first = lists.keys[list_index].first.data();
      t.group = group;
      t.queries = unit.range->queries;
      t.query_tiles = ceil_div(unit.range->queries, query_tile);
      t.packed_queries = packed_queries.data + block * query_bytes;
      t.progress = progress.data() + block;
      t.grad_q = dq_op.at(unit.batch, head, query_begin);
      t.grad_q_head_stride = dq_op.head_stride;
      t.grad_k = dk_op.at(unit.batch, unit.kv_head, unit.range->key_begin + key_begin);
      t.grad_v = dv_op.at(unit.batch, unit.kv_head, unit.range->key_begin + key_begin);
      t.scratch = scratch.data + slot * scratch_bytes;
      kernels.backward(t);
    });
  }
  return {grad_q, grad_k, grad_v, empty_like_shape(q, {0}, ScalarType::Float),
          torch::stable::new_empty(lse, lse.sizes())};
}

}  // namespace
}  // namespace effkern::attention

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("attention", TORCH_BOX(&effkern::attention::attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&effkern::attention::attention_backward_cpu));
}
