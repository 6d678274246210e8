// Runs the CUDA decode kernels on the software model of a thread block, block after block, and checks their schedule.
// Called through ctypes.
#include <algorithm>
#include <limits>
#include <set>
#include <vector>

#include "attention_decode/merge_kernel.cuh"
#include "attention_decode/split_sm80_kernel.cuh"

namespace {

using namespace effkern;
using namespace attention_decode;

struct Operand {
  void* data;
  int64_t bytes, strides[3];  // the extent of its memory, and strides
};

struct DecodeCall {
  Operand q, k, v, out, lse, values, tops;
  const int *lengths, *page_table;
  const void* sinks;
  const int64_t* bands;
  int band_numbers, sinks_fp32, bf16;
  int batch, kv_heads, group, queries, capacity, pages, page_size, table_stride, head_dim, value_dim;
  int multiprocessors, splits;  // splits 0: as planned
  double scale, softcap;
  unsigned seed;
  int planned;  // out: into how many parts the keys were split
};

template <class Element, int kDim, int kRowBlocks>
void run(SplitParams& p, DecodeCall& call) {
  using Shape = SplitShape<kDim, kRowBlocks>;
  model::Block& block = model::block();
  const int64_t units = int64_t{call.batch} * p.kv_heads;
  int64_t blocks = plan_grid<Shape>(p, units, call.multiprocessors, 228 << 10);
  if (call.splits) {
    blocks = blocks / p.splits * call.splits;
    p.splits = call.splits;
  }
  call.planned = p.splits;
  if (partial_rows(p, units) * p.value_dim * 4 > call.values.bytes)
    return block.fail("the partial results need more room");
  for (int64_t i = 0; i < blocks && block.error.empty(); ++i) {
    block.index = static_cast<int>(i);
    block.run(Shape::kThreads, Shape::kSharedBytes, call.seed + static_cast<unsigned>(i),
              [&] { attention_decode_split_sm80<Element, kDim, kRowBlocks>(p, 0); });
  }
  if (p.splits == 1) return;
  for (int64_t i = 0; i < units * p.rows() && block.error.empty(); ++i) {
    block.index = static_cast<int>(i);
    block.run(MergeShape::kThreads, MergeShape::kSharedBytes, call.seed - static_cast<unsigned>(i),
              [&] { attention_decode_merge<Element>(p, 0); });
  }
}

template <class Element>
void run_for(SplitParams& p, DecodeCall& call) {
  const int dim = instance_dim(p.head_dim, p.value_dim);
  const bool tall = row_blocks(dim, p.rows()) == 2;
  if (dim == 256) return run<Element, 256, 1>(p, call);
  if (dim == 128) return tall ? run<Element, 128, 2>(p, call) : run<Element, 128, 1>(p, call);
  if (dim == 96) return tall ? run<Element, 96, 2>(p, call) : run<Element, 96, 1>(p, call);
  tall ? run<Element, 64, 2>(p, call) : run<Element, 64, 1>(p, call);
}

Cache cache_of(const Operand& t) {
  return {static_cast<const char*>(t.data), t.strides[0], t.strides[1], static_cast<uint32_t>(t.strides[2])};
}

// Every key that some query sees is in one part, in a tile whose bit says so; tiles said to be seen by all are.
bool walk_matches(int length, int queries, const Bands& bands, int splits, int warps) {
  const VisibleKeys keys = visible_keys(length, queries, bands);
  const auto sees = [&](int query, int key) {
    const int position = length - queries + query;
    bool visible = key <= position + bands.reach;
    for (int i = 0; i < bands.count; ++i) visible = visible && (key >= position - bands.left[i] || key < bands.sink[i]);
    return visible;
  };
  bool exact = bands.reach == 0;
  for (int i = 0; i < bands.count; ++i) exact = exact && bands.left[i] >= 0;
  const TileWalk walk = tile_walk(keys);
  const Parts parts = parts_of(walk.count, splits, warps);
  std::vector<int> seen;
  for (int part = 0; part < splits; ++part) {
    if ((parts.begin(part) < parts.begin(part + 1)) != (part < parts.used())) return false;
    for (int index = parts.begin(part); index < parts.begin(part + 1); ++index) {
      const int first = walk.tile(index) * kTileKeys;
      for (int i = 0; i < kTileKeys; ++i) {
        bool any = false, all = true;
        for (int query = 0; query < queries; ++query) {
          const bool here = sees(query, first + i);
          if (here != (seen_from(length - queries + query, bands, first) >> i & 1)) return false;
          any |= here;
          all &= here;
        }
        const bool read = seen_by_any(length, queries, bands, first) >> i & 1;
        if ((any && !read) || (exact && read && !any)) return false;
        if (seen_by_all(length, queries, bands, first) && !all) return false;
        if (read) seen.push_back(first + i);
      }
    }
  }
  if (std::set<int>(seen.begin(), seen.end()).size() != seen.size() || (!seen.empty() && seen.back() >= length))
    return false;
  for (int key = 0; key < length; ++key)
    for (int query = 0; query < queries; ++query)
      if (sees(query, key) && !std::binary_search(seen.begin(), seen.end(), key)) return false;
  return walk.count <= most_tiles(length, queries, bands);
}

}  // namespace

