// The backward op of attention on the CPU: checks, allocation, parallel loops. The arithmetic is in the ISA units.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <map>
#include <tuple>
#include <utility>

#include "attention/plan.h"
#include "attention/units.h"
#include "core/operands.h"
#include "core/trace.h"

namespace effkern::attention {
namespace {

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

std::vector<int64_t> shape_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// Units whose key tiles one task takes one after the other: those that add to the same gradient of a bias, in their
// own order; without such a gradient every unit is alone.
using Team = std::vector<size_t>;

std::vector<Team> form_teams(const std::vector<Unit>& units, size_t begin, size_t end, const Tensor* grad_bias) {
  std::map<std::pair<int64_t, int64_t>, Team> shared;
  for (size_t u = begin; u < end; ++u) {
    const bool alone = grad_bias == nullptr;
    const int64_t sequence = alone || grad_bias->size(0) > 1 ? units[u].sequence : 0;
    const int64_t head = alone || grad_bias->size(1) > 1 ? units[u].kv_head : 0;
    shared[{sequence, head}].push_back(u);
  }
  std::vector<Team> teams;
  for (auto& entry : shared) teams.push_back(std::move(entry.second));
  return teams;
}

struct Gradients {
  Tensor q, k, v, bias, delta;
};

Gradients backward(const Tensor& grad_out_in, const std::optional<Tensor>& grad_lse_in, const Tensor& q_in,
                   const Tensor& k_in, const Tensor& v_in, const Tensor& out_in, const Tensor& lse_in, const Options& o,
                   bool bias_grad) {
  const Geometry g = check_arguments(q_in, k_in, v_in, o.cu_seqlens_q, o.cu_seqlens_k, o.scale);
  check_backward_arguments(g, q_in, grad_out_in, grad_lse_in, out_in, lse_in);
  const std::vector<Sequence> sequences = read_sequences(g, o.cu_seqlens_q, o.cu_seqlens_k);
  check_options(o, g, sequences, q_in.scalar_type());
  EFFKERN_CHECK(!bias_grad || (o.bias && (o.bias->size(3) > 1 || g.keys <= 1)),
                "attention_backward: bias_grad needs a bias with one column a key");
  const Kernels& kernels = select_kernels(q_in.scalar_type());
  const Tensor q = unit_last_stride(q_in), k = unit_last_stride(k_in), v = unit_last_stride(v_in);
  const Tensor grad_out = unit_last_stride(grad_out_in), out = unit_last_stride(out_in);
  const Tensor lse = as_contiguous(lse_in);
  const Tensor grad_lse = grad_lse_in ? as_contiguous(*grad_lse_in) : lse;  // lse: unused stand-in
  Gradients grads{empty_like_shape(q, shape_of(q), q.scalar_type()), empty_like_shape(q, shape_of(k), q.scalar_type()),
                  empty_like_shape(q, shape_of(v), q.scalar_type()),
                  empty_like_shape(q, bias_grad ? shape_of(*o.bias) : std::vector<int64_t>{0}, ScalarType::Float),
                  empty_like_shape(q, g.lse_shape(), ScalarType::Float)};
  torch::stable::zero_(grads.bias);
  trace_record(kernels.backward_path);

  const Problem problem{g.head_dim, g.value_dim, static_cast<float>(g.scale), o.has_terms()};
  const Operand q_op(q, g.packed), k_op(k, g.packed), v_op(v, g.packed), do_op(grad_out, g.packed),
      out_op(out, g.packed), dq_op(grads.q, g.packed), dk_op(grads.k, g.packed), dv_op(grads.v, g.packed);
  const float* lse_data = static_cast<const float*>(lse.const_data_ptr());
  const float* grad_lse_data = grad_lse_in ? static_cast<const float*>(grad_lse.const_data_ptr()) : nullptr;
  float* delta = static_cast<float*>(grads.delta.mutable_data_ptr());
  const Tiling tiling = choose_tiling(kernels, o, true);
  const int64_t query_tile = tiling.query_tile, key_tile = tiling.keys.cell;
  const MaskPlan plan(g, sequences, o, tiling, true);
  const TermTable terms(o, g, sequences, bias_grad ? &grads.bias : nullptr);
  const std::vector<Unit> units = list_units(g, sequences);
  const int64_t group = g.heads_kv ? g.group() : 0;
  const int64_t scratch_bytes = round_to_line(kernels.backward_scratch_bytes(problem));
  const int64_t query_bytes = kernels.query_bytes(problem, query_tile);
  std::vector<BackwardHead> heads;  // of all units, the heads of a group together
  for (const Unit& unit : units)
    for (int64_t head = unit.kv_head * group; head < (unit.kv_head + 1) * group; ++head) {
      const Variant& variant = plan.at(unit.sequence, head);
      heads.push_back({&variant.mask, terms.at(unit.sequence, head), variant.queries.entries.data(),
                       variant.queries.first.data(), variant.keys.entries.data(), variant.keys.first.data()});
    }

  struct QueryTask {
    size_t unit;
    int64_t block;
  };
  struct KeyTask {
    const Team* team;
    int64_t tile;
  };
  Buffer packed_keys, packed_queries, scratch;
  for (size_t begin = 0, end; begin < units.size(); begin = end) {
    const auto key_bytes = [&](const Unit& u) {
      return round_to_line(kernels.key_bytes(problem, u.range->keys, true));
    };
    const auto blocks = [&](const Unit& u) { return group * ceil_div(u.range->queries, query_tile); };
    end =
        block_end(units, begin, kBackwardBudget, [&](const Unit& u) { return key_bytes(u) + blocks(u) * query_bytes; });
    std::vector<int64_t> key_offsets{0}, query_offsets{0};  // bytes; blocks
    std::vector<QueryTask> query_tasks;
    int64_t most_key_tiles = 0;
    for (size_t u = begin; u < end; ++u) {
      key_offsets.push_back(key_offsets.back() + key_bytes(units[u]));
      query_offsets.push_back(query_offsets.back() + blocks(units[u]));
      for (int64_t block = 0; block < blocks(units[u]); ++block) query_tasks.push_back({u, block});
      most_key_tiles = std::max(most_key_tiles, ceil_div(units[u].range->keys, key_tile));
    }
    // Key tiles of different teams in turn: neighbours in the queue then add to different query gradients and rarely
    // wait for each other.
    const std::vector<Team> teams = form_teams(units, begin, end, bias_grad ? &grads.bias : nullptr);
    std::vector<KeyTask> key_tasks;
    for (int64_t tile = 0; tile < most_key_tiles; ++tile)
      for (const Team& team : teams) key_tasks.push_back({&team, tile});

    packed_keys.reserve(key_offsets.back());
    packed_queries.reserve(query_offsets.back() * query_bytes);
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
                            grad_lse_data ? grad_lse_data + lse_offset : nullptr, queries, query_tile,
                            delta + lse_offset,
                            packed_queries.data + (query_offsets[u - begin] + block) * query_bytes});
      const std::vector<int64_t>& visits = plan.at(unit.sequence, head).keys.first;
      if (visits[tile] == visits[tile + 1])  // no key tile will ever write these rows
        std::memset(dq_op.at(unit.batch, head, row), 0, queries * g.head_dim * dq_op.element);
    });

    const int64_t count = static_cast<int64_t>(key_tasks.size());
    scratch.reserve(scratch_bytes * slot_count(count));
    parallel_tasks(count, [&](int64_t index, int64_t slot) {
      const auto [team, tile] = key_tasks[index];
      for (size_t u : *team) {
        const Unit& unit = units[u];
        const int64_t key_begin = tile * key_tile, head = unit.kv_head * group;
        if (key_begin >= unit.range->keys) continue;
        const int64_t key_row = unit.range->key_begin + key_begin, block = query_offsets[u - begin];
        BackwardTile t{};
        t.problem = problem;
        t.k = k_op.rows(unit.batch, unit.kv_head, unit.range->key_begin);
        t.v = v_op.rows(unit.batch, unit.kv_head, unit.range->key_begin);
        t.packed_keys = packed_keys.data + key_offsets[u - begin];
        t.all_keys = unit.range->keys;
        t.key_begin = key_begin;
        t.keys = std::min(key_tile, unit.range->keys - key_begin);
        t.query_tile = query_tile;
        t.key_tile = key_tile;
        t.heads = heads.data() + u * group;
        t.group = group;
        t.queries = unit.range->queries;
        t.query_tiles = ceil_div(unit.range->queries, query_tile);
        t.packed_queries = packed_queries.data + block * query_bytes;
        t.progress = progress.data() + block;
        t.grad_q = dq_op.at(unit.batch, head, unit.range->query_begin);
        t.grad_q_head_stride = dq_op.head_stride;
        t.grad_k = dk_op.at(unit.batch, unit.kv_head, key_row);
        t.grad_v = dv_op.at(unit.batch, unit.kv_head, key_row);
        t.scratch = scratch.data + slot * scratch_bytes;
        kernels.backward(t);
      }
    });
  }
  return grads;
}

