// The threads of a launch on the host: who is where, who runs next, and what went wrong.
//
// Everything here is one global state under the launch's lock. It is compiled without sanitizers, which would take the
// fibers' common use of it for races of the kernel.
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
  unsigned index, lane;
  State state;
  Op op;  // where it waits, or last waited
  unsigned mask;
  Site site;
  uint64_t result;  // what the operation returns
};

// Lanes that wait for one another.
struct Meeting {
  Op op;
  unsigned mask, arrived;
  Site site;
};

struct Warp {
  Thread* threads;
  unsigned existing, exited, at_barrier;  // lanes
  int open;
  Meeting meetings[32];
  uint64_t value[32];
  unsigned char source[32];  // lanes that shuffles read
  Rounds* rounds;
};

struct Barrier {
  Op op;
  Site site;
  unsigned arrived;
  int count;  // of predicates that hold
};

struct Block {
  unsigned index, exited;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  void* shared;
  Tokens* tokens;  // null without ThreadSanitizer, as are all tokens
};

struct Machine {
  Request request;
  std::vector<Block> blocks;  // that are live
  Barrier grid;
  Tokens* tokens = nullptr;
  size_t running = 0;  // threads that have not exited
  Thread* current = nullptr;
  std::vector<Thread*> ready;  // a ring, of a power of two
  size_t first_ready = 0, ready_count = 0;
  const char* error = nullptr;

  Context launcher;
  void* setter = nullptr;  // ThreadSanitizer's thread that sets up blocks, and knows of no block that ran
  std::vector<std::unique_ptr<Fiber>> fibers;
};
extern Machine machine;

struct Settings {
  int schedule = SIMT_FIFO;
  uint64_t seed = 0;
  int multiprocessors = 3;
  long launches = 0;
  std::string error;
};
extern Settings settings;

void start_random();  // from the seed
uint64_t random_below(uint64_t bound);

inline void make_ready(Thread& thread) {
  thread.state = State::Ready;
  machine.ready[(machine.first_ready + machine.ready_count++) & (machine.ready.size() - 1)] = &thread;
}
// The current thread waits, or has been made ready again; another one runs.
void yield();
// Ends the launch with what the current thread did wrong.
[[noreturn]] void fail(const char* what);
// The current thread exits: is anyone waiting for it?
void check_exit(Thread&);

// A fiber of the pool that will run the thread it is given to.
Fiber& prepare_fiber(size_t number);
// Runs all threads that are ready, and those they make ready, until they have exited or one fails.
void run_ready();

const char* op_name(Op);
std::string describe_error();

}  // namespace simt
