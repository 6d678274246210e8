// Lets libraries that a newer GCC and glibc have built load where manylinux_2_28 promises it: glibc 2.28 and the
// libstdc++ of GCC 8. What newer headers ask for and those lack is defined here. Every library is linked with its own
// copy, which its version script keeps inside. `make wheel` has auditwheel check the outcome; what is missing here
// fails there, by name and version.
//
// No <cmath>: it declares the functions below as it likes them, noexcept or not.
#include <new>
#include <sstream>

#if defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))

// glibc 2.29 gave these functions second versions, which leave out the wrapper around the same computation.
#ifdef __x86_64__
#define EFFKERN_FIRST_VERSION "GLIBC_2.2.5"
#else
#define EFFKERN_FIRST_VERSION "GLIBC_2.17"
#endif

#define EFFKERN_BIND(name, parameters, arguments)                                   \
  __asm__(".symver first_" #name ", " #name "@" EFFKERN_FIRST_VERSION);             \
  extern "C" __attribute__((visibility("default"))) double first_##name parameters; \
  extern "C" double name parameters { return first_##name arguments; }

EFFKERN_BIND(exp, (double x), (x))
EFFKERN_BIND(exp2, (double x), (x))
EFFKERN_BIND(log, (double x), (x))
EFFKERN_BIND(log2, (double x), (x))
EFFKERN_BIND(pow, (double x, double y), (x, y))

// Since glibc 2.32: may reference counts change without atomic instructions? Never is right too.
extern "C" {
extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}

#endif

#ifdef __GLIBCXX__

// GCC 9 and 11 moved these members of templates into the library; any compiler can make them here as well.
template std::basic_stringstream<char>::basic_stringstream();
template std::basic_ostringstream<char>::basic_ostringstream();
template std::string std::basic_stringbuf<char>::str() const&;
template std::string std::basic_stringbuf<char>::str() &&;

// Since GCC 11; containers throw it, and before that threw bad_alloc.
void std::__throw_bad_array_new_length() { throw std::bad_array_new_length(); }

// GCC 11 made copying and destroying an exception_ptr inline, down to these two, which it made public. By the names
// that the linker sees, because the members are private; by way of the copy and the destructor that every libstdc++
// has.
extern "C" {
void copy_exception_ptr(void* to, const void* from) __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void destroy_exception_ptr(void* at) __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");
void addref_exception_ptr(void* self) __asm__("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void release_exception_ptr(void* self) __asm__("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");

void addref_exception_ptr(void* self) {
  void* copy;  // never destroyed: it is the reference that is added
  copy_exception_ptr(&copy, self);
}

void release_exception_ptr(void* self) {
  destroy_exception_ptr(self);
  *static_cast<void**>(self) = nullptr;
}
}

#endif
