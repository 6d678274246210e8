# Libraries to link with that have the threads, dlopen and shared memory of glibc before 2.34, which moved them into
# libc.so.6 under new versions. What is linked with these needs libpthread.so.0 and its like in their first version, as if
# it were linked on an older system; every glibc has both. Only the names count: nothing here is ever loaded.
#
# The objects of the static CUDA run time want these names; a new one of them fails in `make wheel`.
set(older_glibc_pthread
  pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join pthread_key_create
  pthread_key_delete pthread_kill pthread_mutex_trylock pthread_mutexattr_destroy pthread_mutexattr_init
  pthread_mutexattr_setpshared pthread_mutexattr_settype pthread_once pthread_rwlock_destroy pthread_rwlock_init
  pthread_rwlock_rdlock pthread_rwlock_timedrdlock pthread_rwlock_timedwrlock pthread_rwlock_tryrdlock
  pthread_rwlock_trywrlock pthread_rwlock_unlock pthread_rwlock_wrlock pthread_rwlockattr_destroy
  pthread_rwlockattr_init pthread_rwlockattr_setpshared pthread_setspecific pthread_spin_destroy pthread_spin_init
  pthread_spin_lock pthread_spin_trylock pthread_spin_unlock sem_destroy sem_init sem_post sem_timedwait sem_trywait
  sem_wait)
set(older_glibc_dl dlclose dlerror dlopen dlsym dlvsym)
set(older_glibc_dl_2_3_4 dlmopen)
set(older_glibc_rt shm_open shm_unlink)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(older_glibc_version GLIBC_2.2.5)
else()
  set(older_glibc_version GLIBC_2.17)  # aarch64, where all of it began there
  list(APPEND older_glibc_dl ${older_glibc_dl_2_3_4})
  set(older_glibc_dl_2_3_4 "")
endif()

function(add_older_glibc target)
  add_library(${target} INTERFACE)
  # Needed whatever comes before them: the CUDA run time comes behind.
  target_link_libraries(${target} INTERFACE -Wl,--push-state,--no-as-needed)
  foreach(file pthread.so.0 dl.so.2 rt.so.1)
    string(REGEX REPLACE "\\..*" "" name "${file}")
    set(names ${older_glibc_${name}} ${older_glibc_${name}_2_3_4})
    list(TRANSFORM names REPLACE "(.+)" "void \\1() {}" OUTPUT_VARIABLE definitions)
    list(JOIN definitions "\n" definitions)
    list(JOIN older_glibc_${name} "; " first)
    set(map "${older_glibc_version} { global: ${first}; local: *; };\n")
    if(older_glibc_${name}_2_3_4)
      list(JOIN older_glibc_${name}_2_3_4 "; " later)
      string(APPEND map "GLIBC_2.3.4 { global: ${later}; };\n")
    endif()
    file(CONFIGURE OUTPUT older_glibc/${name}.cpp CONTENT "extern \"C\" {\n${definitions}\n}\n")
    file(CONFIGURE OUTPUT older_glibc/${name}.map CONTENT "${map}")

    add_library(${target}_${name} SHARED "${CMAKE_CURRENT_BINARY_DIR}/older_glibc/${name}.cpp")
    set_target_properties(${target}_${name} PROPERTIES PREFIX "" OUTPUT_NAME "lib${name}" SUFFIX ".so" NO_SONAME ON
      LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/older_glibc" CXX_VISIBILITY_PRESET default
      LINK_DEPENDS "${CMAKE_CURRENT_BINARY_DIR}/older_glibc/${name}.map")
    target_link_options(${target}_${name} PRIVATE -nostdlib -Wl,-soname,lib${file}
      -Wl,--version-script=${CMAKE_CURRENT_BINARY_DIR}/older_glibc/${name}.map)
    target_link_libraries(${target} INTERFACE ${target}_${name})
  endforeach()
  target_link_libraries(${target} INTERFACE -Wl,--pop-state)
endfunction()
