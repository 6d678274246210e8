#include "core/cpu/isa.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace effkern {
namespace {

constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};
constexpr int kNotForced = -1;
std::atomic<int> forced_level{kNotForced};

struct Cpu {
  bool avx2 = false, fma = false, f16c = false;
  bool avx512f = false, avx512bw = false, avx512dq = false, avx512vl = false, avx512_bf16 = false, avx512_fp16 = false;
  bool amx_tile = false, amx_bf16 = false, amx_permission = false;
  bool os_avx = false, os_avx512 = false, os_amx = false;
  std::string name = "unknown";
};

#if defined(__x86_64__)
uint64_t read_xcr0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux hands out the 8 KiB tile state only to processes that ask for it; children inherit the grant.
bool request_amx_permission() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
#else
  return false;
#endif
}

Cpu detect() {
  Cpu cpu;
  unsigned a, b, c, d;
  char brand[49] = {};
  for (unsigned leaf = 0; leaf < 3; ++leaf) {
    if (!__get_cpuid(0x80000002u + leaf, &a, &b, &c, &d)) break;
    const unsigned words[4] = {a, b, c, d};
    std::memcpy(brand + 16 * leaf, words, 16);
  }
  if (brand[0]) cpu.name = brand;

  if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
  const bool osxsave = c & (1u << 27);
  cpu.fma = c & (1u << 12);
  cpu.f16c = c & (1u << 29);
  const uint64_t xcr0 = osxsave ? read_xcr0() : 0;
  cpu.os_avx = (xcr0 & 0x6) == 0x6;                     // xmm, ymm
  cpu.os_avx512 = cpu.os_avx && (xcr0 & 0xe0) == 0xe0;  // opmask, zmm
  cpu.os_amx = (xcr0 & 0x60000) == 0x60000;             // tile config, tile data

  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
  cpu.avx2 = b & (1u << 5);
  cpu.avx512f = b & (1u << 16);
  cpu.avx512dq = b & (1u << 17);
  cpu.avx512bw = b & (1u << 30);
  cpu.avx512vl = b & (1u << 31);
  cpu.amx_bf16 = d & (1u << 22);
  cpu.avx512_fp16 = d & (1u << 23);
  cpu.amx_tile = d & (1u << 24);
  if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) cpu.avx512_bf16 = a & (1u << 5);
  if (cpu.amx_tile && cpu.amx_bf16 && cpu.os_amx) cpu.amx_permission = request_amx_permission();
  return cpu;
}
#else
Cpu detect() { return {}; }
#endif

const Cpu& cpu() {
  static const Cpu detected = detect();
  return detected;
}

bool available([[maybe_unused]] Isa level) {
#if defined(EFFKERN_EMULATE)
  return true;  // the AVX-512 and AMX units of this build are emulated on AVX2
#else
  const Cpu& c = cpu();
  const bool avx2 = c.os_avx && c.avx2 && c.fma && c.f16c;
  const bool avx512 = avx2 && c.os_avx512 && c.avx512f && c.avx512bw && c.avx512dq && c.avx512vl;
  switch (level) {
    case Isa::scalar: return true;
    case Isa::avx2: return avx2;
    case Isa::avx512: return avx512;
    case Isa::avx512_bf16: return avx512 && c.avx512_bf16;
    case Isa::amx: return avx512 && c.avx512_bf16 && c.amx_permission;
  }
  return false;
#endif
}

std::string available_names() {
  std::string text;
  for (Isa level : isa_levels()) text += (text.empty() ? "" : ", ") + std::string(isa_name(level));
  return text;
}

Isa parse(const std::string& name, const char* source) {
  for (int level = 0; level < kIsaCount; ++level) {
    if (name != kNames[level]) continue;
    if (available(static_cast<Isa>(level))) return static_cast<Isa>(level);
    throw std::invalid_argument(std::string(source) + ": this machine does not have " + name +
                                "; available: " + available_names());
  }
  throw std::invalid_argument(std::string(source) + ": unknown CPU level '" + name +
                              "'; available: " + available_names());
}

}  // namespace

const char* isa_name(Isa level) { return kNames[static_cast<int>(level)]; }

std::vector<Isa> isa_levels() {
  std::vector<Isa> levels;
  for (int level = 0; level < kIsaCount; ++level)
    if (available(static_cast<Isa>(level))) levels.push_back(static_cast<Isa>(level));
  return levels;
}

Isa isa_active() {
  const int forced = forced_level.load(std::memory_order_acquire);
  if (forced != kNotForced) return static_cast<Isa>(forced);
  // Read once: an op call must not pay for getenv, nor race with setenv.
  static const Isa automatic = [] {
    const char* wish = std::getenv("EFFKERN_CPU_ISA");
    return wish && *wish ? parse(wish, "EFFKERN_CPU_ISA") : isa_levels().back();
  }();
  return automatic;
}

void isa_force(const std::string& name) {
  const bool lift = name.empty() || name == "auto";
  forced_level.store(lift ? kNotForced : static_cast<int>(parse(name, "isa_force")), std::memory_order_release);
}

std::vector<CpuFeature> cpu_features() {
  const Cpu& c = cpu();
  return {{"avx2", c.avx2},
          {"fma", c.fma},
          {"f16c", c.f16c},
          {"avx512f", c.avx512f},
          {"avx512bw", c.avx512bw},
          {"avx512dq", c.avx512dq},
          {"avx512vl", c.avx512vl},
          {"avx512_bf16", c.avx512_bf16},
          {"avx512_fp16", c.avx512_fp16},
          {"amx_tile", c.amx_tile},
          {"amx_bf16", c.amx_bf16},
          {"os_avx", c.os_avx},
          {"os_avx512", c.os_avx512},
          {"os_amx", c.os_amx},
          {"amx_permission", c.amx_permission}};
}

std::string cpu_name() { return cpu().name; }

}  // namespace effkern
