#include "core/trace.h"

#include <atomic>
#include <mutex>
#include <set>

namespace effkern {
namespace {
std::atomic<const char*> last_path{""};
std::atomic<int64_t> last_detail{0};
}  // namespace

void trace_record(const char* path) {
  last_detail.store(0, std::memory_order_relaxed);
  last_path.store(path, std::memory_order_release);
}

void trace_detail(int64_t detail) { last_detail.store(detail, std::memory_order_relaxed); }

int64_t trace_last_detail() { return last_detail.load(std::memory_order_relaxed); }

void trace_record_copy(const std::string& path) {
  static std::mutex mutex;
  static std::set<std::string> paths;  // a set never moves its elements, so c_str() stays valid
  std::lock_guard<std::mutex> lock(mutex);
  trace_record(paths.insert(path).first->c_str());
}

std::string trace_last() { return last_path.load(std::memory_order_acquire); }

}  // namespace effkern
