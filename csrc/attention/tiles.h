// Tile lists: which (query tile, key tile) pairs attention has to visit, and which of those need a mask.
//
// Every mask lowers to this one form. A kernel walks the list of its tile and nothing else, so a tile that is not
// listed costs nothing, and a new mask is new data, not a new kernel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

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

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Past-the-end key of what `query` sees.
inline int64_t visible_end(const Window& window, int64_t query) {
  if (!window.causal) return window.keys;
  return std::clamp<int64_t>(query + window.shift + 1, 0, window.keys);
}

inline KeyRunLists key_run_lists(const Window& window, int64_t queries, int64_t query_tile, int64_t key_tile) {
  KeyRunLists lists;
  lists.first.push_back(0);
  for (int64_t begin = 0; begin < queries; begin += query_tile) {
    // What a query sees grows with its index, so the first and last query of the tile bound it.
    const int64_t common_end = visible_end(window, begin);
    const int64_t union_end = visible_end(window, std::min(begin + query_tile, queries) - 1);
    const int64_t full_end = common_end == union_end ? union_end : common_end / key_tile * key_tile;
    if (full_end > 0) lists.entries.push_back({0, full_end, 0, 0});
    if (union_end > full_end)
      lists.entries.push_back({full_end, union_end, static_cast<int32_t>(full_end / key_tile), 1});
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
        // The keys work on their whole tile: a run that ends inside it hides the rest.
        const int32_t partial = run.partial || run.end < std::min(key + key_tile, keys);
        std::vector<QueryRun>& runs = by_key[key / key_tile];
        if (!runs.empty() && runs.back().last == query && runs.back().partial == partial)
          ++runs.back().last;
        else
          runs.push_back({query, query + 1, partial});
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
