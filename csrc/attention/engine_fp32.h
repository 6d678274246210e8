// The arithmetic of the attention bodies in fp32 vectors, for every input dtype of a unit without tile registers.
//
// Keys run down, queries run across: scores are S^T (keys x queries) and outputs O^T (value_dim x queries), so that
// maxima, sums and rescaling are vertical vector operations, and K and V are read as scalars in the caller's own
// layout. Only the query side, which is small, is transposed.
#pragma once

#include "attention/kernel.h"
#include "core/cpu/gemm_vector.h"
#include "core/cpu/pack.h"
#include "core/cpu/simd.h"

namespace effkern {
namespace EFFKERN_UNIT {

using attention::KeyPack;
using attention::Problem;
using attention::Rows;

template <class T>
struct EngineFp32 {
  using Element = T;
  using Packed = float;  // what the products read

  static constexpr int64_t kQueryTile = kMicroVectors * kLanes * (kLanes >= 16 ? 1 : 2);  // 48 queries, 24 portable
  static constexpr int64_t kKeyTile = 64;
  static constexpr int64_t kBackwardQueryTile = kQueryTile;
  static constexpr int64_t kBackwardKeyTile = 64;
  static constexpr int64_t kMostQueries = 64;
  static constexpr int64_t kKeyGranule = 16;  // where a run of keys may begin
  static constexpr int64_t kKeyMultiple = 2;  // rows of S^T are finished in pairs
  static constexpr int64_t kLaneMultiple = kLanes;
  static constexpr bool kDirect = sizeof(T) == sizeof(float);

  struct Session {};  // per-call processor state: none

  // Columns of a matrix that serves as B operand, and rows of one whose vectors are transposed on the way out.
  static int64_t padded_dim(int64_t dim) { return round_up(dim, kLanes); }

  static int64_t key_bytes(const Problem& p, int64_t keys, bool) {
    return kDirect ? 0 : keys * (p.head_dim + p.value_dim) * static_cast<int64_t>(sizeof(float));
  }

  static void pack_keys(const KeyPack& args) {
    if constexpr (!kDirect) {
      const Problem& p = args.problem;
      float* k = static_cast<float*>(args.packed);
      float* v = k + args.keys * p.head_dim;
      for (int64_t key = args.begin; key < args.end; ++key) {
        convert_row(static_cast<const T*>(args.k.data) + key * args.k.stride, p.head_dim, k + key * p.head_dim);
        convert_row(static_cast<const T*>(args.v.data) + key * args.v.stride, p.value_dim, v + key * p.value_dim);
      }
    }
  }

  // Keys and values of one sequence as fp32 matrices.
  struct Keys {
    const float *k, *v;
    int64_t k_stride, v_stride;

    Keys(const Problem& p, Rows k_rows, Rows v_rows, const void* packed, int64_t keys) {
      if constexpr (kDirect) {
        k = static_cast<const float*>(k_rows.data);
        v = static_cast<const float*>(v_rows.data);
        k_stride = k_rows.stride;
        v_stride = v_rows.stride;
      } else {
        k = static_cast<const float*>(packed);
        v = k + keys * p.head_dim;
        k_stride = p.head_dim;
        v_stride = p.value_dim;
      }
    }
  };

  // --- forward -----------------------------------------------------------------------------------------------

  static int64_t query_operand_bytes(int64_t dim, int64_t lanes) { return dim * lanes * sizeof(float); }

  // The transposed query tile: B operand of the score product.
  static void pack_query_operand(Rows rows, int64_t queries, int64_t dim, int64_t lanes, bool negate, void* packed) {
    pack_transposed(static_cast<const T*>(rows.data), rows.stride, queries, dim, lanes, negate,
                    static_cast<float*>(packed), lanes);
  }

  // S^T[key][lane] = sum_d K[key][d] Q[lane][d] for keys [begin, begin + count)
  static void scores(const Problem& p, const Keys& keys, int64_t begin, int64_t count, const void* query_operand,
                     int64_t lanes, float* s) {
    gemm_vector<Fp32Product, false>(count, lanes, p.head_dim, {keys.k + begin * keys.k_stride, keys.k_stride, 1},
                                    static_cast<const float*>(query_operand), lanes, s, lanes);
  }

  // Probabilities stay where the scores were.
  static int64_t probability_bytes(int64_t, int64_t) { return 0; }
  static float* probabilities(float* s, void*) { return s; }
  static inline __attribute__((always_inline)) void store_pair(float* p, int64_t lanes, int64_t key, int64_t lane,
                                                               Vec even, Vec odd) {
    vstore(p + key * lanes + lane, even);
    vstore(p + (key + 1) * lanes + lane, odd);
  }

