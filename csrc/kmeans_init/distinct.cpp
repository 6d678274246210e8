// From weights to distinct values and how much each counts: by counting 16-bit codes, or by sorting.
#include <algorithm>
#include <cstring>
#include <limits>

#include "core/count_codes.h"
#include "core/parallel.h"
#include "kmeans_init/kernel.h"

namespace effkern::kmeans_init {
namespace {

float value_of(uint16_t code, Dtype dtype) {
  uint32_t bits = static_cast<uint32_t>(code) << 16;
  if (dtype == Dtype::fp16) {
    const uint32_t sign = (code & 0x8000u) << 16, magnitude = code & 0x7fffu;
    if (magnitude < 0x400u) {  // subnormal: a multiple of 2^-24
      const float small = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
      return sign ? -small : small;
    }
    bits = sign | (magnitude >= 0x7c00u ? 0x7f800000u : (magnitude << 13) + 0x38000000u);
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

bool usable(float importance) { return importance >= 0.0f && importance <= std::numeric_limits<float>::max(); }

// The importance of every code, added piece by piece: the pieces are a matter of position, not of threads.
std::vector<double> weigh_codes(const Group& group, Faults* faults) {
  constexpr int64_t kPieces = 16;
  const auto* code = static_cast<const uint16_t*>(group.weight);
  std::vector<double> mass(kCodes, 0.0);
  std::vector<double> sums(kPieces * kCodes, 0.0);
  std::vector<char> seen(kPieces * kCodes, 0), bad(kPieces, 0);
  parallel_tasks(kPieces, [&](int64_t piece, int64_t) {
    double* sum = sums.data() + piece * kCodes;
    char* here = seen.data() + piece * kCodes;
    const int64_t end = bound_of_part(group.count, kPieces, piece + 1);
    for (int64_t i = bound_of_part(group.count, kPieces, piece); i < end; ++i) {
      const float importance = group.importance[i];
      if (!usable(importance)) bad[piece] = 1;
      sum[code[i]] += importance;
      here[code[i]] = 1;
    }
  });
  for (int64_t i = 0; i < kPieces * kCodes; ++i) {
    mass[i % kCodes] += sums[i];
    // A weight that does not count must be finite all the same.
    if (seen[i] && !(std::abs(value_of(static_cast<uint16_t>(i % kCodes), group.dtype)) < INFINITY))
      faults->weight = true;
  }
  for (const char piece : bad)
    if (piece) faults->importance = true;
  return mass;
}

Points counted_points(const Group& group, Faults* faults) {
  std::vector<double> mass;
  if (group.importance) {
    mass = weigh_codes(group, faults);
  } else {
    const std::vector<int64_t> counts = count_codes(static_cast<const uint16_t*>(group.weight), group.count);
    mass.assign(counts.begin(), counts.end());
  }
  Points points;
  if (faults->weight || faults->importance) return points;
  mass[0] += mass[kCodes / 2];  // -0 is 0
  mass[kCodes / 2] = 0.0;
  const auto add = [&](int64_t code) {
    if (!(mass[code] > 0.0)) return;
    const float value = value_of(static_cast<uint16_t>(code), group.dtype);
    if (!(std::abs(value) < INFINITY)) faults->weight = true;
    points.value.push_back(value);
    points.mass.push_back(mass[code]);
  };
  for (int64_t code = kCodes - 1; code > kCodes / 2; --code) add(code);  // negative: the larger the code, the lower
  for (int64_t code = 0; code < kCodes / 2; ++code) add(code);
  return points;
}

// By the 32 bits from `shift` on, ascending; equal ones stay in their order.
template <class Word>
void radix_sort(std::vector<Word>& words, int shift) {
  constexpr int kDigit = 11, kBuckets = 1 << kDigit;
  std::vector<Word> room(words.size());
  for (int low = 0; low < 32; low += kDigit) {
    const auto digit = [&](Word word) { return static_cast<uint32_t>(word >> shift) >> low & (kBuckets - 1); };
    std::vector<size_t> start(kBuckets + 1, 0);
    for (const Word word : words) ++start[digit(word) + 1];
    for (int bucket = 0; bucket < kBuckets; ++bucket) start[bucket + 1] += start[bucket];
    for (const Word word : words) room[start[digit(word)]++] = word;
    words.swap(room);
  }
}

// Ascending with the value, as unsigned numbers.
uint32_t key_of(float value) {
  uint32_t bits;
  value += 0.0f;  // -0 is 0
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

float value_of_key(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class Word>
Points sorted_points(const Group& group, Faults* faults) {
  constexpr bool kWeighted = sizeof(Word) == 8;
  constexpr int kShift = kWeighted ? 32 : 0;
  std::vector<Word> words(group.count);
  for (int64_t i = 0; i < group.count; ++i) {
    const float value = group.dtype == Dtype::fp32
                            ? static_cast<const float*>(group.weight)[i]
                            : value_of(static_cast<const uint16_t*>(group.weight)[i], group.dtype);
    if (!(std::abs(value) < INFINITY)) faults->weight = true;
    words[i] = static_cast<Word>(key_of(value)) << kShift;
    if constexpr (kWeighted) {
      if (!usable(group.importance[i])) faults->importance = true;
      uint32_t bits;
      std::memcpy(&bits, group.importance + i, sizeof bits);
      words[i] |= bits;
    }
  }
  Points points;
  if (faults->weight || faults->importance) return points;
  radix_sort(words, kShift);
  for (size_t i = 0; i < words.size();) {
    const auto key = static_cast<uint32_t>(words[i] >> kShift);
    double mass = 0.0;
    for (; i < words.size() && static_cast<uint32_t>(words[i] >> kShift) == key; ++i) {
      float counts = 1.0f;
      if constexpr (kWeighted) {
        const auto bits = static_cast<uint32_t>(words[i]);
        std::memcpy(&counts, &bits, sizeof counts);
      }
      mass += counts;
    }
    if (!(mass > 0.0)) continue;
    points.value.push_back(value_of_key(key));
    points.mass.push_back(mass);
  }
  return points;
}

}  // namespace

Points distinct_points(const Group& group, Faults* faults) {
  Points points = group.dtype != Dtype::fp32 && group.count >= kWorthCodes ? counted_points(group, faults)
                  : group.importance                                       ? sorted_points<uint64_t>(group, faults)
                                                                           : sorted_points<uint32_t>(group, faults);
  if (points.value.empty() && group.importance && !faults->weight && !faults->importance)
    return distinct_points({group.weight, nullptr, group.count, group.dtype}, faults);
  return points;
}

}  // namespace effkern::kmeans_init
