#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "sanitizers.h"

// Pushes the callee-saved registers, stores the stack pointer to *saved, and continues on the stack whose saved pointer is
// `next`. The floating-point modes are not saved: kernels do not change them.
extern "C" void simt_switch_stacks(void** saved, void* next);

#if defined(__x86_64__)
asm(R"(
.pushsection .text
.p2align 4
.globl simt_switch_stacks
.hidden simt_switch_stacks
.type simt_switch_stacks, @function
simt_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stacks, .-simt_switch_stacks
.popsection
)");
namespace {
// Words on a new stack: the saved registers, the entry's address, to which `ret` jumps, and a null return address.
constexpr int kFrameWords = 8, kEntryWord = 6;
}  // namespace
#elif defined(__aarch64__)
asm(R"(
.pushsection .text
.p2align 4
.globl simt_switch_stacks
.hidden simt_switch_stacks
.type simt_switch_stacks, %function
simt_switch_stacks:
  stp x29, x30, [sp, #-160]!
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x29, x30, [sp], #160
  ret
.size simt_switch_stacks, .-simt_switch_stacks
.popsection
)");
namespace {
// Words on a new stack: the saved registers, among which x30 holds the entry's address.
constexpr int kFrameWords = 20, kEntryWord = 1;
}  // namespace
#else
#error "simt: no context switch for this processor"
#endif

namespace simt {
namespace {

constexpr size_t kGuard = 64 << 10;   // bytes of the guard area: a multiple of the page size of any system
constexpr size_t kStack = 256 << 10;  // bytes of a stack: enough for a sanitizer to write its report
// Number of different shifts of a stack's top, and bytes from one to the next. Tops at equal offsets in their pages would
// share a few cache lines.
constexpr unsigned kShifts = 31;
constexpr size_t kShift = 320;

Context* left;  // the context that was last switched away from

// Tells AddressSanitizer that a switch is complete, and records the stack of the context that was left, for the switch back.
void arrive(void* fake_stack) {
  if (has_asan()) __sanitizer_finish_switch_fiber(fake_stack, &left->bottom, &left->size);
}

// Tells the sanitizers that a switch begins.
void depart(Context& from, Context& to, void** fake_stack) {
  left = &from;
  if (has_tsan()) become(to.tsan);
  if (has_asan()) __sanitizer_start_switch_fiber(fake_stack, to.bottom, to.size);
}

}  // namespace

Fiber::Fiber(unsigned number) {
  void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) throw std::bad_alloc();
  mapping_ = static_cast<char*>(memory);
  top_ = mapping_ + kGuard + kStack - number % kShifts * kShift;
  bottom = mapping_ + kGuard;
  size = kStack;
  if (has_tsan()) tsan = __tsan_create_fiber(0);
}

Fiber::~Fiber() {
  // A fiber that did not run to its end leaves its frames' redzones poisoned.
  if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(bottom, size);
  if (has_tsan()) __tsan_destroy_fiber(tsan);
  munmap(mapping_, kGuard + kStack);
}

void Fiber::set_entry(void (*entry)()) {
  void** frame = reinterpret_cast<void**>(top_) - kFrameWords;
  for (int i = 0; i < kFrameWords; ++i) frame[i] = nullptr;
  frame[kEntryWord] = reinterpret_cast<void*>(entry);
  stack_pointer = frame;
}

void begin() { arrive(nullptr); }

void switch_context(Context& from, Context& to) {
  depart(from, to, &from.fake_stack);
  simt_switch_stacks(&from.stack_pointer, to.stack_pointer);
  arrive(from.fake_stack);
}

void leave_context(Context& from, Context& to) {
  depart(from, to, nullptr);
  simt_switch_stacks(&from.stack_pointer, to.stack_pointer);
  std::abort();
}

}  // namespace simt
