// Instructions of compute capability 9.0a: barriers in shared memory, bulk copies, warpgroup products. With ptx.cuh the
// only file with assembly; the tests swap both for a software model (tests/cuda_host/core/cuda).
#pragma once

#include "core/cuda/ptx.cuh"

namespace effkern::cuda {

constexpr int kWarpgroup = 128;  // threads that issue one wgmma together

// A tensor as the copy engine sees it, made on the host (tensor_map.h) and passed to kernels by value.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// How the copy engine and wgmma permute 16-byte chunks: within 8 rows of 128 bytes, or of 64.
enum class Swizzle : int { k128B = 1, k64B = 2 };

// ---- barriers in shared memory: a phase ends when all arrivals and all announced bytes are in ----------------------

EFFKERN_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine; a block barrier has to follow.
EFFKERN_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

EFFKERN_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

EFFKERN_DEVICE void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Returns when the phase of this parity has ended. The phase before the first one counts as ended, with parity 1.
EFFKERN_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra READY;\n"
      "bra WAIT;\n"
      "READY:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ---- named barriers: some threads of the block, in multiples of a warp ----------------------------------------------

EFFKERN_DEVICE void named_barrier_sync(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

EFFKERN_DEVICE void named_barrier_arrive(int name, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// ---- bulk copies: one thread starts them, the copy engine does them -------------------------------------------------

// What this thread wrote to shared memory becomes visible to wgmma and to the copy engine.
EFFKERN_DEVICE void fence_shared_to_engines() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

EFFKERN_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box at (column, row, head, batch) of a tensor; what lies outside the tensor becomes zero. The bytes of the whole
// box count towards the barrier.
EFFKERN_DEVICE void bulk_load_4d(uint32_t destination, const TensorMap* map, int column, int row, int head, int batch,
                                 uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// Consecutive bytes. Addresses and `bytes` are multiples of 16.
EFFKERN_DEVICE void bulk_load_bytes(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
      "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(barrier)
      : "memory");
}

// From a tile to a tensor; what lies outside the tensor is not written.
EFFKERN_DEVICE void bulk_store_4d(const TensorMap* map, int column, int row, int head, int batch, uint32_t source) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(source), "r"(column), "r"(row), "r"(head), "r"(batch)
               : "memory");
}

// Adds floats in shared memory to floats in global memory, in no particular order. 16-byte aligned.
EFFKERN_DEVICE void bulk_add(float* destination, uint32_t source, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(destination)),
               "r"(source), "r"(bytes)
               : "memory");
}

EFFKERN_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until the engine has read the shared memory of all but this thread's last kPending groups of stores.
template <int kPending>
EFFKERN_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// ---- registers of a warpgroup
// ------------------------------------------------------------------------------------------

template <int kRegisters>
EFFKERN_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
EFFKERN_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- warpgroup products: d (64 x kN, fp32) (+)= a (64 x 16) b (16 x kN) ---------------------------------------------

// Before the first product, and after registers of a product in flight were written by anything else.
EFFKERN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
EFFKERN_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
EFFKERN_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// A product reads and writes its registers until it has been waited for: nothing may move them across this.
EFFKERN_DEVICE void pin(float& value) { asm volatile("" : "+f"(value)::"memory"); }
EFFKERN_DEVICE void pin(uint32_t& value) { asm volatile("" : "+r"(value)::"memory"); }

// A 16-bit matrix in shared memory: start address, and the distances in bytes between panels and between 8 rows.
EFFKERN_DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t panel_bytes, uint32_t rows8_bytes,
                                          Swizzle swizzle) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{panel_bytes >> 4} << 16 | uint64_t{rows8_bytes >> 4} << 32 |
         uint64_t{static_cast<unsigned>(swizzle)} << 62;
}

// clang-format off
#define EFFKERN_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
                      "+f"(d[i + 6]), "+f"(d[i + 7])
