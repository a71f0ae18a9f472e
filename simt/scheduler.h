// The state of a launch on the host: where each thread is, which thread runs next, and what went wrong.
//
// The state is global and guarded by the lock that launch() holds. It is compiled without sanitizers: ThreadSanitizer would
// report its use by several fibers as races of the kernel.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "order.h"
#include "simt_host.h"

namespace simt {

struct Block;
struct Warp;

// The place in the source of a call of a warp operation or barrier.
struct Site {
  const char* file;
  int line;
};
inline bool operator==(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}
inline bool operator!=(const Site& a, const Site& b) { return !(a == b); }

enum class State : unsigned char { Ready, Waiting, Exited };

struct Thread {
  Fiber* fiber;
  Block* block;
  Warp* warp;
  unsigned index;  // in the block
  unsigned lane;   // in the warp
  State state;
  bool waited;  // for the stream
  // The operation at which the thread waits or last waited, its mask, the place of its call, and its result.
  Op op;
  unsigned mask;
  Site site;
  uint64_t result;
};

// A warp operation that some lanes have reached and others have not.
struct Meeting {
  Op op;
  unsigned mask;     // lanes that take part
  unsigned arrived;  // lanes of the mask that are there
  Site site;
};

struct Warp {
  Thread* threads;
  unsigned existing, exited, at_barrier;  // masks of the warp's lanes
  int open;                               // number of meetings that are not complete
  Meeting meetings[32];
  uint64_t value[32];        // operand of each lane's operation
  unsigned char source[32];  // lane that each lane's shuffle reads
  Rounds* rounds;            // linked list of the tokens of __syncwarp, one element for each mask
};

// A barrier of a block, or of several.
struct Barrier {
  Op op;
  Site site;
  unsigned arrived;  // number of threads that wait at it
  int count;         // number of those whose predicate holds
};

struct Block {
  unsigned index;   // in the grid
  unsigned exited;  // number of threads that have exited
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  void* shared;
  Tokens* tokens;  // null without ThreadSanitizer
};

// The launch that runs, and what later launches reuse.
struct Machine {
  Request request;
  std::vector<Block> blocks;  // those that run at the same time: all of a cooperative launch or a cluster, else one
  Barrier grid;               // of all these blocks
  Tokens* tokens = nullptr;  // null without ThreadSanitizer
  size_t running = 0;        // number of threads that have not exited
  Thread* current = nullptr;
  std::vector<Thread*> ready;  // ring buffer of the threads that can run; its size is a power of two
  size_t first_ready = 0, ready_count = 0;
  const char* error = nullptr;  // what the current thread did wrong, which ends the launch

  Context launcher;  // the OS thread that called launch()
  // ThreadSanitizer's fiber that sets blocks up. No block that has run is ordered before it, as it would be before the
  // launcher, and of a dependent launch nothing that the launcher did since the last launch that was not dependent.
  void* setter = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;
  size_t first_fiber = 0, last_fiber = 0;  // those of the launch, the last one excluded
};
extern Machine machine;

// What simt_control.h sets and returns.
struct Settings {
  int schedule = SIMT_FIFO;
  uint64_t seed = 0;
  int multiprocessors = 3;
  int clusters = SIMT_CLUSTERS;
  long launches = 0, events = 0;
  std::string error;
};
extern Settings settings;

// Restarts the scheduler's random numbers from the seed.
void start_random();
// Returns a random number less than `bound`.
uint64_t random_below(uint64_t bound);

// Puts a thread at the end of the queue of threads that can run.
inline void make_ready(Thread& thread) {
  thread.state = State::Ready;
  machine.ready[(machine.first_ready + machine.ready_count++) & (machine.ready.size() - 1)] = &thread;
}
// Switches from the current thread, which waits or is queued again, to the next ready thread; returns when it runs again.
void yield();
// Ends the launch with an error: `what` says what the current thread did wrong.
[[noreturn]] void fail(const char* what);
// Fails the launch if other threads wait for this one, which exits.
void check_exit(Thread&);

// Returns fiber `number` of the pool, allocated if need be, ready to run a thread from its start.
Fiber& prepare_fiber(size_t number);
// Runs the ready threads, and those that become ready, until all have exited or one fails.
void run_ready();

// Returns the CUDA function's name.
const char* op_name(Op);
// Returns the text of simt_error() for the launch that failed.
std::string describe_error();

}  // namespace simt
