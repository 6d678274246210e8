// Exhaustive checks of the index functions that kernels are built from. Each returns null or the first thing wrong.
#include <algorithm>
#include <set>
#include <vector>

#include "attention/key_steps_kernel.cuh"
#include "attention/schedule_kernel.cuh"
#include "core/cuda/tile/mma.cuh"

namespace {

using namespace effkern;

// Every element has a place of its own, and 8 rows of one chunk column lie in 8 different groups of 4 banks.
template <class Tile>
bool swizzle_is_sound() {
  std::set<uint32_t> places;
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk)
    for (int first = 0; first < Tile::kRows; first += 8) {
      std::set<uint32_t> banks;
      for (int row = first; row < first + 8; ++row) {
        places.insert(Tile::offset(row, chunk));
        banks.insert(Tile::offset(row, chunk) / 16 % 8);
      }
      if (banks.size() != 8) return false;
    }
  return places.size() == size_t{Tile::kRows} * Tile::kChunks && *places.rbegin() == Tile::kBytes - 16;
}

// The threads of a block copy every chunk of a tile once, to the place its row and column say.
template <class Tile>
bool copies_cover() {
  using Slice = cuda::CopySlice<Tile, 128>;
  std::set<uint32_t> places;
  for (int thread = 0; thread < 128; ++thread)
    for (int step = 0; step < Slice::kSteps; ++step) {
      const int row = Slice::first_row(thread) + step * Slice::kRowStep;
      if (Slice::offset(thread, step) != Tile::offset(row, Slice::chunk(thread))) return false;
      places.insert(Slice::offset(thread, step));
    }
  return places.size() == size_t{Tile::kRows} * Tile::kChunks;
}

// Stepping a cursor is the same as asking for the offset.
template <class Tile>
bool cursor_steps() {
  for (int row = 0; row < 16; ++row)
    for (int start = 0; start < 2; ++start)
      for (int rows = 0; row + rows < Tile::kRows; rows += 8)
        for (int chunks = 0; start + chunks < Tile::kChunks; chunks += 2)
          if (cuda::LaneCursor<Tile>(Tile{0}, {row, start}).at(rows, chunks) !=
              Tile::offset(row + rows, start + chunks))
            return false;
  return true;
}

// The accumulators of a block's threads cover rows x 8 columns once.
bool accumulators_cover() {
  std::set<std::pair<int, int>> seen;
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < 2; ++i)
      for (int e = 0; e < 4; ++e) {
        const cuda::Coordinate at = cuda::accumulator_coordinate<2>(thread, e);
        seen.insert({at.row + 16 * i, at.column});
      }
  return seen.size() == 128 * 8 && seen.rbegin()->first == 127 && seen.rbegin()->second == 7;
}

bool grid_covers(int rows, int slots, int section_rows) {
  std::set<std::pair<int, int>> seen;
  for (int block = 0; block < rows * slots; ++block) {
    const attention::Work work = attention::work_of_block(block, rows, slots, section_rows);
    if (work.row < 0 || work.row >= rows || work.slot < 0 || work.slot >= slots) return false;
    seen.insert({work.row, work.slot});
  }
  return seen.size() == size_t(rows) * slots;
}

bool packed_slots_cover(const std::vector<int>& lengths, int tile) {
  std::vector<int> offsets{0};
  for (int length : lengths) offsets.push_back(offsets.back() + length);
  const int sequences = static_cast<int>(lengths.size());
  std::multiset<std::pair<int, int>> seen, expected;
  for (int slot = 0; slot < attention::packed_slots(offsets.back(), sequences, tile); ++slot) {
    const attention::QueryTile found = attention::tile_of_slot(offsets.data(), sequences, slot, tile);
    if (found.tile < 0 || found.sequence < 0 || found.sequence >= sequences) return false;
    if (found.tile * tile < lengths[found.sequence]) seen.insert({found.sequence, found.tile});
  }
  for (int i = 0; i < sequences; ++i)
    for (int t = 0; t * tile < lengths[i]; ++t) expected.insert({i, t});
  return seen == expected;
}

// Key tiles against the mask written out: visited where any pair is visible, unmasked only where all are.
bool key_tiles_match(int queries, int keys, bool causal, bool top_left, int query_tile, int key_tile) {
  const attention::Visible visible = attention::visible_keys(queries, keys, causal, top_left);
  const auto seen = [&](int i, int j) { return !causal || j <= i + (top_left ? 0 : keys - queries); };
  for (int first = 0; first < queries; first += query_tile) {
    const int rows = std::min(query_tile, queries - first);
    const attention::KeyTiles tiles = attention::key_tiles(visible.from(first), rows, key_tile);
    for (int tile = 0; tile * key_tile < keys + key_tile; ++tile) {
      bool any = false, all = true;
      for (int i = first; i < first + rows; ++i)
        for (int j = tile * key_tile; j < (tile + 1) * key_tile; ++j) {
          const bool here = j < keys && seen(i, j);
          if (here != (j < visible.end(i))) return false;
          any |= here;
          all &= here;
        }
      if ((tile < tiles.all) != any || (tile < tiles.full) != all) return false;
    }
  }
  return true;
}