// Arguments in the order of the schema.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& grad_out, std::optional<Tensor> grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
    std::optional<double> scale, bool causal, bool top_left, std::optional<std::vector<int64_t>> bands,
    std::optional<std::vector<int64_t>> groups, std::optional<Tensor> layout, int64_t block, std::optional<Tensor> ids,
    std::optional<Tensor> visible, std::optional<Tensor> bias, double softcap, std::optional<Tensor> sink_logits,
    std::optional<Tensor> alibi_slopes, double dropout_p, std::optional<Tensor> dropout_seed, bool bias_grad) {
  Gradients grads = backward(grad_out, grad_lse, q, k, v, out, lse,
                             {std::move(cu_seqlens_q), std::move(cu_seqlens_k), scale, causal, top_left,
                              bands.value_or(std::vector<int64_t>{}), groups.value_or(std::vector<int64_t>{}),
                              std::move(layout), block, std::move(ids), std::move(visible), std::move(bias), softcap,
                              std::move(sink_logits), std::move(alibi_slopes), dropout_p, std::move(dropout_seed)},
                             bias_grad);
  return {grads.q, grads.k, grads.v, grads.bias, grads.delta};
}

}  // namespace
}  // namespace effkern::attention

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("attention_backward", TORCH_BOX(&effkern::attention::attention_backward_cpu));
}
