// What compute capability 9.0 adds to the model of a thread block: barriers with phases, the copy engine, warpgroup
// products.
//
// The copy engine and the tensor cores work at moments of their own, between the start of an operation and the wait for
// it, by lot. What they will overwrite is NaN from the start on, so a missing wait shows as wrong numbers; what threads
// have stored without a fence is refused to them.
#pragma once

#include <algorithm>
#include <deque>
#include <utility>

#include "model.h"

namespace model {

struct PhaseBarrier {
  int arrivals = 0, missing = 0;
  int64_t bytes = 0;  // announced and not yet landed
  uint32_t parity = 0;
  std::vector<int> sleepers;
};

struct NamedBarrier {
  int threads = 0, arrived = 0;
  std::vector<int> sleepers;
};

// One warp's part of a warpgroup product; done in order with the warp's others.
struct WarpProduct {
  std::function<void()> compute;
  std::array<float*, 32> registers;
  int count;
};

struct WarpEngine {
  std::deque<std::vector<WarpProduct>> groups{{}};    // the last one is not committed yet
  std::map<float*, std::vector<float>> accumulators;  // by a lane's registers: what will be there
  bool fenced = false;
};

class Hopper {
 public:
  // The engines of the block that runs now.
  static Hopper& of_block(Block& block) {
    static Hopper engines;
    engines.block_ = &block;
    return engines;
  }

  void reset(int warps) {
    barriers_.clear();
    named_.clear();
    unfenced_.clear();
    stores_.clear();
    warps_.assign(warps, {});
    block_->watch_stores([this](uint32_t address, uint32_t bytes) {
      for (uint32_t at = address / 16; at <= (address + bytes - 1) / 16; ++at) unfenced_[at] = block_->thread();
    });
    block_->check_at_end([this] { check_at_end(); });
  }

  // ---- barriers with phases ----

  void init(uint32_t address, int arrivals) {
    if (address % 8) block_->fail("a barrier is misaligned");
    barriers_[address] = {arrivals, arrivals, 0, 0, {}};
  }
  void arrive(uint32_t address, int64_t bytes) {
    PhaseBarrier& barrier = at(address);
    if (barrier.missing == 0) block_->fail("a barrier has more arrivals than it expects");
    barrier.bytes += bytes;
    --barrier.missing;
    advance(barrier);
  }
  void landed(uint32_t address, int64_t bytes) {
    PhaseBarrier& barrier = at(address);
    barrier.bytes -= bytes;
    advance(barrier);
  }
  void wait(uint32_t address, uint32_t parity) {
    PhaseBarrier& barrier = at(address);
    while (barrier.parity == parity && block_->error.empty()) {
      barrier.sleepers.push_back(block_->thread());
      block_->sleep();
    }
  }

  void named(int name, int threads, bool sleeps) {
    NamedBarrier& barrier = named_[name];
    if (barrier.arrived == 0) barrier.threads = threads;
    if (barrier.threads != threads || name < 1 || name > 15) block_->fail("a named barrier is misused");
    if (++barrier.arrived < threads) {
      if (!sleeps) return;
      barrier.sleepers.push_back(block_->thread());
      return block_->sleep();
    }
    barrier.arrived = 0;
    for (int thread : std::exchange(barrier.sleepers, {})) block_->wake(thread);
  }

  // ---- stores of threads and engines ----

  void fence() {
    for (auto it = unfenced_.begin(); it != unfenced_.end();)
      it = it->second == block_->thread() ? unfenced_.erase(it) : std::next(it);
  }
  const char* read_by_engine(uint32_t address, uint32_t bytes) {
    if (unfenced_.count(address / 16)) block_->fail("an engine reads what a thread stored without a fence");
    return block_->shared(address, bytes);
  }

  void start_store(std::function<void()> store) {
    stores_[block_->thread()].back().push_back(block_->start_work(std::move(store)));
  }
  void commit_stores() { stores_[block_->thread()].emplace_back(); }
  void wait_stores(size_t pending) {
    StoreGroups& groups = stores_[block_->thread()];
    while (groups.size() > pending + 1) {
      for (int id : groups.front()) block_->finish_work(id);
      groups.pop_front();
    }
  }

  // ---- products ----

  WarpEngine& warp() { return warps_[block_->thread() / 32]; }

  // Called once for a warp, by its last lane.
  void start_product(WarpProduct product) {
    WarpEngine& engine = warp();
    if (!engine.fenced) block_->fail("a product was started without a fence");
    for (float* registers : product.registers) {
      if (engine.accumulators.count(registers)) continue;
      engine.accumulators[registers].assign(registers, registers + product.count);
      std::fill(registers, registers + product.count, NAN);
    }
    engine.groups.back().push_back(std::move(product));
  }
  void commit_products() {
    warp().groups.emplace_back();
    warp().fenced = false;
  }
  void wait_products(size_t pending) {
    WarpEngine& engine = warp();
    if (!engine.groups.back().empty()) block_->fail("a wait for products that were not committed");
    while (engine.groups.size() > pending + 1) {
      for (const WarpProduct& product : engine.groups.front()) product.compute();
      engine.groups.pop_front();
    }
    // Registers that no later product uses get their numbers.
    std::map<float*, bool> used;
    for (const auto& group : engine.groups)
      for (const WarpProduct& product : group)
        for (float* registers : product.registers) used[registers] = true;
    for (auto it = engine.accumulators.begin(); it != engine.accumulators.end();) {
      if (used.count(it->first)) {
        ++it;
        continue;
      }
      std::copy(it->second.begin(), it->second.end(), it->first);
      it = engine.accumulators.erase(it);
    }
  }

 private:
  using StoreGroups = std::deque<std::vector<int>>;
  struct OpenGroups : StoreGroups {
    OpenGroups() : StoreGroups(1) {}
  };

  PhaseBarrier& at(uint32_t address) {
    if (!barriers_.count(address)) block_->fail("a barrier was not initialised");
    return barriers_[address];
  }
  void advance(PhaseBarrier& barrier) {
    if (barrier.missing > 0 || barrier.bytes != 0) return;
    barrier.missing = barrier.arrivals;
    barrier.parity ^= 1;
    for (int thread : std::exchange(barrier.sleepers, {})) block_->wake(thread);
  }
  void check_at_end() {
    for (const auto& [name, barrier] : named_)
      if (barrier.arrived) block_->fail("a named barrier is left with arrivals");
    for (const auto& [address, barrier] : barriers_)
      if (barrier.bytes || barrier.missing != barrier.arrivals) block_->fail("a barrier is left inside a phase");
    for (const auto& [thread, groups] : stores_)
      if (groups.size() > 1 || !groups.front().empty()) block_->fail("a thread ended before its stores had been read");
    for (const WarpEngine& engine : warps_)
      if (engine.groups.size() > 1 || !engine.groups.front().empty()) block_->fail("a warp ended before its products");
  }

  Block* block_ = nullptr;
  std::map<uint32_t, PhaseBarrier> barriers_;
  std::map<int, NamedBarrier> named_;
  std::map<uint32_t, int> unfenced_;  // by 16 bytes: the thread that stored
  std::map<int, OpenGroups> stores_;
  std::vector<WarpEngine> warps_;
};

inline Hopper& hopper() { return Hopper::of_block(block()); }

}  // namespace model
