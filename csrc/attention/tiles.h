// Tile lists: which (query tile, key tile) pairs attention has to visit, and which of those need a mask.
//
// Every mask lowers to this one form. A kernel walks the list of its tile and nothing else, so a tile that
// is not listed costs nothing, and a new mask is new data, not a new kernel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace effkern::attention {

// Which keys a query of one sequence may see: the half-open interval [low(i), high(i)).
// Plain data: kernels get a copy and evaluate it per lane of a partial tile.
struct Visibility {
  int64_t keys = 0;    // keys in the sequence
  int64_t shift = 0;   // position of query 0 among the keys (causal only)
  bool causal = false;

  int64_t low(int64_t) const { return 0; }
  int64_t high(int64_t query) const {
    if (!causal) return keys;
    const int64_t end = query + shift + 1;
    return end < 0 ? 0 : (end < keys ? end : keys);
  }
};

// One stretch of keys for a query tile: keys [begin, begin + count).
struct KeyTile {
  int64_t begin;
  int32_t count;
  int32_t partial;  // 1: some (query, key) pair inside is masked
};

// One visit of a key tile: the query tile, and how many key tiles that query tile has visited before.
// The rank fixes the order in which key tiles add to a query gradient, whatever the number of threads.
struct QueryVisit {
  int32_t query_tile;
  int32_t rank;
  int32_t partial;
};

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

inline KeyTileLists key_tile_lists(const Visibility& visible, int64_t queries, int64_t query_tile, int64_t key_tile) {
  KeyTileLists lists;
  lists.first.push_back(0);
  for (int64_t begin = 0; begin < queries; begin += query_tile) {
    const int64_t last = std::min(begin + query_tile, queries) - 1;
    // Intervals move monotonically with the query, so the first and last query bound the tile.
    const int64_t union_end = visible.high(last), common_end = visible.high(begin);
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
      visits.entries[next[tile.begin / key_tile]++] = {static_cast<int32_t>(query),
                                                       static_cast<int32_t>(entry - lists.first[query]), tile.partial};
    }
  }
  return visits;
}

}  // namespace effkern::attention
