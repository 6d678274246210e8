// How much of a rectangle of (query, key) pairs a mask lets through: nothing, some, or all of it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "attention/mask.h"

namespace effkern::attention {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

// Ordered: what two terms let through together is at most the lesser of the two.
enum class Cover : int { none, partial, full };

// Half-open.
struct Rectangle {
  int64_t query_begin, query_end, key_begin, key_end;
};

// What bands and groups leave for a range of queries: keys [begin, end), and perhaps those below sink_end.
struct KeyBounds {
  int64_t begin, end, sink_end;
};

inline KeyBounds key_bounds(const Mask& mask, int64_t query_begin, int64_t query_end) {
  const int64_t first = query_begin + mask.shift, last = query_end - 1 + mask.shift;
  KeyBounds bounds{0, mask.keys, 0};
  for (int64_t i = 0; i < mask.band_count; ++i) {
    const Band& band = mask.bands[i];
    bounds.begin = std::max(bounds.begin, first - band.left);
    bounds.end = std::min(bounds.end, last + band.right + 1);
    bounds.sink_end = std::max(bounds.sink_end, std::min(band.sink, mask.keys));
  }
  for (int64_t i = 0; i < mask.groups_count; ++i) {
    const Groups& groups = mask.groups[i];
    const auto begin_of = [&](int64_t index) { return index * groups.size - groups.offset; };
    bounds.begin = std::max(bounds.begin, begin_of(floor_div(first + groups.offset, groups.size)));
    bounds.end = std::min(bounds.end, begin_of(floor_div(last + groups.offset, groups.size) + 1));
  }
  bounds.end = std::max<int64_t>(bounds.end, 0);
  return bounds;
}

class MaskCover {
 public:
  // `cell`: width of the key ranges that will be asked for; they begin at multiples of it.
  MaskCover(const Mask& mask, int64_t cell) : mask_(mask), cell_(cell) {
    if (!mask.ids) return;
    for (int64_t begin = 0; begin < mask.keys; begin += cell)
      id_ranges_.push_back(id_range(begin, std::min(begin + cell, mask.keys)));
  }

  Cover of(const Rectangle& r) const {
    const int64_t first = r.query_begin + mask_.shift, last = r.query_end - 1 + mask_.shift;
    Cover cover = Cover::full;
    for (int64_t i = 0; i < mask_.band_count; ++i) cover = std::min(cover, of_band(mask_.bands[i], first, last, r));
    for (int64_t i = 0; i < mask_.groups_count; ++i)
      cover = std::min(cover, of_groups(mask_.groups[i], first, last, r));
    if (cover != Cover::none && mask_.layout) cover = std::min(cover, of_layout(r));
    if (cover != Cover::none && mask_.ids) cover = std::min(cover, of_ids(first, last, r));
    if (cover != Cover::none && mask_.visible) cover = std::min(cover, of_table(r));
    return cover;
  }

 private:
  using Range = std::pair<int64_t, int64_t>;  // least and largest

  static Cover judge(bool some, bool all) { return !some ? Cover::none : all ? Cover::full : Cover::partial; }

  static Cover of_band(const Band& band, int64_t first, int64_t last, const Rectangle& r) {
    const int64_t last_key = r.key_end - 1;
    const bool some = r.key_begin <= last + band.right && (last_key >= first - band.left || r.key_begin < band.sink);
    const bool all = last_key <= first + band.right && (r.key_begin >= last - band.left || last_key < band.sink);
    return judge(some, all);
  }

  static Cover of_groups(const Groups& groups, int64_t first, int64_t last, const Rectangle& r) {
    const auto group = [&](int64_t position) { return floor_div(position + groups.offset, groups.size); };
    const int64_t q0 = group(first), q1 = group(last), k0 = group(r.key_begin), k1 = group(r.key_end - 1);
    return judge(q0 <= k1 && k0 <= q1, q0 == k1 && k0 == q1);
  }

  Cover of_layout(const Rectangle& r) const {
    bool some = false, all = true;
    for (int64_t i = r.query_begin / mask_.block; i * mask_.block < r.query_end; ++i)
      for (int64_t j = r.key_begin / mask_.block; j * mask_.block < r.key_end; ++j) {
        const bool on = mask_.layout[i * mask_.layout_row + j] != 0;
        some |= on;
        all &= on;
      }
    return judge(some, all);
  }

  Range id_range(int64_t begin, int64_t end) const {
    const auto [least, largest] = std::minmax_element(mask_.ids + begin, mask_.ids + end);
    return {*least, *largest};
  }

  Cover of_ids(int64_t first, int64_t last, const Rectangle& r) const {
    const int64_t begin = std::max<int64_t>(first, 0), end = std::min(last + 1, mask_.keys);
    if (begin >= end) return Cover::none;  // positions beyond the keys have no id
    const Range queries = id_range(begin, end), keys = id_ranges_[r.key_begin / cell_];
    const bool one = queries.first == keys.second && queries.second == keys.first;
    return judge(queries.first <= keys.second && keys.first <= queries.second,
                 one && begin == first && end == last + 1);
  }

  Cover of_table(const Rectangle& r) const {
    bool some = false, all = true;
    const int64_t rows = mask_.visible_row != 0 ? r.query_end - r.query_begin : 1;
    const int64_t columns = mask_.visible_column != 0 ? r.key_end - r.key_begin : 1;
    const uint8_t* corner = mask_.visible + r.query_begin * mask_.visible_row + r.key_begin * mask_.visible_column;
    for (int64_t i = 0; i < rows && (all || !some); ++i)
      for (int64_t j = 0; j < columns; ++j) {
        const bool on = corner[i * mask_.visible_row + j] != 0;
        some |= on;
        all &= on;
      }
    return judge(some, all);
  }

  const Mask& mask_;
  int64_t cell_;
  std::vector<Range> id_ranges_;
};

}  // namespace effkern::attention
