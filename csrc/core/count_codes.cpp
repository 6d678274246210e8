#include "core/count_codes.h"

#include <algorithm>

#include "core/buffer.h"
#include "core/parallel.h"

namespace effkern {
namespace {

constexpr int64_t kWorthTable = 65536;  // numbers of a part
constexpr int64_t kMostTables = 8;      // 256 KiB each; more only where a count might not fit
constexpr int64_t kMostOfPart = UINT32_MAX;

}  // namespace

std::vector<int64_t> count_codes(const uint16_t* codes, int64_t count) {
  // Integers: the parts may be as many as there are threads, the sums are the same.
  const int64_t wanted = std::min({kMostTables, thread_count(), count / kWorthTable});
  const int64_t parts = std::max<int64_t>({1, wanted, (count + kMostOfPart - 1) / kMostOfPart});
  Buffer room;
  room.reserve(parts * kCodes * 4);
  auto* tables = reinterpret_cast<uint32_t*>(room.data);
  parallel_tasks(parts, [&](int64_t part, int64_t) {
    uint32_t* table = tables + part * kCodes;
    std::fill_n(table, kCodes, 0u);
    const int64_t end = bound_of_part(count, parts, part + 1);
    for (int64_t i = bound_of_part(count, parts, part); i < end; ++i) ++table[codes[i]];
  });
  std::vector<int64_t> counts(kCodes, 0);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t code = 0; code < kCodes; ++code) counts[code] += tables[part * kCodes + code];
  return counts;
}

}  // namespace effkern
