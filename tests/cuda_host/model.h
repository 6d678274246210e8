// Threads of one block as fibers on one CPU thread: scheduling, barriers, shared memory, asynchronous copies.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

namespace model {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct Range {
  const char *begin, *end;
};

class Block {
 public:
  int index = 0;              // blockIdx.x
  std::vector<Range> global;  // memory that kernels may touch in 16-byte accesses
  std::string error;          // the first violation

  // Runs `body` once in each of `threads` fibers.
  void run(int threads, uint32_t shared_bytes, unsigned seed, std::function<void()> body) {
    body_ = std::move(body);
    random_.seed(seed);
    favourites_ = random_() % 2;
    order_ = random_() % 4;
    shared_.assign(shared_bytes, '\xff');  // NaN in every format
    fibers_.resize(threads);
    warps_.assign(threads / 32, {});
    ready_.clear();
    arrived_ = 0;
    running_ = threads;
    work_.clear();
    at_end_.clear();
    on_store_ = nullptr;
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = fibers_[i];
      fiber.stack.resize(kStackBytes);
      fiber.started = false;
      fiber.groups.assign(1, {});
      ready_.push_back(i);
    }
    if (!_setjmp(main_)) resume_any();
    for (const auto& check : at_end_) check();
  }

  // Work of an engine beside the threads: done at some moment, at the latest when no thread can run.
  int start_work(std::function<void()> work) {
    work_.emplace(++last_work_, std::move(work));
    return last_work_;
  }
  void finish_work(int id) {
    const auto found = work_.find(id);
    if (found == work_.end()) return;
    const std::function<void()> work = std::move(found->second);
    work_.erase(found);
    if (error.empty()) work();
  }

  // Lets the current thread sleep until someone wakes it.
  void sleep() { wait(); }
  void wake(int thread) { ready_.push_back(thread); }

  void check_at_end(std::function<void()> check) { at_end_.push_back(std::move(check)); }
  void watch_stores(std::function<void(uint32_t, uint32_t)> watcher) { on_store_ = std::move(watcher); }
  void stored(uint32_t address, uint32_t bytes) {
    if (on_store_) on_store_(address, bytes);
  }
  unsigned lot() { return random_(); }

  int thread() const { return current_; }

  void fail(const char* what) {
    if (error.empty()) error = what;
  }

  char* shared(uint32_t address, uint32_t bytes) {
    if (address % bytes == 0 && address + bytes <= shared_.size()) return shared_.data() + address;
    fail("shared memory access out of bounds or misaligned");
    return scratch_;
  }

  bool check_global(const void* pointer) {
    const char* address = static_cast<const char*>(pointer);
    if (reinterpret_cast<uintptr_t>(pointer) % 16 == 0)
      for (const Range& range : global)
        if (address >= range.begin && address + 16 <= range.end) return true;
    fail("global memory access out of bounds or misaligned");
    return false;
  }

  void copy_async(uint32_t destination, const void* source, bool valid) {
    Copy copy{shared(destination, 16), {}};
    if (valid && check_global(source)) std::memcpy(copy.data, source, 16);
    std::memset(copy.destination, 0xff, 16);  // from here on the old content is lost
    if (random_() % 2) return land(copy);
    fibers_[current_].groups.back().push_back(copy);
  }
  void commit_copies() { fibers_[current_].groups.emplace_back(); }
  void wait_copies(size_t pending) {
    auto& groups = fibers_[current_].groups;  // the last one is not committed yet
    while (groups.size() > pending + 1) {
      for (const Copy& copy : groups.front()) land(copy);
      groups.erase(groups.begin());
    }
  }

  void barrier() {
    if (++arrived_ < running_) return wait();
    arrived_ = 0;
    for (int i = 0; i < static_cast<int>(fibers_.size()); ++i)
      if (i != current_) ready_.push_back(i);
    yield();
  }

  // Collects the arguments of 32 lanes and has the last to arrive perform the instruction for all.
  template <class Lane>
  void warp_wide(Lane& mine, void (*instruction)(const std::array<Lane*, 32>&)) {
    Warp& warp = warps_[current_ / 32];
    const auto code = reinterpret_cast<void*>(instruction);
    if (warp.arrived == 0) warp.instruction = code;
    if (warp.instruction != code) fail("the lanes of a warp are at different instructions");
    warp.lanes[current_ % 32] = &mine;
    if (++warp.arrived < 32) return wait();
    warp.arrived = 0;
    std::array<Lane*, 32> lanes;
    for (int i = 0; i < 32; ++i) lanes[i] = static_cast<Lane*>(warp.lanes[i]);
    if (error.empty()) instruction(lanes);
    for (int i = current_ / 32 * 32; i < current_ / 32 * 32 + 32; ++i)
      if (i != current_) ready_.push_back(i);
    yield();
  }

 private:
  static constexpr size_t kStackBytes = 256 << 10;
  struct Copy {
    char *destination, data[16];
  };
  struct Fiber {
    std::vector<char> stack;
    ucontext_t entry;
    jmp_buf state;
    bool started = false;
    std::vector<std::vector<Copy>> groups;
  };
  struct Warp {
    int arrived = 0;
    void *instruction = nullptr, *lanes[32] = {};
  };

  static void land(const Copy& copy) { std::memcpy(copy.destination, copy.data, 16); }

  void yield() {
    ready_.push_back(current_);
    wait();
  }
  void wait() {
    if (!_setjmp(fibers_[current_].state)) resume_any();
  }
  [[noreturn]] void resume_any() {
    while (!work_.empty() && (ready_.empty() || random_() % 4 == 0))
      finish_work(std::next(work_.begin(), random_() % work_.size())->first);
    if (ready_.empty()) {
      if (running_ > 0) fail("deadlock: some threads wait at a barrier that the others never reach");
      _longjmp(main_, 1);
    }
    size_t pick = random_() % ready_.size();
    if (favourites_)  // warps far ahead of others find missing barriers
      for (size_t i = 0; i < ready_.size(); ++i)
        if ((ready_[i] / 32 ^ order_) < (ready_[pick] / 32 ^ order_)) pick = i;
    current_ = ready_[pick];
    ready_[pick] = ready_.back();
    ready_.pop_back();
    Fiber& fiber = fibers_[current_];
    if (fiber.started) _longjmp(fiber.state, 1);
    fiber.started = true;
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.data();
    fiber.entry.uc_stack.ss_size = fiber.stack.size();
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, &Block::enter, 0);
    setcontext(&fiber.entry);
    __builtin_unreachable();
  }
  static void enter();
  void finish() {
    for (const auto& group : fibers_[current_].groups)
      if (!group.empty()) fail("a thread ended with copies it never waited for");
    --running_;
    if (running_ > 0 && arrived_ == running_) fail("a thread ended while others wait at a barrier");
    resume_any();
  }

  std::function<void()> body_;
  std::mt19937 random_;
  std::vector<char> shared_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<int> ready_;
  std::map<int, std::function<void()>> work_;
  std::vector<std::function<void()>> at_end_;
  std::function<void(uint32_t, uint32_t)> on_store_;
  int last_work_ = 0;
  bool favourites_ = false;
  int order_ = 0, current_ = 0, arrived_ = 0, running_ = 0;
  alignas(16) char scratch_[16] = {};
  jmp_buf main_;
};

inline Block& block() {
  static Block instance;
  return instance;
}

inline void Block::enter() {
  block().body_();
  block().finish();
}

}  // namespace model
