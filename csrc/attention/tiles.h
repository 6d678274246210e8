// Tile lists: which (query tile, key tile) pairs attention has to visit, and which of those need a mask.
//
// Every mask lowers to this one form. A kernel walks the list of its tile and nothing else, so a tile that is not
// listed costs nothing, and a new mask is new data, not a new kernel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention/cover.h"
#include "attention/kernel.h"

namespace effkern::attention {

// Lists in compressed-row form: those of tile t are entries[first[t] .. first[t + 1]).
struct KeyRunLists {
  std::vector<KeyRun> entries;
  std::vector<int64_t> first;
};

struct QueryRunLists {
  std::vector<QueryRun> entries;
  std::vector<int64_t> first;
};

// How a list cuts the keys: cells are classified as a whole. `trim` is the granule in which the first cell of a window
// may begin later and the last one of the sinks end sooner, and the last of a window may then end at any key; 0 where
// runs have to consist of whole cells.
struct KeyGrid {
  int64_t cell, trim;
};

inline void append_run(std::vector<KeyRun>& entries, int64_t first_of_tile, const KeyGrid& grid, int64_t begin,
                       int64_t end, bool partial) {
  if (static_cast<int64_t>(entries.size()) > first_of_tile) {
    KeyRun& last = entries.back();
    if (last.end == begin && (last.partial != 0) == partial) {
      last.end = end;
      return;
    }
    const int32_t rank = last.first_rank + static_cast<int32_t>(ceil_div(last.end - last.begin, grid.cell));
    entries.push_back({begin, end, rank, partial});
    return;
  }
  entries.push_back({begin, end, 0, partial});
}

inline KeyRunLists key_run_lists(const Mask& mask, int64_t queries, int64_t query_tile, const KeyGrid& grid) {
  const MaskCover cover(mask, grid.cell);
  KeyRunLists lists;
  lists.first.push_back(0);
  for (int64_t query = 0; query < queries; query += query_tile) {
    const int64_t query_end = std::min(query + query_tile, queries), first_entry = lists.first.back();
    const KeyBounds bounds = key_bounds(mask, query, query_end);
    const auto visit = [&](int64_t from, int64_t to) {
      if (from >= to) return;
      for (int64_t cell = from / grid.cell * grid.cell; cell < to; cell += grid.cell) {
        int64_t begin = cell, end = std::min(cell + grid.cell, mask.keys);
        const Cover found = cover.of({query, query_end, begin, end});
        if (found == Cover::none) continue;
        if (grid.trim != 0 && found == Cover::partial) {
          end = std::min(end, bounds.end);
          if (end <= bounds.begin) end = std::min(end, ceil_div(bounds.sink_end, grid.trim) * grid.trim);
          if (begin >= bounds.sink_end) begin = std::max(begin, bounds.begin / grid.trim * grid.trim);
        }
        append_run(lists.entries, first_entry, grid, begin, end, found == Cover::partial);
      }
    };
    // The sinks, then the window; a cell that holds both belongs to the first.
    const int64_t sink_cells = ceil_div(std::min(bounds.sink_end, bounds.end), grid.cell) * grid.cell;
    if (bounds.sink_end < bounds.begin) visit(0, std::min(bounds.sink_end, bounds.end));
    visit(bounds.sink_end < bounds.begin ? std::max(bounds.begin, sink_cells) : 0, bounds.end);
    lists.first.push_back(static_cast<int64_t>(lists.entries.size()));
  }
  return lists;
}

// The same pairs seen from the keys, for the key-stationary backward pass.
inline QueryRunLists query_run_lists(const KeyRunLists& lists, int64_t keys, int64_t key_tile) {
  std::vector<std::vector<QueryRun>> by_key(ceil_div(keys, key_tile));
  const int32_t query_tiles = static_cast<int32_t>(lists.first.size()) - 1;
  for (int32_t query = 0; query < query_tiles; ++query) {
    for (int64_t entry = lists.first[query]; entry < lists.first[query + 1]; ++entry) {
      const KeyRun& run = lists.entries[entry];
      for (int64_t key = run.begin; key < run.end; key += key_tile) {
        std::vector<QueryRun>& runs = by_key[key / key_tile];
        if (!runs.empty() && runs.back().last == query && runs.back().partial == run.partial)
          ++runs.back().last;
        else
          runs.push_back({query, query + 1, run.partial});
      }
    }
  }
  QueryRunLists visits;
  visits.first.push_back(0);
  for (const std::vector<QueryRun>& runs : by_key) {
    visits.entries.insert(visits.entries.end(), runs.begin(), runs.end());
    visits.first.push_back(static_cast<int64_t>(visits.entries.size()));
  }
  return visits;
}

}  // namespace effkern::attention
