// The instructions the tile vocabulary is built from, one function each, and the only file with assembly.
//
// Nothing above this header touches a CUDA built-in, so the tests swap this one file for a software model of a
// thread block and run whole kernels on the CPU (tests/cuda_host/core/cuda/ptx.cuh has the same functions).
#pragma once

#include <cstdint>

#define EFFKERN_DEVICE __device__ __forceinline__

namespace effkern::cuda {

// Element types by name; kernels keep elements as raw 16-bit words.
struct Bf16 {};
struct Fp16 {};

struct alignas(16) Vector16 {
  uint32_t words[4];
};

// Volatile, so that what is derived from them is computed again where it is used: the compiler would otherwise keep it
// over whole loops, in registers that the accumulators need.
EFFKERN_DEVICE int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  __builtin_assume(index >= 0 && index < 1024);
  return index;
}

EFFKERN_DEVICE int block_index() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  __builtin_assume(index >= 0);
  return index;
}

EFFKERN_DEVICE void sync_block() { __syncthreads(); }

// Shared memory is addressed by 32-bit byte addresses throughout.
EFFKERN_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts a 16-byte copy from global to shared memory past the registers and L1. Where `valid` is false nothing is
// read and the destination becomes zero.
EFFKERN_DEVICE void cp_async_16(uint32_t destination, const void* source, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination),
               "l"(__cvta_generic_to_global(source)), "r"(bytes)
               : "memory");
}

EFFKERN_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are still under way.
template <int kPending>
EFFKERN_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

EFFKERN_DEVICE void store_shared(uint32_t address, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}

EFFKERN_DEVICE void store_shared(uint32_t address, const Vector16& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.words[0]), "r"(v.words[1]),
               "r"(v.words[2]), "r"(v.words[3])
               : "memory");
}

EFFKERN_DEVICE Vector16 load_shared(uint32_t address) {
  Vector16 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "r"(address)
               : "memory");
  return v;
}

struct Pair {
  float low, high;
};

// Two consecutive floats.
EFFKERN_DEVICE Pair load_shared_pair(uint32_t address) {
  Pair pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.low), "=f"(pair.high) : "r"(address) : "memory");
  return pair;
}

template <class T>
EFFKERN_DEVICE void store_global(T* destination, const Vector16& v) {
  *reinterpret_cast<Vector16*>(destination) = v;
}

EFFKERN_DEVICE Vector16 load_global(const uint16_t* source) { return *reinterpret_cast<const Vector16*>(source); }

// Four 8x8 matrices of 16-bit elements. Lanes 8i..8i+7 give the addresses of the rows of matrix i; lane l receives
// elements 2(l % 4) and 2(l % 4) + 1 of row l / 4 of each.
EFFKERN_DEVICE void ldmatrix_x4(uint32_t (&matrices)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

// The same with each matrix transposed on the way.
EFFKERN_DEVICE void ldmatrix_x4_transposed(uint32_t (&matrices)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

// c (16x8, fp32) += a (16x16) b (16x8), spread over the warp.
EFFKERN_DEVICE void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

EFFKERN_DEVICE void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Fp16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounds two floats to nearest even; `low` lands in the low half, the element with the smaller index.
EFFKERN_DEVICE uint32_t pack(float low, float high, Bf16) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

EFFKERN_DEVICE uint32_t pack(float low, float high, Fp16) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// The two elements of a word as floats.
EFFKERN_DEVICE Pair unpack(uint32_t word, Bf16) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

EFFKERN_DEVICE Pair unpack(uint32_t word, Fp16) {
  Pair pair;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
      : "=f"(pair.low), "=f"(pair.high)
      : "r"(word));
  return pair;
}

// The value of the lane whose index differs by the bits of `mask`.
EFFKERN_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// 2^x, log2(x) and 1/x to about two units in the last place; subnormal results become zero.
EFFKERN_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

EFFKERN_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

EFFKERN_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The lanes of a warp wait for each other and see what each has written to shared memory.
EFFKERN_DEVICE void sync_warp() { __syncwarp(); }

// The value of another lane.
EFFKERN_DEVICE int shuffle(int value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// The same pointer, which the compiler has to keep: it would otherwise put it together anew at every use.
EFFKERN_DEVICE const char* opaque(const char* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

// One bit a lane.
EFFKERN_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }

EFFKERN_DEVICE void store_shared(uint32_t address, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(first), "f"(second) : "memory");
}

}  // namespace effkern::cuda