  // O^T[d][lane] (+)= sum_key V[key][d] P^T[key][lane]
  template <bool kAccumulate>
  static void add_values(const Problem& p, const Keys& keys, int64_t begin, int64_t count, const float* probabilities,
                         int64_t lanes, float* o) {
    gemm_vector<Fp32Product, kAccumulate>(p.value_dim, lanes, count, {keys.v + begin * keys.v_stride, 1, keys.v_stride},
                                          probabilities, lanes, o, lanes);
  }

  // --- backward ----------------------------------------------------------------------------------------------

  // Rows of Q or dO as B operand: whole vectors, so the head dimension is padded with zeros.
  static int64_t query_rows_bytes(int64_t dim, int64_t lanes) { return padded_dim(dim) * lanes * sizeof(float); }

  static void pack_query_rows(Rows rows, int64_t queries, int64_t dim, void* packed) {
    const T* source = static_cast<const T*>(rows.data);
    float* target = static_cast<float*>(packed);
    for (int64_t row = 0; row < queries; ++row)
      for (int64_t d = 0; d < dim; d += kLanes)
        vstore(target + row * padded_dim(dim) + d, load_some(source + row * rows.stride + d, dim - d));
  }

  static int64_t gradient_bytes(int64_t, int64_t) { return 0; }

  // P^T and dS^T, in place of the scores and of dP^T.
  struct Gradients {
    float *p, *ds;

    Gradients(float* scores, float* grad_scores, void*, int64_t) : p(scores), ds(grad_scores) {}

    // grad_v[key][d] += sum_query P^T[key][query] dO[query][d]
    void add_to_values(const void* rows, int64_t keys, int64_t queries, int64_t lanes, int64_t columns,
                       float* grad_v) const {
      gemm_vector<Fp32Product, true>(keys, columns, queries, {p, lanes, 1}, static_cast<const float*>(rows), columns,
                                     grad_v, columns);
    }
    // grad_k[key][d] += sum_query dS^T[key][query] Q[query][d]
    void add_to_keys(const void* rows, int64_t keys, int64_t queries, int64_t lanes, int64_t columns,
                     float* grad_k) const {
      gemm_vector<Fp32Product, true>(keys, columns, queries, {ds, lanes, 1}, static_cast<const float*>(rows), columns,
                                     grad_k, columns);
    }
  };

  static inline __attribute__((always_inline)) void store_gradient_pair(const Gradients& g, int64_t lanes, int64_t key,
                                                                        int64_t lane, Vec even, Vec odd, Vec grad_even,
                                                                        Vec grad_odd) {
    store_pair(g.p, lanes, key, lane, even, odd);
    store_pair(g.ds, lanes, key, lane, grad_even, grad_odd);
  }

  // The key side of one key tile.
  struct BackwardKeys {
    Keys all;
    int64_t begin, count, head_dim, value_dim;

    BackwardKeys(const Problem& p, Rows k, Rows v, const void* packed, int64_t keys, int64_t key_begin,
                 int64_t key_count)
        : all(p, k, v, packed, keys),
          begin(key_begin),
          count(key_count),
          head_dim(p.head_dim),
          value_dim(p.value_dim) {}

    void scores(const void* query_operand, int64_t lanes, float* s) const {
      gemm_vector<Fp32Product, false>(count, lanes, head_dim, {all.k + begin * all.k_stride, all.k_stride, 1},
                                      static_cast<const float*>(query_operand), lanes, s, lanes);
    }
    // dP^T[key][lane] = sum_d V[key][d] dO[lane][d]
    void grad_probabilities(const void* grad_out_operand, int64_t lanes, float* grad_p) const {
      gemm_vector<Fp32Product, false>(count, lanes, value_dim, {all.v + begin * all.v_stride, all.v_stride, 1},
                                      static_cast<const float*>(grad_out_operand), lanes, grad_p, lanes);
    }
    // grad_q^T[d][lane] (+)= sum_key K[key][d] dS^T[key][lane]
    template <bool kAccumulate>
    void add_to_queries(const Gradients& gradients, int64_t lanes, float* grad_query) const {
      gemm_vector<Fp32Product, kAccumulate>(head_dim, lanes, count, {all.k + begin * all.k_stride, 1, all.k_stride},
                                            gradients.ds, lanes, grad_query, lanes);
    }
  };
};

}  // namespace EFFKERN_UNIT
}  // namespace effkern