// Null, or what went wrong.
extern "C" const char* model_attention_decode(DecodeCall* call) {
  SplitParams p{};
  model::Block& block = model::block();
  block.error.clear();
  block.global.clear();
  for (const Operand* t : {&call->q, &call->k, &call->v, &call->out, &call->values})
    block.global.push_back({static_cast<char*>(t->data), static_cast<char*>(t->data) + t->bytes});
  p.q = static_cast<const char*>(call->q.data);
  p.q_batch_stride = call->q.strides[0];
  p.q_head_stride = call->q.strides[1];
  p.q_row_stride = call->q.strides[2];
  p.k = cache_of(call->k);
  p.v = cache_of(call->v);
  p.lengths = call->lengths;
  p.page_table = call->page_table;
  p.table_stride = call->table_stride;
  p.sinks = call->sinks;
  p.sinks_fp32 = call->sinks_fp32;
  p.out = static_cast<uint16_t*>(call->out.data);
  p.lse = static_cast<float*>(call->lse.data);
  p.values = static_cast<float*>(call->values.data);
  p.tops = static_cast<float*>(call->tops.data);
  p.kv_heads = call->kv_heads;
  p.group = call->group;
  p.queries = call->queries;
  p.query_divisor = divisor(call->queries);
  p.capacity = call->capacity;
  p.head_dim = call->head_dim;
  p.value_dim = call->value_dim;
  set_pages(p, call->pages, call->page_size);
  set_scores(p, call->scale, call->softcap);
  if (!set_bands(p, call->bands, call->band_numbers)) return "too many windows";
  if (call->bf16)
    run_for<cuda::Bf16>(p, *call);
  else
    run_for<cuda::Fp16>(p, *call);
  return block.error.empty() ? nullptr : block.error.c_str();
}

extern "C" const char* check_decode_schedule() {
  constexpr int kUnbounded = kMostKeys;
  const std::vector<Bands> masks = {
      {0, 0, {}, {}},      {0, 1, {20}, {0}},         {0, 1, {0}, {5}},         {0, 1, {33}, {40}},
      {-3, 1, {50}, {17}}, {0, 2, {10, 60}, {30, 2}}, {-kUnbounded, 0, {}, {}}, {0, 1, {-2}, {-7}},
  };
  for (const Bands& bands : masks)
    for (int length : {0, 1, 5, 15, 16, 17, 40, 64, 65, 100, 200})
      for (int queries : {1, 3, 8, 30})
        for (int splits : {1, 2, 5, 9})
          for (int warps : {2, 4})
            if (!walk_matches(length, queries, bands, splits, warps)) return "walk";
  if (clamped_length(-5, 7) != 0 || clamped_length(8, 7) != 7 || clamped_length(3, 7) != 3) return "length";
  std::set<std::tuple<int, int, int>> blocks;
  for (int block = 0; block < 3 * 4 * 5; ++block) {
    const Work work = work_of_block(block, 3, 4);
    if (work.row_tile >= 3 || work.part >= 4 || work.unit >= 5) return "grid";
    blocks.insert({work.row_tile, work.part, work.unit});
  }
  return blocks.size() == 60 ? nullptr : "grid";
}

extern "C" const char* check_decode_divisor() {
  constexpr int kMost = std::numeric_limits<int>::max();
  std::vector<int> divisors;
  for (int d = 1; d <= 300; ++d) divisors.push_back(d);
  for (int bit = 9; bit < 31; ++bit)
    for (int d : {(1 << bit) - 1, 1 << bit, (1 << bit) + 1}) divisors.push_back(d);
  divisors.push_back(kMost);
  for (int d : divisors) {
    const Divisor by = divisor(d);
    for (int64_t quotient : {0, 1, 2, 3, 1000, kMost / d - 1, kMost / d})
      for (int64_t n = quotient * d - 2; n <= quotient * d + 2; ++n)
        if (n >= 0 && n <= kMost && by.divide(static_cast<int>(n)) != n / d) return "divisor";
  }
  return nullptr;
}

// The plan against all splits by trial, and what one would expect of it.
extern "C" const char* check_decode_plan() {
  for (int64_t slots : {1, 8, 108, 132, 264})
    for (int64_t blocks : {1, 2, 7, 8, 32, 64, 131, 133, 500, 5000})
      for (int tiles : {0, 1, 4, 5, 63, 64, 256, 257, 2048, 8192})
        for (int warps : {2, 4}) {
          const int64_t turns = (tiles + warps - 1) / warps, found = plan_splits(blocks, slots, tiles, warps);
          if (found < 1 || (turns > 0 && found > turns)) return "plan: parts without keys";
          if (found == 1 && turns < 2) continue;
          const auto cost = [&](int64_t n) { return split_cost(n, (blocks * n + slots - 1) / slots, turns); };
          for (int64_t n = 1; n <= std::min<int64_t>(turns, 4 * slots / blocks); ++n)
            if (cost(n) < cost(found) || (cost(n) == cost(found) && n < found)) return "plan: a better split exists";
        }
  if (plan_splits(500, 264, 1024, 4) != 1) return "plan: a full device splits";
  if (plan_splits(8, 264, 8192, 4) < 31) return "plan: an empty device is not filled";
  return nullptr;
}
