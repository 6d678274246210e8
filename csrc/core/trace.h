// Which path an op took last, for `effkern.backends.last()` and the tests that assert it.
#pragma once

#include <string>

#include "core/export.h"

namespace effkern {

// `path` reads "op:backend/unit" and must outlive the process (a string literal).
EFFKERN_API void trace_record(const char* path);

// For callers whose string does not live on (Python); interned once per distinct path.
EFFKERN_API void trace_record_copy(const std::string& path);

// "" before the first op ran.
EFFKERN_API std::string trace_last();

}  // namespace effkern
