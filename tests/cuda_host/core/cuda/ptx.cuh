// A software model of one thread block behind the functions of csrc/core/cuda/ptx.cuh. Found first on the include path,
// it lets whole kernels run on the CPU.
//
// Threads are fibers, scheduled in random order. Warp-wide instructions and barriers block until the last thread
// arrives; that one does the work of all. An asynchronous copy lands at once or only when its thread waits for it, by
// lot, so a missing wait or barrier shows as wrong numbers. Shared memory starts as NaN, and every access is checked.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "model.h"

#define EFFKERN_DEVICE inline

namespace effkern::cuda {

struct Bf16 {};
struct Fp16 {};

struct alignas(16) Vector16 {
  uint32_t words[4];
};

inline float widen(uint16_t bits, Bf16) { return model::bits_to_float(uint32_t{bits} << 16); }
inline float widen(uint16_t bits, Fp16) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent     ? std::ldexp(1024.f + fraction, exponent - 25)
                                    : std::ldexp(static_cast<float>(fraction), -24);
  return bits >> 15 ? -size : size;
}
inline uint16_t round_bits(float value, Bf16) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t round_bits(float value, Fp16) {
  const unsigned sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7e00;
  if (std::fabs(value) >= 65520.f) return static_cast<uint16_t>(sign | 0x7c00);
  int exponent;
  std::frexp(std::fabs(value), &exponent);
  if (std::fabs(value) < 0x1p-14f) exponent = -13;  // all share the spacing of the smallest normal numbers
  const float units = std::nearbyint(std::ldexp(std::fabs(value), 11 - exponent));
  return static_cast<uint16_t>(sign | ((exponent + 13) * 1024 + static_cast<int>(units)));
}
template <class Element>
uint32_t pack(float low, float high, Element element) {
  return round_bits(low, element) | uint32_t{round_bits(high, element)} << 16;
}

struct Pair {
  float low, high;
};
template <class Element>
Pair unpack(uint32_t word, Element element) {
  return {widen(static_cast<uint16_t>(word), element), widen(static_cast<uint16_t>(word >> 16), element)};
}

inline int thread_index() { return model::block().thread(); }
inline int block_index() { return model::block().index; }
inline void sync_block() { model::block().barrier(); }

inline void cp_async_16(uint32_t destination, const void* source, bool valid) {
  model::block().copy_async(destination, source, valid);
}
inline void cp_async_commit() { model::block().commit_copies(); }
template <int kPending>
void cp_async_wait() {
  model::block().wait_copies(kPending);
}

template <class Value>
void store_shared(uint32_t address, const Value& value) {
  std::memcpy(model::block().shared(address, sizeof value), &value, sizeof value);
  model::block().stored(address, sizeof value);
}
inline Vector16 load_shared(uint32_t address) {
  Vector16 v;
  std::memcpy(&v, model::block().shared(address, 16), 16);
  return v;
}
inline Pair load_shared_pair(uint32_t address) {
  Pair pair;
  std::memcpy(&pair, model::block().shared(address, 8), 8);
  return pair;
}
template <class T>
void store_global(T* destination, const Vector16& v) {
  if (model::block().check_global(destination)) std::memcpy(destination, &v, 16);
}

inline Vector16 load_global(const uint16_t* source) {
  Vector16 v{};
  if (model::block().check_global(source)) std::memcpy(&v, source, 16);
  return v;
}

struct MatrixLoad {
  uint32_t address, *words;
  bool transposed;
};

inline void load_matrices(const std::array<MatrixLoad*, 32>& lanes) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t element[8][8];
    unsigned bank_groups = 0;
    for (int row = 0; row < 8; ++row) {
      const uint32_t address = lanes[matrix * 8 + row]->address;
      std::memcpy(element[row], model::block().shared(address, 16), 16);
      bank_groups |= 1u << address / 16 % 8;
    }
    if (bank_groups != 0xff) model::block().fail("ldmatrix has a bank conflict");
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = 2 * (lane % 4);
      const bool t = lanes[lane]->transposed;
      const uint16_t low = t ? element[column][row] : element[row][column];
      const uint16_t high = t ? element[column + 1][row] : element[row][column + 1];
      lanes[lane]->words[matrix] = low | uint32_t{high} << 16;
    }
  }
}
inline void ldmatrix_x4(uint32_t (&matrices)[4], uint32_t address) {
  MatrixLoad mine{address, matrices, false};
  model::block().warp_wide(mine, load_matrices);
}
inline void ldmatrix_x4_transposed(uint32_t (&matrices)[4], uint32_t address) {
  MatrixLoad mine{address, matrices, true};
  model::block().warp_wide(mine, load_matrices);
}

template <class Element>
struct Product {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

template <class Element>
void multiply_fragments(const std::array<Product<Element>*, 32>& lanes) {
  const auto half = [](uint32_t word, int i) { return widen(static_cast<uint16_t>(word >> 16 * i), Element{}); };
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, column = 2 * (lane % 4);
    for (int i = 0; i < 2; ++i) {
      for (int word = 0; word < 4; ++word)
        a[group + 8 * (word % 2)][column + i + 8 * (word / 2)] = half(lanes[lane]->a[word], i);
      for (int word = 0; word < 2; ++word) b[column + i + 8 * word][group] = half(lanes[lane]->b[word], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
      float sum = 0;
      for (int depth = 0; depth < 16; ++depth) sum += a[row][depth] * b[depth][column];
      lanes[lane]->c[e] += sum;
    }
}
template <class Element>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Element) {
  Product<Element> mine{c, a, {b0, b1}};
  model::block().warp_wide(mine, multiply_fragments<Element>);
}

struct Shuffle {
  float value, result;
  int mask;
};
inline void exchange(const std::array<Shuffle*, 32>& lanes) {
  for (int lane = 0; lane < 32; ++lane) lanes[lane]->result = lanes[lane ^ lanes[lane]->mask]->value;
}
inline float shuffle_xor(float value, int mask) {
  Shuffle mine{value, 0, mask};
  model::block().warp_wide(mine, exchange);
  return mine.result;
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal_fast(float x) { return 1.f / x; }

struct Meeting {};
inline void meet(const std::array<Meeting*, 32>&) {}
inline void sync_warp() {
  Meeting mine;
  model::block().warp_wide(mine, meet);
}

struct IndexedShuffle {
  int value, result, lane;
};
inline void gather(const std::array<IndexedShuffle*, 32>& lanes) {
  for (IndexedShuffle* lane : lanes) lane->result = lanes[lane->lane & 31]->value;
}
inline int shuffle(int value, int lane) {
  IndexedShuffle mine{value, 0, lane};
  model::block().warp_wide(mine, gather);
  return mine.result;
}

inline const char* opaque(const char* pointer) { return pointer; }

struct Vote {
  bool vote;
  uint32_t result;
};
inline void count_votes(const std::array<Vote*, 32>& lanes) {
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= uint32_t{lanes[lane]->vote} << lane;
  for (Vote* lane : lanes) lane->result = bits;
}
inline uint32_t ballot(bool vote) {
  Vote mine{vote, 0};
  model::block().warp_wide(mine, count_votes);
  return mine.result;
}

inline void store_shared(uint32_t address, float first, float second) {
  const float pair[2] = {first, second};
  std::memcpy(model::block().shared(address, 8), pair, 8);
}

}  // namespace effkern::cuda