#define EFFKERN_D16(i) EFFKERN_D8(i), EFFKERN_D8(i + 8)
#define EFFKERN_D32(i) EFFKERN_D16(i), EFFKERN_D16(i + 16)
#define EFFKERN_D64(i) EFFKERN_D32(i), EFFKERN_D32(i + 32)
#define EFFKERN_D40(i) EFFKERN_D32(i), EFFKERN_D8(i + 32)
#define EFFKERN_D48(i) EFFKERN_D32(i), EFFKERN_D16(i + 32)
#define EFFKERN_D88(i) EFFKERN_D64(i), EFFKERN_D16(i + 64), EFFKERN_D8(i + 80)
#define EFFKERN_D128(i) EFFKERN_D64(i), EFFKERN_D64(i + 64)
#define EFFKERN_N16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define EFFKERN_N32 EFFKERN_N16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define EFFKERN_N40 EFFKERN_N32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define EFFKERN_N48 EFFKERN_N40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define EFFKERN_N64 EFFKERN_N48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define EFFKERN_N88 EFFKERN_N64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83," \
                                "%84,%85,%86,%87"
#define EFFKERN_N128 EFFKERN_N88 ",%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,"  \
                                 "%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121," \
                                 "%122,%123,%124,%125,%126,%127"
// clang-format on

// One specialisation a width and an element type: R registers of d, numbered from 0; then the operands A, B, ...
// follow.
template <class Element, int kN>
struct Wgmma;

#define EFFKERN_WGMMA(ELEMENT, TYPE, N, R, A, B, C, D, E, F, G)                                               \
  template <>                                                                                                 \
  struct Wgmma<ELEMENT, N> {                                                                                  \
    template <int kTransposeA, int kTransposeB>                                                               \
    EFFKERN_DEVICE static void shared(float (&d)[R], uint64_t a, uint64_t b, int accumulate) {                \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " C                                                      \
                   ", 0;\n"                                                                                   \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" EFFKERN_N##R          \
                   "}, " A ", " B ", p, 1, 1, " D ", " E ";\n}"                                               \
                   : EFFKERN_D##R(0)                                                                          \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeA), "n"(kTransposeB));                    \
    }                                                                                                         \
    template <int kTransposeB>                                                                                \
    EFFKERN_DEVICE static void registers(float (&d)[R], const uint32_t (&a)[4], uint64_t b, int accumulate) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " F                                                      \
                   ", 0;\n"                                                                                   \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" EFFKERN_N##R          \
                   "}, {" A ", " B ", " C ", " D "}, " E ", p, 1, 1, " G ";\n}"                               \
                   : EFFKERN_D##R(0)                                                                          \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransposeB));  \
    }                                                                                                         \
  };
#define EFFKERN_WGMMA_TYPES(...) EFFKERN_WGMMA(Bf16, "bf16", __VA_ARGS__) EFFKERN_WGMMA(Fp16, "f16", __VA_ARGS__)

EFFKERN_WGMMA_TYPES(32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
EFFKERN_WGMMA_TYPES(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
EFFKERN_WGMMA_TYPES(80, 40, "%40", "%41", "%42", "%43", "%44", "%45", "%46")
EFFKERN_WGMMA_TYPES(96, 48, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
EFFKERN_WGMMA_TYPES(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
EFFKERN_WGMMA_TYPES(176, 88, "%88", "%89", "%90", "%91", "%92", "%93", "%94")
EFFKERN_WGMMA_TYPES(256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

#undef EFFKERN_WGMMA_TYPES
#undef EFFKERN_WGMMA

// Both operands in shared memory, or the left one in registers. `kTranspose`: the operand is stored with the other
// index along its rows than the product's depth.
template <int kTransposeA, int kTransposeB, class Element, int kRegisters>
EFFKERN_DEVICE void wgmma_shared(float (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate, Element) {
  Wgmma<Element, kRegisters * 2>::template shared<kTransposeA, kTransposeB>(d, a, b, accumulate);
}

template <int kTransposeB, class Element, int kRegisters>
EFFKERN_DEVICE void wgmma_registers(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, bool accumulate,
                                    Element) {
  Wgmma<Element, kRegisters * 2>::template registers<kTransposeB>(d, a, b, accumulate);
}

}  // namespace effkern::cuda
