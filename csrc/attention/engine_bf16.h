// The arithmetic of the attention bodies in bf16 products with fp32 accumulation (AMX tiles or AVX512-BF16 dots).
//
// As in the fp32 engine keys run down and queries run across. The transposed form pays twice here: the softmax is
// vertical, and two finished rows of P^T, converted together, are already the pair layout that the next product
// reads, so probabilities never go through a transposition.
#pragma once

#include "attention/kernel.h"
#include "core/cpu/gemm_bf16.h"
#include "core/cpu/pack_bf16.h"
#include "core/cpu/simd.h"

namespace effkern {
namespace EFFKERN_UNIT {

using attention::KeyPack;
using attention::Problem;
using attention::Rows;

// Two rows of fp32 as one row of bf16 pairs, and the first of them alone as the low half of the conversion.
EFFKERN_INLINE __m512i pair_words(Vec even, Vec odd) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);  // even in the low 256 bits
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, both);
}

struct EngineBf16 {
  using Element = Bf16;
  using Packed = Bf16;
  using Session = ProductSession;

  static constexpr int64_t kQueryTile = 32;
  static constexpr int64_t kKeyTile = 128;
  static constexpr int64_t kBackwardQueryTile = 64;
  static constexpr int64_t kBackwardKeyTile = 64;
  static constexpr int64_t kMostQueries = 64;
  static constexpr int64_t kKeyGranule = 32;   // where a run of keys may begin
  static constexpr int64_t kKeyMultiple = 32;  // depth of one product
  static constexpr int64_t kLaneMultiple = 32;

  static int64_t padded_dim(int64_t dim) { return round_up(dim, 16); }    // as rows or columns of a product
  static int64_t padded_depth(int64_t dim) { return round_up(dim, 32); }  // as its depth

  // Forward: rows of K, then V^T one key tile after the other. Backward: rows of K, K^T by tiles, rows of V.
  struct Layout {
    Bf16 *rows_k, *transposed, *rows_v;
    int64_t bytes;

    Layout(const Problem& p, const void* base, int64_t keys, bool backward) {
      const int64_t padded = round_up(keys, backward ? kBackwardKeyTile : kKeyTile);
      rows_k = static_cast<Bf16*>(const_cast<void*>(base));
      transposed = rows_k + padded * padded_depth(p.head_dim);
      rows_v = transposed + padded * padded_dim(backward ? p.head_dim : p.value_dim);
      const int64_t v_elements = backward ? padded * padded_depth(p.value_dim) : 0;
      bytes = ((rows_v - rows_k) + v_elements) * static_cast<int64_t>(sizeof(Bf16));
    }

    // The transposed columns from `key` on, up to the end of the tile that holds it.
    const Bf16* transposed_tile(int64_t key, int64_t height, int64_t tile) const {
      return transposed + key / tile * tile * height + key % tile;
    }
  };

  static int64_t key_bytes(const Problem& p, int64_t keys, bool backward) {
    return Layout(p, nullptr, keys, backward).bytes;
  }

  static void pack_keys(const KeyPack& args) {
    const Problem& p = args.problem;
    const Layout layout(p, args.packed, args.keys, args.backward);
    const int64_t tile = args.backward ? kBackwardKeyTile : kKeyTile;
    const int64_t k_depth = padded_depth(p.head_dim), v_depth = padded_depth(p.value_dim);
    for (int64_t key = args.begin; key < args.end; key += tile) {
      const int64_t count = min64(tile, args.end - key);
      const Bf16* k = static_cast<const Bf16*>(args.k.data) + key * args.k.stride;
      const Bf16* v = static_cast<const Bf16*>(args.v.data) + key * args.v.stride;
      copy_rows(k, args.k.stride, count, p.head_dim, tile, k_depth, layout.rows_k + key * k_depth);
      if (args.backward) {
        const int64_t height = padded_dim(p.head_dim);
        transpose_rows(k, args.k.stride, count, p.head_dim, tile, height, layout.transposed + key * height);
        copy_rows(v, args.v.stride, count, p.value_dim, tile, v_depth, layout.rows_v + key * v_depth);
      } else {
        const int64_t height = padded_dim(p.value_dim);
        transpose_rows(v, args.v.stride, count, p.value_dim, tile, height, layout.transposed + key * height);
      }
    }
  }

  // --- forward -----------------------------------------------------------------------------------------------

  struct Keys {
    Layout layout;
    Keys(const Problem& p, Rows, Rows, const void* packed, int64_t keys) : layout(p, packed, keys, false) {}
  };

  static int64_t query_operand_bytes(int64_t dim, int64_t lanes) {
    return padded_depth(dim) * lanes * static_cast<int64_t>(sizeof(Bf16));
  }

  static void pack_query_operand(Rows rows, int64_t queries, int64_t dim, int64_t lanes, bool negate, void* packed) {
    transpose_pairs(static_cast<const Bf16*>(rows.data), rows.stride, queries, dim, lanes, padded_depth(dim), negate,
                    static_cast<Bf16*>(packed));
  }

  static void scores(const Problem& p, const Keys& keys, int64_t begin, int64_t count, const void* query_operand,
                     int64_t lanes, float* s) {
    const int64_t depth = padded_depth(p.head_dim);
    gemm_bf16<false>(round_up(count, 16), lanes, depth, keys.layout.rows_k + begin * depth, depth,
                     static_cast<const Bf16*>(query_operand), lanes, s, lanes);
  }

