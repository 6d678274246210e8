// Which path an op took last, for `effkern.backends.last()` and the tests that assert it.
#pragma once

#include <cstdint>
#include <string>

#include "core/export.h"

namespace effkern {

// `path` reads "op:backend/unit" and must outlive the process (a string literal).
EFFKERN_API void trace_record(const char* path);

// Adds a number to the path recorded last, which says what of it cannot be known before it has run.
EFFKERN_API void trace_detail(int64_t detail);

// For callers whose string does not live on (Python); interned once per distinct path.
EFFKERN_API void trace_record_copy(const std::string& path);

// "" before the first op ran.
EFFKERN_API std::string trace_last();

// 0 where the path came without.
EFFKERN_API int64_t trace_last_detail();

}  // namespace effkern
