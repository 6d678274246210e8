// Preloaded under the thread sanitizer: GCC's OpenMP library waits in futexes, which the sanitizer does not see, so
// that every use of what another thread has written before the end of a parallel region would be reported. This tells
// it that a region starts after what came before it and ends before what comes after it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void (*Body)(void*);
typedef void (*Parallel)(Body, void*, unsigned, unsigned);

void __tsan_acquire(void* address);
void __tsan_release(void* address);

typedef struct {
  Body body;
  void* data;
  char begin, end;
} Region;

static void run(void* argument) {
  Region* region = argument;
  __tsan_acquire(&region->begin);
  region->body(region->data);
  __tsan_release(&region->end);
}

// The library that torch brings along is not in the global scope, where RTLD_NEXT would look.
static int find(struct dl_phdr_info* info, size_t size, void* found) {
  (void)size;
  if (!strstr(info->dlpi_name, "libgomp")) return 0;
  void* library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
  *(void**)found = library ? dlsym(library, "GOMP_parallel") : NULL;
  return *(void**)found != NULL;
}

void GOMP_parallel(Body body, void* data, unsigned threads, unsigned flags) {
  static void* real;
  if (!real) dl_iterate_phdr(find, &real);
  if (!real) {
    fputs("tsan_openmp: GCC's OpenMP library is not loaded\n", stderr);
    abort();
  }
  Region region = {body, data, 0, 0};
  __tsan_release(&region.begin);
  ((Parallel)real)(run, &region, threads, flags);
  __tsan_acquire(&region.end);
}
