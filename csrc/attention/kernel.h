// What passes between the attention op (torch side) and the ISA units (raw pointers only).
#pragma once

#include "attention/mask.h"

namespace effkern {
namespace attention {

struct Problem {
  int64_t head_dim, value_dim;
  float scale;
  bool terms;  // scores have terms or weights are dropped: kernels need scratch for them
};

// A matrix with unit stride along its columns. The stride counts elements.
struct Rows {
  const void* data;
  int64_t stride;
};

// A run of keys [begin, end) that a query tile visits tile by tile, begin a multiple of the unit's key granule.
// Runs keep a list short (two entries for causal) however long the sequence.
struct KeyRun {
  int64_t begin, end;
  int32_t first_rank;  // key tiles in the runs before, where all runs begin and end with a tile
  int32_t partial;     // 1: some (query, key) pair inside is masked, so its tiles need the mask
};

// The same from the key side: query tiles [first, last) that visit a key tile.
struct QueryRun {
  int32_t first, last;
  int32_t partial;
};

// Convert the keys [begin, end) of one (sequence, kv head) into the unit's own layout. `begin` is a multiple of the
// key tile. Units that read the caller's tensors directly need no packing and say so by key_bytes() == 0.
struct KeyPack {
  Problem problem;
  Rows k, v;
  int64_t keys, begin, end;
  bool backward;
  void* packed;
};

struct ForwardTile {
  Problem problem;
  Rows q;               // first row of the tile
  int64_t queries;      // rows in the tile
  int64_t first_query;  // its index within the sequence
  const Mask* mask;
  const Terms* terms;
  Rows k, v;  // the whole sequence
  const void* packed_keys;
  const KeyRun* runs;
  int64_t run_count;
  void* out;  // row stride value_dim
  float* lse;
  void* scratch;
};

// The query side of one tile of the backward pass, packed once and read by every key tile that visits it.
struct QueryPack {
  Problem problem;
  Rows q, grad_out, out;
  const float* lse;
  const float* grad_lse;  // may be null
  int64_t queries, query_tile;
  float* delta;  // out: rowsum(dO O) - dLSE
  void* packed;
};

// One query head of the backward pass.
struct BackwardHead {
  const Mask* mask;
  const Terms* terms;
  // By key tile, the query tiles that visit it.
  const QueryRun* query_runs;
  const int64_t* query_runs_first;
  // By query tile, the keys it visits: they fix the order in which key tiles add to a query gradient.
  const KeyRun* key_runs;
  const int64_t* key_runs_first;
};

// One key tile of the backward pass: accumulates grad_k and grad_v over the heads of the group, and adds its share
// of grad_q to the packed query tiles in list order.
struct BackwardTile {
  Problem problem;
  Rows k, v;
  const void* packed_keys;
  int64_t all_keys, key_begin, keys;  // of the sequence; in this tile
  int64_t query_tile, key_tile;       // at most the unit's own
  const BackwardHead* heads;
  int64_t group, queries, query_tiles;
  char* packed_queries;  // (group, query_tiles) blocks of query_bytes
  int* progress;         // (group, query_tiles) key tiles that have added to the query tile
  void* grad_q;          // first head of the group, row stride head_dim
  int64_t grad_q_head_stride;
  void* grad_k;  // row stride head_dim
  void* grad_v;  // row stride value_dim
  void* scratch;
};

// Everything one ISA unit offers for one dtype.
struct Kernels {
  const char* forward_path;
  const char* backward_path;
  int64_t query_tile, key_tile;  // the usual ones
  int64_t backward_query_tile, backward_key_tile;
  // A mask with blocks of its own may ask for other tiles: multiples of the granules up to the most.
  int64_t most_queries, query_granule, key_granule;
  int64_t (*key_bytes)(const Problem&, int64_t keys, bool backward);
  int64_t (*query_bytes)(const Problem&, int64_t query_tile);
  int64_t (*forward_scratch_bytes)(const Problem&);
  int64_t (*backward_scratch_bytes)(const Problem&);
  void (*pack_keys)(const KeyPack&);
  void (*forward)(const ForwardTile&);
  void (*pack_queries)(const QueryPack&);
  void (*backward)(const BackwardTile&);
};

// One function a unit; the AVX-512 BF16 and AMX units know bf16 only.
const Kernels& kernels_scalar(Dtype dtype);
const Kernels& kernels_avx2(Dtype dtype);
const Kernels& kernels_avx512(Dtype dtype);
const Kernels& kernels_avx512_bf16();
const Kernels& kernels_amx();

}  // namespace attention
}  // namespace effkern
