// The software model behind the functions of csrc/core/cuda/ptx_sm90.cuh.
#pragma once

#include "core/cuda/ptx.cuh"
#include "hopper.h"

namespace effkern::cuda {

constexpr int kWarpgroup = 128;

enum class Swizzle : int { k128B = 1, k64B = 2 };

// Here the fields lie open; `opaque` keeps the size.
struct alignas(64) TensorMap {
  union {
    uint64_t opaque[16];
    struct {
      char* data;
      int64_t size[4], stride[4];  // column, row, head, batch; strides in bytes
      int box_rows, box_columns;
      Swizzle swizzle;
    };
  };
};
static_assert(sizeof(TensorMap) == 128);

inline void barrier_init(uint32_t barrier, int arrivals) { model::hopper().init(barrier, arrivals); }
inline void barrier_init_fence() {}
inline void barrier_arrive(uint32_t barrier) { model::hopper().arrive(barrier, 0); }
inline void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) { model::hopper().arrive(barrier, bytes); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) { model::hopper().wait(barrier, parity); }
inline void named_barrier_sync(int name, int threads) { model::hopper().named(name, threads, true); }
inline void named_barrier_arrive(int name, int threads) { model::hopper().named(name, threads, false); }
inline void fence_shared_to_engines() { model::hopper().fence(); }
inline void prefetch_map(const TensorMap*) {}

// Rows of 128 bytes permute their chunks by bits 7-9 of the address, rows of 64 by bits 7-8.
inline uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  return address ^ (address >> 7 & (swizzle == Swizzle::k128B ? 7u : 3u)) << 4;
}

// Calls chunk(shared address, global address or null outside the tensor) for every 16 bytes of a box.
template <class Visit>
void visit_box(const TensorMap& map, uint32_t shared, std::array<int64_t, 4> corner, Visit visit) {
  const int row_bytes = map.box_columns * 2;
  if (shared % 1024 || (map.swizzle == Swizzle::k128B ? row_bytes != 128 : row_bytes != 64))
    model::block().fail("a bulk copy's tile is misaligned or not as wide as its swizzle");
  for (int row = 0; row < map.box_rows; ++row)
    for (int column = 0; column < map.box_columns; column += 8) {
      const std::array<int64_t, 4> at{corner[0] + column, corner[1] + row, corner[2], corner[3]};
      char* global = map.data;
      for (int axis = 0; axis < 4; ++axis) {
        if (at[axis] < 0 || at[axis] >= map.size[axis]) global = nullptr;
        if (global) global += at[axis] * map.stride[axis];
      }
      visit(swizzled(shared + row * row_bytes + column * 2, map.swizzle), global);
    }
}

inline void bulk_load_4d(uint32_t destination, const TensorMap* map, int column, int row, int head, int batch,
                         uint32_t barrier) {
  const std::array<int64_t, 4> corner{column, row, head, batch};
  visit_box(*map, destination, corner,
            [](uint32_t shared, char*) { std::memset(model::block().shared(shared, 16), 0xff, 16); });
  model::block().start_work([=] {
    visit_box(*map, destination, corner, [](uint32_t shared, char* global) {
      if (global && !model::block().check_global(global)) return;
      if (global)
        std::memcpy(model::block().shared(shared, 16), global, 16);
      else
        std::memset(model::block().shared(shared, 16), 0, 16);
    });
    model::hopper().landed(barrier, map->box_rows * map->box_columns * 2);
  });
}

inline void bulk_load_bytes(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier) {
  const char* global = static_cast<const char*>(source);
  for (uint32_t at = 0; at < bytes; at += 16) std::memset(model::block().shared(destination + at, 16), 0xff, 16);
  model::block().start_work([=] {
    for (uint32_t at = 0; at < bytes; at += 16)
      if (model::block().check_global(global + at))
        std::memcpy(model::block().shared(destination + at, 16), global + at, 16);
    model::hopper().landed(barrier, bytes);
  });
}

inline void bulk_store_4d(const TensorMap* map, int column, int row, int head, int batch, uint32_t source) {
  model::hopper().start_store([=] {
    visit_box(*map, source, {column, row, head, batch}, [](uint32_t shared, char* global) {
      if (global && model::block().check_global(global))
        std::memcpy(global, model::hopper().read_by_engine(shared, 16), 16);
    });
  });
}

inline void bulk_add(float* destination, uint32_t source, uint32_t bytes) {
  model::hopper().start_store([=] {
    for (uint32_t at = 0; at < bytes; at += 16) {
      if (!model::block().check_global(destination + at / 4)) return;
      float values[4];
      std::memcpy(values, model::hopper().read_by_engine(source + at, 16), 16);
      for (int i = 0; i < 4; ++i) destination[at / 4 + i] += values[i];
    }
  });
}
inline void bulk_commit() { model::hopper().commit_stores(); }
template <int kPending>
void bulk_wait_read() {
  model::hopper().wait_stores(kPending);
}

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

// ---- products -------------------------------------------------------------------------------------------------------

inline void pin(float&) {}
inline void pin(uint32_t&) {}

