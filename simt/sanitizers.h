// The sanitizers' hooks for fibers: weak, so that one object serves every build. Where the sanitizer is absent they are null.
#pragma once

#include <cstddef>

extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* start, size_t size);

__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_set_fiber_name(void* fiber, const char* name);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
}

namespace simt {

inline bool has_asan() { return __sanitizer_start_switch_fiber != nullptr; }
inline bool has_tsan() { return __tsan_create_fiber != nullptr; }

// What came before `release` in one fiber is seen by who calls `acquire` on the same address later, and by no one else.
inline void release(void* token) { __tsan_release(token); }
inline void acquire(void* token) { __tsan_acquire(token); }

constexpr unsigned kNoOrder = 1;  // a switch that orders no memory
inline void become(void* fiber) { __tsan_switch_to_fiber(fiber, kNoOrder); }

}  // namespace simt
