// The sanitizers' hooks for fibers. They are weak symbols, null in a program without the sanitizer, so that one object file
// serves every build.
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

// Order the accesses before release(token) in one fiber before those after a later acquire(token) in another.
inline void release(void* token) { __tsan_release(token); }
inline void acquire(void* token) { __tsan_acquire(token); }

// Makes ThreadSanitizer attribute what follows to a fiber.
constexpr unsigned kNoOrder = 1;  // flag of a switch that does not order memory accesses
inline void become(void* fiber) { __tsan_switch_to_fiber(fiber, kNoOrder); }

}  // namespace simt
