// What a call of attention carries beside q, k and v: its checks, and its tables as plain pointers and strides.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "attention/checks.h"
#include "attention/mask.h"

namespace effkern::attention {

// As the schema has them (csrc/library.cpp); effkern/masks.py says what the mask terms mean.
struct Options {
  std::optional<Tensor> cu_seqlens_q, cu_seqlens_k;
  std::optional<double> scale;
  bool causal, top_left;
  std::vector<int64_t> bands, groups;
  std::optional<Tensor> layout;
  int64_t block;
  std::optional<Tensor> ids, visible, bias;
  double softcap;
  std::optional<Tensor> sink_logits, alibi_slopes;
  double dropout_p;
  std::optional<Tensor> dropout_seed;

  bool has_terms() const { return bias || softcap != 0.0 || alibi_slopes || dropout_p != 0.0; }
};

// A table over (batch, head, row, column); broadcast axes have stride 0, columns are adjacent or broadcast. The batch
// axis counts sequences where the call is packed.
struct Table {
  std::optional<Tensor> storage;  // a default tensor would cost an allocation
  const char* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 0, element = 1;

  explicit Table(const std::optional<Tensor>& t) : storage(t) {
    if (!t) return;
    const auto stride = [&](int64_t axis) { return storage->size(axis) == 1 ? 0 : storage->stride(axis); };
    if (stride(3) > 1) storage = torch::stable::contiguous(*t);
    data = static_cast<const char*>(storage->const_data_ptr());
    element = static_cast<int64_t>(storage->element_size());
    batch = stride(0);
    head = stride(1);
    row = stride(2);
    column = stride(3);
  }
  const char* at(int64_t sequence, int64_t query_head) const {
    return data ? data + element * (sequence * batch + query_head * head) : nullptr;
  }
};

struct Extent {
  int64_t sequences, queries, keys;  // of the longest sequence
};

inline Extent longest(const std::vector<Sequence>& sequences) {
  Extent extent{static_cast<int64_t>(sequences.size()), 0, 0};
  for (const Sequence& s : sequences) {
    extent.queries = std::max(extent.queries, s.queries);
    extent.keys = std::max(extent.keys, s.keys);
  }
  return extent;
}

// Each axis is 1 or what the call has. The last two may be longer in a packed call, whose sequences have many lengths,
// and in a layout, which may come from two with different blocks.
inline void check_table(const char* name, const Tensor& t, const Geometry& g, const Extent& extent, int64_t rows,
                        int64_t columns, bool broadcast_rows) {
  const int64_t expected[4] = {extent.sequences, g.heads_q, rows, columns};
  bool fits = t.dim() == 4;
  for (int64_t axis = 0; fits && axis < 4; ++axis) {
    const bool longer = (g.packed || !broadcast_rows) && axis >= 2 && t.size(axis) >= expected[axis];
    const bool one = t.size(axis) == 1 && (axis < 2 || broadcast_rows);
    fits = one || t.size(axis) == expected[axis] || longer;
  }
  EFFKERN_CHECK(fits, "attention: ", name, " has shape ", shape_string(t), ", which does not broadcast to (",
                expected[0], ", ", expected[1], ", ", expected[2], ", ", expected[3], ")");
  EFFKERN_CHECK(t.is_cpu(), "attention: ", name, " is on another device than q");
}

inline void check_per_head(const char* name, const Tensor& t, const Geometry& g, ScalarType dtype) {
  EFFKERN_CHECK(t.dim() == 1 && t.size(0) == g.heads_q, "attention: ", name, " must have shape (", g.heads_q,
                ",), one number a query head, got ", shape_string(t));
  EFFKERN_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == dtype, "attention: ", name,
                " must be float32 or q's ", dtype_name(dtype), ", got ", dtype_name(t.scalar_type()));
  EFFKERN_CHECK(t.is_cpu(), "attention: ", name, " is on another device than q");
}

