// Fibers: stacks that one OS thread runs in turn.
#pragma once

#include <cstddef>

namespace simt {

// Something that can be switched away from and back to: a fiber, or who started them, on its own stack.
struct Context {
  void* stack_pointer = nullptr;
  void* tsan = nullptr;  // ThreadSanitizer's name for it
  void* fake_stack = nullptr;  // AddressSanitizer's, while another runs
  const void* bottom = nullptr;  // the stack, for AddressSanitizer; known of a starter once it was switched from
  size_t size = 0;
};

// A stack with a guard page below. It may be entered any number of times.
class Fiber : public Context {
 public:
  explicit Fiber(unsigned number);  // the number spreads the tops of the stacks over the cache
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next switch to it calls the entry, which calls `begin` first and never returns.
  void set_entry(void (*entry)());

 private:
  char* mapping_;
  char* top_;
};

void begin();

// Runs `to`; returns when someone switches back.
void switch_context(Context& from, Context& to);
// Runs `to` and forgets what `from` was doing.
[[noreturn]] void leave_context(Context& from, Context& to);

}  // namespace simt
