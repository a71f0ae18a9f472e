// Fibers: execution contexts, each with a stack of its own, between which one OS thread switches.
#pragma once

#include <cstddef>

namespace simt {

// An execution context that can be switched away from and back to: a fiber, or the OS thread that starts the fibers.
struct Context {
  void* stack_pointer = nullptr;
  void* tsan = nullptr;        // ThreadSanitizer's handle of the context
  void* fake_stack = nullptr;  // AddressSanitizer's state of the context while another one runs
  // Lowest address and size in bytes of the stack, for AddressSanitizer. An OS thread's are set by its first switch to a fiber.
  const void* bottom = nullptr;
  size_t size = 0;
};

// A fiber whose stack has an inaccessible guard area below it. It can be reused: set_entry starts it again.
class Fiber : public Context {
 public:
  // Allocates the stack. Its top is shifted by an amount that depends on `number`, so that the tops of many stacks do not
  // compete for the same cache lines.
  explicit Fiber(unsigned number);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next switch to the fiber call `entry`, which must call begin() first and must not return.
  void set_entry(void (*entry)());

 private:
  char* mapping_;
  char* top_;
};

// Completes the switch to a fiber that starts at its entry.
void begin();

// Switches from the running context `from` to `to`; returns when another context switches back to `from`.
void switch_context(Context& from, Context& to);
// Switches to `to` for good: `from` is not continued.
[[noreturn]] void leave_context(Context& from, Context& to);

}  // namespace simt
