// The attention op on the CPU: checks, allocation, parallel loop. The arithmetic is in the ISA units.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "attention/plan.h"
#include "attention/units.h"
#include "core/trace.h"

namespace effkern::attention {
namespace {

// A query tile of one head.
struct Task {
  size_t unit;
  int64_t head, tile, keys;
  const Variant* variant;
};

int64_t listed_keys(const KeyRunLists& list, int64_t tile) {
  int64_t keys = 0;
  for (int64_t i = list.first[tile]; i < list.first[tile + 1]; ++i) keys += list.entries[i].end - list.entries[i].begin;
  return keys;
}

std::tuple<Tensor, Tensor> forward(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Options& o) {
  const Geometry g = check_arguments(q_in, k_in, v_in, o.cu_seqlens_q, o.cu_seqlens_k, o.scale);
  const std::vector<Sequence> sequences = read_sequences(g, o.cu_seqlens_q, o.cu_seqlens_k);
  check_options(o, g, sequences, q_in.scalar_type());
  const Kernels& kernels = select_kernels(q_in.scalar_type());
  const Tensor q = unit_last_stride(q_in), k = unit_last_stride(k_in), v = unit_last_stride(v_in);
  Tensor out = empty_like_shape(q, g.output_shape(), q.scalar_type());
  Tensor lse = empty_like_shape(q, g.lse_shape(), ScalarType::Float);
  trace_record(kernels.forward_path);

  const Problem problem{g.head_dim, g.value_dim, static_cast<float>(g.scale), o.has_terms()};
  const Operand q_op(q, g.packed), k_op(k, g.packed), v_op(v, g.packed), out_op(out, g.packed);
  float* lse_data = static_cast<float*>(lse.mutable_data_ptr());
  const Tiling tiling = choose_tiling(kernels, o, false);
  const MaskPlan plan(g, sequences, o, tiling, false);
  const TermTable terms(o, g, sequences, nullptr);
  const std::vector<Unit> units = list_units(g, sequences);
  const int64_t group = g.heads_kv ? g.group() : 0;
  const int64_t scratch_bytes = round_to_line(kernels.forward_scratch_bytes(problem));

  Buffer packed, scratch;
  for (size_t begin = 0, end; begin < units.size(); begin = end) {
    const auto bytes = [&](const Unit& u) { return round_to_line(kernels.key_bytes(problem, u.range->keys, false)); };
    end = block_end(units, begin, kForwardBudget, bytes);
    std::vector<int64_t> offsets{0};
    std::vector<Task> tasks;
    for (size_t u = begin; u < end; ++u) {
      offsets.push_back(offsets.back() + bytes(units[u]));
      for (int64_t head = units[u].kv_head * group; head < (units[u].kv_head + 1) * group; ++head) {
        const Variant& variant = plan.at(units[u].sequence, head);
        for (int64_t tile = 0; tile + 1 < static_cast<int64_t>(variant.keys.first.size()); ++tile)
          tasks.push_back({u, head, tile, listed_keys(variant.keys, tile), &variant});
      }
    }
    // Longest first, so that no thread is left with a long tile at the end; coarsely, and the sort is stable, so that
    // tiles of one head stay together and its keys stay in cache.
    std::stable_sort(tasks.begin(), tasks.end(),
                     [](const Task& a, const Task& b) { return a.keys / 1024 > b.keys / 1024; });
    packed.reserve(offsets.back());
    pack_key_block(kernels, problem, units, begin, end, k_op, v_op, false, packed.data, offsets);

    const int64_t count = static_cast<int64_t>(tasks.size());
    scratch.reserve(scratch_bytes * slot_count(count));
    parallel_tasks(count, [&](int64_t index, int64_t slot) {
      const Task& task = tasks[index];
      const Unit& unit = units[task.unit];
      const KeyRunLists& list = task.variant->keys;
      const int64_t first = task.tile * tiling.query_tile, row = unit.range->query_begin + first;
      const int64_t lse_offset = (unit.batch * g.heads_q + task.head) * g.queries + row;
      kernels.forward({problem, q_op.rows(unit.batch, task.head, row),
                       std::min(tiling.query_tile, unit.range->queries - first), first, &task.variant->mask,
                       terms.at(unit.sequence, task.head), k_op.rows(unit.batch, unit.kv_head, unit.range->key_begin),
                       v_op.rows(unit.batch, unit.kv_head, unit.range->key_begin),
                       packed.data + offsets[task.unit - begin], list.entries.data() + list.first[task.tile],
                       list.first[task.tile + 1] - list.first[task.tile], out_op.at(unit.batch, task.head, row),
                       lse_data + lse_offset, scratch.data + slot * scratch_bytes});
    });
  }
  return {out, lse};
}

// Arguments in the order of the schema.
std::tuple<Tensor, Tensor> attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                         std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
                                         std::optional<double> scale, bool causal, bool top_left,
                                         std::optional<std::vector<int64_t>> bands,
                                         std::optional<std::vector<int64_t>> groups, std::optional<Tensor> layout,
                                         int64_t block, std::optional<Tensor> ids, std::optional<Tensor> visible,
                                         std::optional<Tensor> bias, double softcap, std::optional<Tensor> sink_logits,
                                         std::optional<Tensor> alibi_slopes, double dropout_p,
                                         std::optional<Tensor> dropout_seed) {
  return forward(q, k, v,
                 {std::move(cu_seqlens_q), std::move(cu_seqlens_k), scale, causal, top_left,
                  bands.value_or(std::vector<int64_t>{}), groups.value_or(std::vector<int64_t>{}), std::move(layout),
                  block, std::move(ids), std::move(visible), std::move(bias), softcap, std::move(sink_logits),
                  std::move(alibi_slopes), dropout_p, std::move(dropout_seed)});
}

}  // namespace
}  // namespace effkern::attention

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) { m.impl("attention", TORCH_BOX(&effkern::attention::attention_cpu)); }
