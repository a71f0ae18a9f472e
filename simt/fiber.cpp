#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "sanitizers.h"

// void simt_switch_stacks(void** saved, void* next): saves the registers that a call keeps on the stack, whose pointer goes
// to *saved, and takes up the stack `next`. The floating-point modes are not saved: kernels do not change them.
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
// Saved registers, the address that `ret` takes, and the null return address of the entry itself.
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
constexpr int kFrameWords = 20, kEntryWord = 1;
}  // namespace
#else
#error "simt: no context switch for this processor"
#endif

namespace simt {
namespace {

constexpr size_t kGuard = 64 << 10;   // a page of any size
constexpr size_t kStack = 256 << 10;  // a sanitizer writes its report on it
constexpr unsigned kColours = 31;
constexpr size_t kColour = 320;  // bytes between tops: at one place in their pages, they would share a few cache lines

Context* left;  // who was switched from

// What AddressSanitizer wants to know after a switch: also the stack of who was left, for the way back.
void arrive(void* fake_stack) {
  if (has_asan()) __sanitizer_finish_switch_fiber(fake_stack, &left->bottom, &left->size);
}

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
  top_ = mapping_ + kGuard + kStack - number % kColours * kColour;
  bottom = mapping_ + kGuard;
  size = kStack;
  if (has_tsan()) tsan = __tsan_create_fiber(0);
}

Fiber::~Fiber() {
  // A fiber that was left in the middle leaves the redzones of its frames.
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
