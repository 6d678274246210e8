// Who waits for whom: rings of buffers between a copying warp and computing warpgroups, and turns among warpgroups.
#pragma once

#include "core/cuda/ptx_sm90.cuh"

namespace effkern::cuda {

// Position in a ring: the buffer in use, and the parity of the phase that its barriers are in.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  EFFKERN_DEVICE void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// kStages buffers that one thread fills through the copy engine and `readers` warps empty. Two barriers a buffer: full
// (the announced bytes have landed) and empty (every reader is done). Both sides walk the ring with a position of
// their own.
template <int kStages>
struct Ring {
  static constexpr uint32_t kBytes = 2 * kStages * 8;
  using Position = RingPosition<kStages>;

  uint32_t address;

  EFFKERN_DEVICE uint32_t full(const Position& at) const { return address + at.stage * 8; }
  EFFKERN_DEVICE uint32_t empty(const Position& at) const { return address + (kStages + at.stage) * 8; }

  EFFKERN_DEVICE void init(int readers) const {
    for (Position at; at.stage < kStages; ++at.stage) {
      barrier_init(full(at), 1);
      barrier_init(empty(at), readers);
    }
  }

  // The filling thread: waits until the buffer is free and announces what it will copy; copies name full(at).
  EFFKERN_DEVICE void acquire(const Position& at, uint32_t bytes) const {
    barrier_wait(empty(at), at.parity ^ 1);
    barrier_arrive_expecting(full(at), bytes);
  }

  // A reading warp.
  EFFKERN_DEVICE void wait(const Position& at) const { barrier_wait(full(at), at.parity); }
  EFFKERN_DEVICE void release(const Position& at) const {
    sync_warp();  // lanes may have gone different ways since they last met
    if (thread_index() % 32 == 0) barrier_arrive(empty(at));
  }
};

// Warpgroups take turns at the tensor cores, in order and round and round, so that one computes products while the
// others are at their softmax. Names first_name .. first_name + kGroups - 1; the first turn belongs to group 0, and
// every group takes equally many.
template <int kGroups>
struct Turns {
  static_assert(kGroups >= 2);
  int first_name, group;

  EFFKERN_DEVICE void begin() const {
    if (group == 0) named_barrier_arrive(first_name, 2 * kWarpgroup);
  }
  EFFKERN_DEVICE void take() const { named_barrier_sync(first_name + group, 2 * kWarpgroup); }
  EFFKERN_DEVICE void pass() const {
    named_barrier_arrive(first_name + (group + 1 == kGroups ? 0 : group + 1), 2 * kWarpgroup);
  }
  EFFKERN_DEVICE void end() const {
    if (group == 0) take();  // the last group's pass
  }
};

}  // namespace effkern::cuda
