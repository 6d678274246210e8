// Parallel loops on torch's own thread pool, through the stable ABI, so that torch.set_num_threads rules.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

namespace effkern {

inline int64_t thread_count() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

// How many scratch slots `parallel_tasks(tasks, ...)` may use at most.
inline int64_t slot_count(int64_t tasks) { return std::max<int64_t>(1, std::min(thread_count(), tasks)); }

// Calls body(task, slot) once for every task in [0, tasks). Threads take tasks in ascending order from one
// counter, so uneven tasks balance, and a task may wait for any lower-numbered one: that one has already
// been taken by a thread that is running it. Two tasks that run at the same time have different slots.
template <class Body>
void parallel_tasks(int64_t tasks, const Body& body) {
  if (tasks <= 0) return;
  std::atomic<int64_t> next{0};
  auto drain = [&](int64_t slot) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(task, slot);
  };
  const int64_t slots = slot_count(tasks);
  if (slots == 1) return drain(0);
  torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) drain(slot);
  });
}

}  // namespace effkern
