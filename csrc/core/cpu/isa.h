// CPU instruction-set levels: what the machine and its operating system allow, and which one is in use.
#pragma once

#include <string>
#include <vector>

#include "core/export.h"

namespace effkern {

// Ascending: each level includes those before it.
enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };
constexpr int kIsaCount = 5;

struct CpuFeature {
  const char* name;
  bool present;
};

EFFKERN_API const char* isa_name(Isa level);

// Levels that cpuid, xgetbv and (for AMX) the kernel's permission call all grant, ascending.
EFFKERN_API std::vector<Isa> isa_levels();

// The level in use: the forced one, else EFFKERN_CPU_ISA, else the best. Throws std::invalid_argument when
// EFFKERN_CPU_ISA names a level that is unknown or not available here.
EFFKERN_API Isa isa_active();

// Forces a level by name ("" or "auto" lifts the force). Throws std::invalid_argument as above.
EFFKERN_API void isa_force(const std::string& name);

EFFKERN_API std::vector<CpuFeature> cpu_features();
EFFKERN_API std::string cpu_name();

}  // namespace effkern