// Steps of windows, sinks and groups against the mask written out: every tile at most once, visited where any pair is
// visible, unmasked only where all are; the tile that holds the end of the keys comes first if at all.
bool key_steps_match(const attention::Window& w, int queries, int keys, int shift, int query_tile, int key_tile) {
  const auto floor_div = [](int a, int b) { return a / b - (a % b != 0 && a < 0); };
  const auto seen = [&](int i, int j) {
    const int p = i + shift, group = w.group ? w.group : 1 << 20;
    const bool together = w.group == 0 || floor_div(p + w.group_shift, group) == floor_div(j + w.group_shift, group);
    return together && j < keys && j <= p + w.right && (j >= p - w.left || j < w.sink);
  };
  for (int first = 0; first < queries; first += query_tile) {
    const int last = std::min(first + query_tile, queries) - 1;
    const attention::KeySteps steps = attention::key_steps(attention::seen_keys(w, first + shift, keys),
                                                           attention::seen_keys(w, last + shift, keys), key_tile);
    std::set<int> visited, whole;
    for (int step = 0; step < steps.count; ++step) {
      const int tile = steps.tile(step);
      if (tile < 0 || tile * key_tile >= keys || !visited.insert(tile).second) return false;
      if (step > 0 && (tile + 1) * key_tile > keys) return false;
      if (step >= steps.whole && step < steps.whole_end) whole.insert(tile);
    }
    for (int tile = 0; tile * key_tile < keys; ++tile) {
      bool any = false, all = true;
      for (int i = first; i <= last; ++i)
        for (int j = tile * key_tile; j < (tile + 1) * key_tile; ++j) {
          if (attention::seen_keys(w, i + shift, keys).sees(j) != seen(i, j)) return false;
          any |= seen(i, j);
          all &= seen(i, j);
        }
      if ((any && !visited.count(tile)) || (whole.count(tile) && !all)) return false;
    }
  }
  return true;
}

// A persistent grid takes every task once.
bool rounds_cover(int blocks, int tasks) {
  std::set<int64_t> seen;
  for (int block = 0; block < blocks; ++block)
    for (int round = 0; round * blocks < tasks; ++round) {
      const int64_t task = attention::task_of_round(block, blocks, round);
      if (task < tasks && !seen.insert(task).second) return false;
    }
  return seen.size() == size_t(tasks);
}

template <class... Tiles>
const char* check_tiles() {
  if (!(swizzle_is_sound<Tiles>() && ...)) return "swizzle";
  if (!(copies_cover<Tiles>() && ...)) return "copy slices";
  if (!(cursor_steps<Tiles>() && ...)) return "cursor steps";
  return accumulators_cover() ? nullptr : "accumulator coordinates";
}

}  // namespace

extern "C" const char* check_tile_maps() {
  return check_tiles<cuda::SharedTile<128, 64>, cuda::SharedTile<128, 128>, cuda::SharedTile<64, 64>,
                     cuda::SharedTile<64, 128>>();
}

extern "C" const char* check_schedule() {
  for (int rows = 1; rows <= 12; ++rows)
    for (int slots = 1; slots <= 5; ++slots)
      for (int section = 1; section <= rows; ++section)
        if (!grid_covers(rows, slots, section)) return "grid";
  for (int a = 0; a <= 9; ++a)
    for (int b = 0; b <= 9; ++b)
      for (int c = 0; c <= 9; ++c)
        for (int d = 0; d <= 9; ++d)
          if (!packed_slots_cover({a, b, c, d}, 4)) return "packed slots";
  for (int queries = 1; queries <= 14; ++queries)
    for (int keys = 0; keys <= 14; ++keys)
      for (const auto& [causal, top_left] : {std::pair{false, false}, std::pair{true, false}, std::pair{true, true}})
        for (const auto& [query_tile, key_tile] : {std::pair{4, 4}, std::pair{4, 2}, std::pair{3, 5}})
          if (!key_tiles_match(queries, keys, causal, top_left, query_tile, key_tile)) return "key tiles";
  return nullptr;
}

extern "C" const char* check_key_steps() {
  constexpr int kFar = attention::kUnbounded;
  for (int queries = 1; queries <= 9; queries += 2)
    for (int keys = 0; keys <= 14; ++keys)
      for (int shift : {0, keys - queries})
        for (const auto& [query_tile, key_tile] : {std::pair{4, 4}, std::pair{4, 2}, std::pair{3, 5}})
          for (int right : {0, 2, -1, kFar})
            for (int left : {0, 3, 6, kFar})
              for (const auto& [sink, group] :
                   {std::pair{0, 0}, std::pair{1, 0}, std::pair{5, 0}, std::pair{0, 1}, std::pair{0, 4}}) {
                if (sink && left == kFar) continue;
                for (int half = 0; half < 2; ++half)
                  if (!key_steps_match({left, right, sink, group, half * (group / 2)}, queries, keys, shift, query_tile,
                                       key_tile))
                    return "key steps";
              }
  for (int blocks = 1; blocks <= 5; ++blocks)
    for (int tasks = 0; tasks <= 23; ++tasks)
      if (!rounds_cover(blocks, tasks)) return "rounds";
  return nullptr;
}
