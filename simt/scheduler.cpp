#include "scheduler.h"

#include <utility>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

void* shared_memory;
Machine machine;
Settings settings;

namespace {

uint64_t random_state;

uint64_t random_bits() {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Removes the thread that the schedule runs next from the queue and returns it; null if no thread can run.
Thread* next_ready() {
  if (machine.ready_count == 0) return nullptr;
  const auto at = [](size_t i) -> Thread*& { return machine.ready[i & (machine.ready.size() - 1)]; };
  const size_t left = --machine.ready_count;
  if (settings.schedule == SIMT_FIFO) return at(machine.first_ready++);
  Thread* last = at(machine.first_ready + left);
  if (settings.schedule == SIMT_LIFO) return last;
  return std::exchange(at(machine.first_ready + random_below(left + 1)), last);
}

// Makes a thread the current one and returns its fiber, to which the caller must switch.
Fiber& enter(Thread& thread) {
  machine.current = &thread;
  threadIdx = {thread.index, 0, 0};
  blockIdx = {thread.block->index, 0, 0};
  shared_memory = thread.block->shared;
  return *thread.fiber;
}

// Ends the current thread and switches to the next one, or to the launcher after the last.
[[noreturn]] void leave_thread(Thread& thread) {
  thread.state = State::Exited;
  check_exit(thread);
  thread.warp->exited |= 1u << thread.lane;
  if (++thread.block->exited == machine.request.block && machine.request.cluster != 0) {
    // Shared memory ends with its block: another block of the cluster that still reads it must get wrong values, and a race.
    if (has_tsan()) acquire(&thread.block->tokens->end);
    std::memset(thread.block->shared, 0xff, machine.request.shared_bytes);
  }
  if (has_tsan()) release(&thread.block->tokens->end);
  Fiber& fiber = *thread.fiber;
  if (--machine.running == 0) leave_context(fiber, machine.launcher);
  Thread* next = next_ready();
  if (next == nullptr) fail("no thread can run");
  leave_context(fiber, enter(*next));
}

// Runs the current thread from its start: the entry of every fiber.
[[noreturn]] void run_thread() {
  begin();
  Thread& thread = *machine.current;
  if (has_tsan()) acquire(&thread.block->tokens->start);
  machine.request.body(machine.request.call);
  leave_thread(thread);
}

}  // namespace

void start_random() { random_state = settings.seed; }

uint64_t random_below(uint64_t bound) { return (random_bits() >> 32) * bound >> 32; }

void yield() {
  Thread& thread = *machine.current;
  Thread* next = next_ready();
  if (next == nullptr) fail("no thread can run");
  if (next != &thread) switch_context(*thread.fiber, enter(*next));
}

void fail(const char* what) {
  machine.error = what;
  leave_context(*machine.current->fiber, machine.launcher);
}

void run_ready() {
  Thread* first = next_ready();
  switch_context(machine.launcher, enter(*first));
}

Fiber& prepare_fiber(size_t number) {
  std::unique_ptr<Fiber>& fiber = machine.fibers[number];
  if (fiber == nullptr) fiber.reset(new Fiber(unsigned(number)));
  fiber->set_entry(run_thread);
  return *fiber;
}

}  // namespace simt