inline void commit_for_warp(const std::array<Meeting*, 32>&) { model::hopper().commit_products(); }
template <int kPending>
void wait_for_warp(const std::array<Meeting*, 32>&) {
  model::hopper().wait_products(kPending);
}
inline void wgmma_fence() { model::hopper().warp().fenced = true; }
inline void wgmma_commit() {
  Meeting mine;
  model::block().warp_wide(mine, commit_for_warp);
}
template <int kPending>
void wgmma_wait() {
  Meeting mine;
  model::block().warp_wide(mine, wait_for_warp<kPending>);
}

inline uint64_t matrix_descriptor(uint32_t address, uint32_t panel_bytes, uint32_t rows8_bytes, Swizzle swizzle) {
  return uint64_t{address >> 4} | uint64_t{panel_bytes >> 4} << 16 | uint64_t{rows8_bytes >> 4} << 32 |
         uint64_t{static_cast<unsigned>(swizzle)} << 62;
}

// Element (line, depth) of a matrix behind a descriptor: lines are rows of a left and columns of a right operand.
template <class Element>
float described(uint64_t descriptor, bool transposed, int line, int depth) {
  const uint32_t start = (descriptor & 0x3fff) << 4, panel = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t rows8 = (descriptor >> 32 & 0x3fff) << 4;
  const auto swizzle = static_cast<Swizzle>(descriptor >> 62);
  const int width = swizzle == Swizzle::k128B ? 64 : 32;
  const int row = transposed ? depth : line, column = transposed ? line : depth;
  const uint32_t at = start + column / width * panel + row / 8 * rows8 + row % 8 * width * 2 + column % width * 2;
  const uint32_t address = swizzled(at, swizzle);
  uint16_t bits;
  std::memcpy(&bits, model::hopper().read_by_engine(address, 2), 2);
  return widen(bits, Element{});
}

template <class Element, int kRegisters>
struct ProductLane {
  float* d;
  const uint32_t* a;  // null: in shared memory
  uint64_t a_descriptor, b_descriptor;
  bool transpose_a, transpose_b, accumulate;
};

template <class Element, int kRegisters>
void start_for_warp(const std::array<ProductLane<Element, kRegisters>*, 32>& lanes) {
  constexpr int kColumns = kRegisters * 2;
  const ProductLane<Element, kRegisters> lane0 = *lanes[0];
  model::WarpProduct product;
  std::array<const uint32_t*, 32> fragments;
  for (int lane = 0; lane < 32; ++lane) {
    product.registers[lane] = lanes[lane]->d;
    fragments[lane] = lanes[lane]->a;
    if (lanes[lane]->b_descriptor != lane0.b_descriptor || lanes[lane]->accumulate != lane0.accumulate)
      model::block().fail("the lanes of a product disagree");
  }
  product.count = kRegisters;
  const int first_row = model::block().thread() % kWarpgroup / 32 * 16;
  model::WarpEngine* engine = &model::hopper().warp();
  product.compute = [=] {
    float a[16][16], b[16][kColumns];
    for (int depth = 0; depth < 16; ++depth)
      for (int column = 0; column < kColumns; ++column)
        b[depth][column] = described<Element>(lane0.b_descriptor, lane0.transpose_b, column, depth);
    for (int row = 0; row < 16 && lane0.a == nullptr; ++row)
      for (int depth = 0; depth < 16; ++depth)
        a[row][depth] = described<Element>(lane0.a_descriptor, lane0.transpose_a, first_row + row, depth);
    for (int lane = 0; lane < 32 && lane0.a != nullptr; ++lane)
      for (int word = 0; word < 4; ++word)
        for (int i = 0; i < 2; ++i)
          a[lane / 4 + 8 * (word % 2)][2 * (lane % 4) + i + 8 * (word / 2)] =
              widen(static_cast<uint16_t>(fragments[lane][word] >> 16 * i), Element{});
    float sums[16][kColumns] = {};
    for (int row = 0; row < 16; ++row)
      for (int depth = 0; depth < 16; ++depth)
        for (int column = 0; column < kColumns; ++column) sums[row][column] += a[row][depth] * b[depth][column];
    for (int lane = 0; lane < 32; ++lane) {
      std::vector<float>& d = engine->accumulators.at(product.registers[lane]);
      for (int i = 0; i < kRegisters; ++i) {
        const float sum = sums[lane / 4 + 8 * (i / 2 % 2)][i / 4 * 8 + 2 * (lane % 4) + i % 2];
        d[i] = (lane0.accumulate ? d[i] : 0.f) + sum;
      }
    }
  };
  model::hopper().start_product(std::move(product));
}

template <int kTransposeA, int kTransposeB, class Element, int kRegisters>
void wgmma_shared(float (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate, Element) {
  ProductLane<Element, kRegisters> mine{d, nullptr, a, b, kTransposeA != 0, kTransposeB != 0, accumulate};
  model::block().warp_wide(mine, start_for_warp<Element, kRegisters>);
}

template <int kTransposeB, class Element, int kRegisters>
void wgmma_registers(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, bool accumulate, Element) {
  ProductLane<Element, kRegisters> mine{d, a, 0, b, false, kTransposeB != 0, accumulate};
  model::block().warp_wide(mine, start_for_warp<Element, kRegisters>);
}

}  // namespace effkern::cuda