inline void check_options(const Options& o, const Geometry& g, const std::vector<Sequence>& sequences,
                          ScalarType dtype) {
  const Extent extent = longest(sequences);
  EFFKERN_CHECK(o.bands.size() % 3 == 0, "attention: bands must hold triples (left, right, sink), got ", o.bands.size(),
                " numbers");
  for (int64_t size : o.groups) EFFKERN_CHECK(size >= 1, "attention: groups must be at least 1, got ", size);
  if (o.layout) {
    EFFKERN_CHECK(o.layout->scalar_type() == ScalarType::Bool, "attention: layout must be bool, got ",
                  dtype_name(o.layout->scalar_type()));
    EFFKERN_CHECK(o.block >= 16 && o.block % 16 == 0, "attention: block must be a multiple of 16, got ", o.block);
    const auto blocks = [&](int64_t count) { return (count + o.block - 1) / o.block; };
    check_table("layout", *o.layout, g, extent, blocks(extent.queries), blocks(extent.keys), false);
  }
  if (o.ids) {
    EFFKERN_CHECK(o.ids->scalar_type() == ScalarType::Long, "attention: ids must be int64, got ",
                  dtype_name(o.ids->scalar_type()));
    const bool fits = o.ids->dim() == 2 && (o.ids->size(0) == 1 || (!g.packed && o.ids->size(0) == g.batch)) &&
                      o.ids->size(1) == g.keys;
    EFFKERN_CHECK(fits, "attention: ids must have shape (", g.packed ? 1 : g.batch, " or 1, ", g.keys, "), got ",
                  shape_string(*o.ids));
    EFFKERN_CHECK(o.ids->is_cpu(), "attention: ids is on another device than q");
  }
  if (o.visible) {
    EFFKERN_CHECK(o.visible->scalar_type() == ScalarType::Bool, "attention: visible must be bool, got ",
                  dtype_name(o.visible->scalar_type()));
    check_table("visible", *o.visible, g, extent, extent.queries, extent.keys, true);
  }
  if (o.bias) {
    EFFKERN_CHECK(o.bias->scalar_type() == ScalarType::Float || o.bias->scalar_type() == dtype,
                  "attention: bias must be float32 or q's ", dtype_name(dtype), ", got ",
                  dtype_name(o.bias->scalar_type()));
    check_table("bias", *o.bias, g, extent, extent.queries, extent.keys, true);
  }
  EFFKERN_CHECK(o.softcap >= 0.0 && std::isfinite(static_cast<float>(o.softcap)),
                "attention: softcap must be finite and at least 0, got ", o.softcap);
  if (o.sink_logits) check_per_head("sink_logits", *o.sink_logits, g, dtype);
  if (o.alibi_slopes) check_per_head("alibi_slopes", *o.alibi_slopes, g, dtype);
  EFFKERN_CHECK(o.dropout_p >= 0.0 && o.dropout_p < 1.0, "attention: dropout_p must be in [0, 1), got ", o.dropout_p);
  if (o.dropout_p > 0.0) {
    EFFKERN_CHECK(o.dropout_seed && o.dropout_seed->scalar_type() == ScalarType::Long && o.dropout_seed->numel() == 1 &&
                      o.dropout_seed->is_cpu(),
                  "attention: dropout needs dropout_seed, one int64 on q's device");
  }
}

// One float a head, or nothing.
inline std::vector<float> read_per_head(const std::optional<Tensor>& t) {
  if (!t) return {};
  const Tensor values = torch::stable::contiguous(torch::stable::to(*t, ScalarType::Float));
  const float* data = values.const_data_ptr<float>();
  return {data, data + values.numel()};
}

// The score terms of every (sequence, query head), sequence by sequence.
class TermTable {
 public:
  TermTable(const Options& o, const Geometry& g, const std::vector<Sequence>& sequences, Tensor* grad_bias)
      : heads_(g.heads_q),
        bias_(o.bias) {
    const std::vector<float> sinks = read_per_head(o.sink_logits), slopes = read_per_head(o.alibi_slopes);
    const Table grad(grad_bias ? std::optional<Tensor>(*grad_bias) : std::nullopt);
    for (size_t s = 0; s < sequences.size(); ++s)
      for (int64_t head = 0; head < g.heads_q; ++head) {
        Terms t{};
        t.bias = bias_.at(static_cast<int64_t>(s), head);
        if (o.bias) t.bias_dtype = kernel_dtype(o.bias->scalar_type());
        t.bias_row = bias_.row;
        t.bias_column = bias_.column;
        t.softcap = static_cast<float>(o.softcap);
        t.slope = slopes.empty() ? 0.0f : slopes[head];
        t.has_sink = !sinks.empty();
        t.sink = sinks.empty() ? 0.0f : sinks[head];
        t.shaped = t.bias || t.softcap != 0.0f || t.slope != 0.0f;
        if (o.dropout_p > 0.0) {
          t.keep = static_cast<float>(1.0 / (1.0 - o.dropout_p));
          t.threshold = static_cast<uint32_t>(o.dropout_p * 4294967296.0);
          t.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(o.dropout_seed->const_data_ptr()));
          const int64_t line = g.packed ? head : static_cast<int64_t>(s) * g.heads_q + head;
          t.first_row = static_cast<uint64_t>(line * g.queries + sequences[s].query_begin);
        }
        t.grad_bias = reinterpret_cast<float*>(const_cast<char*>(grad.at(static_cast<int64_t>(s), head)));
        t.grad_bias_row = grad.row;
        terms_.push_back(t);
      }
  }
  const Terms* at(int64_t sequence, int64_t head) const { return &terms_[sequence * heads_ + head]; }

 private:
  int64_t heads_;
  Table bias_;
  std::vector<Terms> terms_;
};

}  // namespace effkern::attention
