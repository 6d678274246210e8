// Tile lists: which (query tile, key tile) pairs attention has to visit, and which of those need a mask.
//
// Every mask lowers to this one form. A kernel walks the list of its tile and nothing else, so a tile that
// is not listed costs nothing, and a new mask is new data, not a new kernel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention/kernel.h"

namespace effkern::attention {

// Past-the-end key of what `query` sees.
inline int64_t visible_end(const Window& window, int64_t query) {
  if (!window.causal) return window.keys;
  return std::clamp<int64_t>(query + window.shift + 1, 0, window.keys);
}

// Lists in compressed-row form: those of tile t are entries[first[t] .. first[t + 1]).
struct KeyTileLists {
  std::vector<KeyTile> entries;
  std::vector<int64_t> first;
};

struct QueryVisitLists {
  std::vector<QueryVisit> entries;
  std::vector<int64_t> first;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline KeyTileLists key_tile_lists(const Window& window, int64_t queries, int64_t query_tile, int64_t key_tile) {
  KeyTileLists lists;
  lists.first.push_back(0);
  for (int64_t begin = 0; begin < queries; begin += query_tile) {
    const int64_t last = std::min(begin + query_tile, queries) - 1;
    // What a query sees grows with its index, so the first and last query of the tile bound it.
    const int64_t union_end = visible_end(window, last), common_end = visible_end(window, begin);
    for (int64_t key = 0; key < union_end; key += key_tile) {
      const int64_t end = std::min(key + key_tile, union_end);
      lists.entries.push_back({key, static_cast<int32_t>(end - key), end > common_end});
    }
    lists.first.push_back(static_cast<int64_t>(lists.entries.size()));
  }
  return lists;
}

// The same pairs seen from the keys, for the key-stationary backward pass.
inline QueryVisitLists query_visit_lists(const KeyTileLists& lists, int64_t keys, int64_t key_tile) {
  QueryVisitLists visits;
  const int64_t key_tiles = ceil_div(keys, key_tile), query_tiles = static_cast<int64_t>(lists.first.size()) - 1;
  visits.first.assign(key_tiles + 1, 0);
  for (const KeyTile& tile : lists.entries) ++visits.first[tile.begin / key_tile + 1];
  for (int64_t tile = 0; tile < key_tiles; ++tile) visits.first[tile + 1] += visits.first[tile];
  visits.entries.resize(lists.entries.size());
  std::vector<int64_t> next(visits.first.begin(), visits.first.end() - 1);
  for (int64_t query = 0; query < query_tiles; ++query) {
    for (int64_t entry = lists.first[query]; entry < lists.first[query + 1]; ++entry) {
      const KeyTile& tile = lists.entries[entry];
      // The keys work on their whole tile: a list entry that ends early hides the rest of it.
      const bool cut = tile.begin + tile.count < std::min(tile.begin + key_tile, keys);
      visits.entries[next[tile.begin / key_tile]++] = {static_cast<int32_t>(query),
                                                       static_cast<int32_t>(entry - lists.first[query]),
                                                       tile.partial || cut};
    }
  }
  return visits;
}

}  // namespace effkern::attention
