// The masks of a call and their tile lists: one variant for every (sequence, query head) that sees something of its
// own.
#pragma once

#include <numeric>
#include <vector>

#include "attention/kernel.h"
#include "attention/options.h"
#include "attention/tiles.h"
#include "core/parallel.h"

namespace effkern::attention {

struct Tiling {
  int64_t query_tile;
  KeyGrid keys;
};

// The usual tiles of a unit, or such as fit the blocks of a block-sparse layout, so that its blocks stay full.
inline Tiling choose_tiling(const Kernels& kernels, const Options& o, bool backward) {
  Tiling tiling{backward ? kernels.backward_query_tile : kernels.query_tile,
                {backward ? kernels.backward_key_tile : kernels.key_tile, backward ? 0 : kernels.key_granule}};
  if (!o.layout) return tiling;
  tiling.keys.cell = std::max(std::gcd(o.block, tiling.keys.cell), kernels.key_granule);
  for (int64_t tile = kernels.query_granule; tile <= kernels.most_queries; tile += kernels.query_granule)
    if (o.block % tile == 0) tiling.query_tile = tile;
  return tiling;
}

struct Variant {
  Mask mask;
  KeyRunLists keys;
  QueryRunLists queries;  // only for the backward pass
};

class MaskPlan {
 public:
  MaskPlan(const Geometry& g, const std::vector<Sequence>& sequences, const Options& o, const Tiling& tiling,
           bool backward)
      : heads_(g.heads_q),
        layout_(o.layout),
        visible_(o.visible) {
    constexpr int64_t kUnbounded = int64_t{1} << 30;
    for (size_t i = 0; i < o.bands.size(); i += 3) bands_.push_back({o.bands[i], o.bands[i + 1], o.bands[i + 2]});
    if (o.causal) bands_.push_back({kUnbounded, 0, 0});
    for (int half = 0; half < 2; ++half)
      for (int64_t size : o.groups) groups_[half].push_back({size, half * (size / 2)});
    if (o.ids) ids_ = torch::stable::contiguous(*o.ids);
    const int64_t* ids = ids_ ? ids_->const_data_ptr<int64_t>() : nullptr;
    const int64_t ids_stride = ids_ && ids_->size(0) > 1 ? ids_->size(1) : 0;

    by_sequence_ = g.packed || layout_.batch != 0 || visible_.batch != 0 || ids_stride != 0;
    by_head_ = layout_.head != 0 || visible_.head != 0;
    by_half_ = !by_head_ && !o.groups.empty();
    const int64_t variants_a_sequence = by_head_ ? g.heads_q : by_half_ ? 2 : 1;
    const int64_t listed = by_sequence_ ? static_cast<int64_t>(sequences.size())
                                        : std::min<int64_t>(1, static_cast<int64_t>(sequences.size()));
    variants_.resize(listed * variants_a_sequence);
    parallel_tasks(static_cast<int64_t>(variants_.size()), [&](int64_t index, int64_t) {
      const int64_t s = index / variants_a_sequence, which = index % variants_a_sequence;
      const int64_t half = by_half_ ? which : which >= g.heads_q / 2;
      const Sequence& sequence = sequences[s];
      Mask m{};
      m.keys = sequence.keys;
      m.shift = o.top_left ? 0 : sequence.keys - sequence.queries;
      m.bands = bands_.data();
      m.band_count = static_cast<int64_t>(bands_.size());
      m.groups = groups_[half].data();
      m.groups_count = static_cast<int64_t>(groups_[half].size());
      m.layout = reinterpret_cast<const uint8_t*>(layout_.at(s, which));
      m.layout_row = layout_.row;
      m.block = o.block;
      m.ids = ids ? ids + s * ids_stride + sequence.key_begin : nullptr;
      m.visible = reinterpret_cast<const uint8_t*>(visible_.at(s, which));
      m.visible_row = visible_.row;
      m.visible_column = visible_.column;
      Variant& variant = variants_[index];
      variant.mask = m;
      variant.keys = key_run_lists(m, sequence.queries, tiling.query_tile, tiling.keys);
      if (backward) variant.queries = query_run_lists(variant.keys, sequence.keys, tiling.keys.cell);
    });
  }

  const Variant& at(int64_t sequence, int64_t head) const {
    const int64_t s = by_sequence_ ? sequence : 0;
    if (by_head_) return variants_[s * heads_ + head];
    return variants_[by_half_ ? 2 * s + (head >= heads_ / 2) : s];
  }

 private:
  int64_t heads_;
  Table layout_, visible_;
  std::optional<Tensor> ids_;
  std::vector<Band> bands_;
  std::vector<Groups> groups_[2];
  bool by_sequence_, by_head_, by_half_;
  std::vector<Variant> variants_;
};

}  // namespace effkern::attention
