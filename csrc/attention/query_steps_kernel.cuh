// The query tiles that see a key tile: key_steps_kernel.cuh from the other side, for kernels that keep keys and walk
// over queries. Plain integer functions, so that the tests can check them on the host over all small shapes.
#pragma once

#include "attention/key_steps_kernel.cuh"

namespace effkern::attention {

// The queries [begin, end) of a sequence see a key: masks that leave a query an interval of keys, and perhaps the first
// keys of all, leave a key one interval of queries.
struct SeenBy {
  int begin, end;

  constexpr bool query(int query) const { return query >= begin && query < end; }
};

// Query i stands at position i + shift.
constexpr SeenBy seen_by(const Window& w, int key, int shift, int queries) {
  int begin = key - w.right - shift;
  int end = key < w.sink || key - shift >= queries - w.left ? queries : key - shift + w.left + 1;
  if (w.group) {
    const int first = floor_of(key + w.group_shift, w.group) * w.group - w.group_shift - shift;
    begin = at_least(begin, first);
    end = at_most(end, first + w.group);
  }
  begin = at_most(at_least(begin, 0), queries);
  return {begin, at_most(at_least(end, begin), queries)};
}

// Steps 0 .. count - 1 of a walk over query tiles, from the first on, or over a stored list. In steps
// [whole, whole_end) every query sees every key and no mask is needed.
struct QuerySteps {
  int count, whole, whole_end;
  int first;
  const int* list;  // null: no stored list

  constexpr int tile(int step) const { return list ? list[step] : first + step; }
};

// For the keys first_key .. last_key. Both ends of a key's interval only ever grow with the key, but for sinks, which
// are seen to the end: then the first key beyond them is left first.
constexpr QuerySteps query_steps(const Window& w, int first_key, int last_key, int shift, int queries, int tile) {
  const SeenBy first = seen_by(w, first_key, shift, queries), last = seen_by(w, last_key, shift, queries);
  const SeenBy left_first = first_key < w.sink && w.sink <= last_key ? seen_by(w, w.sink, shift, queries) : first;
  const int begin = first.begin / tile, all_end = at_least(first.end, last.end);
  const int end = all_end > first.begin ? (all_end + tile - 1) / tile : begin;
  const int whole = at_least((last.begin + tile - 1) / tile, begin), whole_end = at_most(left_first.end / tile, end);
  const bool any = whole < whole_end;
  return {end - begin, any ? whole - begin : 0, any ? whole_end - begin : 0, begin, nullptr};
}

// A stored list: `whole` entries that need no mask, then the others.
constexpr QuerySteps listed_query_steps(const int* list, int whole, int count) { return {count, 0, whole, 0, list}; }

}  // namespace effkern::attention