  static int64_t probability_bytes(int64_t keys, int64_t lanes) {
    return round_up(keys, kKeyMultiple) * lanes * static_cast<int64_t>(sizeof(Bf16));
  }
  static Bf16* probabilities(float*, void* buffer) { return static_cast<Bf16*>(buffer); }

  static inline __attribute__((always_inline)) void store_pair(Bf16* p, int64_t lanes, int64_t key, int64_t lane,
                                                               Vec even, Vec odd) {
    _mm512_storeu_si512(p + key * lanes + lane * 2, pair_words(even, odd));
  }

  template <bool kAccumulate>
  static void add_values(const Problem& p, const Keys& keys, int64_t begin, int64_t count, const Bf16* probabilities,
                         int64_t lanes, float* o) {
    const int64_t height = padded_dim(p.value_dim);
    gemm_bf16<kAccumulate>(height, lanes, round_up(count, kKeyMultiple),
                           keys.layout.transposed_tile(begin, height, kKeyTile), kKeyTile, probabilities, lanes, o,
                           lanes);
  }

  // --- backward ----------------------------------------------------------------------------------------------

  static int64_t query_rows_bytes(int64_t dim, int64_t lanes) {
    return padded_dim(dim) * lanes * static_cast<int64_t>(sizeof(Bf16));
  }

  static void pack_query_rows(Rows rows, int64_t queries, int64_t dim, void* packed) {
    interleave_rows(static_cast<const Bf16*>(rows.data), rows.stride, queries, dim, round_up(queries, kLaneMultiple),
                    padded_dim(dim), static_cast<Bf16*>(packed));
  }

  static int64_t gradient_bytes(int64_t keys, int64_t lanes) {
    return 3 * round_up(keys, kKeyMultiple) * lanes * static_cast<int64_t>(sizeof(Bf16));
  }

  // P^T and dS^T as rows (A operands of grad_v and grad_k) and dS^T in pairs (B operand of grad_q).
  struct Gradients {
    Bf16 *p, *ds, *ds_pairs;

    Gradients(float*, float*, void* buffer, int64_t lanes) : p(static_cast<Bf16*>(buffer)) {
      ds = p + kBackwardKeyTile * lanes;
      ds_pairs = ds + kBackwardKeyTile * lanes;
    }

    void add_to_values(const void* rows, int64_t keys, int64_t, int64_t lanes, int64_t columns, float* grad_v) const {
      gemm_bf16<true>(round_up(keys, 16), columns, lanes, p, lanes, static_cast<const Bf16*>(rows), columns, grad_v,
                      columns);
    }
    void add_to_keys(const void* rows, int64_t keys, int64_t, int64_t lanes, int64_t columns, float* grad_k) const {
      gemm_bf16<true>(round_up(keys, 16), columns, lanes, ds, lanes, static_cast<const Bf16*>(rows), columns, grad_k,
                      columns);
    }
  };

  static inline __attribute__((always_inline)) void store_gradient_pair(const Gradients& g, int64_t lanes, int64_t key,
                                                                        int64_t lane, Vec even, Vec odd, Vec grad_even,
                                                                        Vec grad_odd) {
    store_full(g.p + key * lanes + lane, even);
    store_full(g.p + (key + 1) * lanes + lane, odd);
    store_full(g.ds + key * lanes + lane, grad_even);
    store_full(g.ds + (key + 1) * lanes + lane, grad_odd);
    _mm512_storeu_si512(g.ds_pairs + key * lanes + lane * 2, pair_words(grad_even, grad_odd));
  }

  struct BackwardKeys {
    Layout layout;
    int64_t begin, count, k_depth, v_depth, height;

    BackwardKeys(const Problem& p, Rows, Rows, const void* packed, int64_t keys, int64_t key_begin, int64_t key_count)
        : layout(p, packed, keys, true),
          begin(key_begin),
          count(key_count),
          k_depth(padded_depth(p.head_dim)),
          v_depth(padded_depth(p.value_dim)),
          height(padded_dim(p.head_dim)) {}

    void scores(const void* query_operand, int64_t lanes, float* s) const {
      gemm_bf16<false>(round_up(count, 16), lanes, k_depth, layout.rows_k + begin * k_depth, k_depth,
                       static_cast<const Bf16*>(query_operand), lanes, s, lanes);
    }
    void grad_probabilities(const void* grad_out_operand, int64_t lanes, float* grad_p) const {
      gemm_bf16<false>(round_up(count, 16), lanes, v_depth, layout.rows_v + begin * v_depth, v_depth,
                       static_cast<const Bf16*>(grad_out_operand), lanes, grad_p, lanes);
    }
    template <bool kAccumulate>
    void add_to_queries(const Gradients& gradients, int64_t lanes, float* grad_query) const {
      gemm_bf16<kAccumulate>(height, lanes, round_up(count, kKeyMultiple),
                             layout.transposed_tile(begin, height, kBackwardKeyTile), kBackwardKeyTile,
                             gradients.ds_pairs, lanes, grad_query, lanes);
    }
  };
};

}  // namespace EFFKERN_UNIT
}  // namespace effkern
