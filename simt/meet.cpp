// Warp operations and barriers: threads that wait for one another, and their results.
#include "scheduler.h"

namespace simt {
namespace {

// Records that the thread waits at an operation.
void wait_at(Thread& thread, Op op, unsigned mask, Site site) {
  thread.state = State::Waiting;
  thread.op = op;
  thread.mask = mask;
  thread.site = site;
}

// Returns the lane that a shuffle reads, as PTX defines shfl: the argument counts modulo 32, and a lane whose source is outside
// its segment reads its own value.
unsigned shuffle_source(Op op, unsigned lane, int argument, int width) {
  const unsigned arg = unsigned(argument) & 31u, in_segment = unsigned(width) - 1;
  const unsigned first = lane & ~in_segment, last = first | in_segment;
  switch (op) {
    case Op::ShuffleUp: return lane < first + arg ? lane : lane - arg;
    case Op::ShuffleDown: return lane + arg > last ? lane : lane + arg;
    case Op::ShuffleXor: return (lane ^ arg) > last ? lane : lane ^ arg;
    case Op::ShuffleIndex: return first | (arg & in_segment);
    default: return lane;
  }
}

// Calls f(lane) for each lane of the mask, in ascending order.
template <class F>
void for_lanes(unsigned mask, const F& f) {
  for (; mask != 0; mask &= mask - 1) f(unsigned(__builtin_ctz(mask)));
}

// Sets the results of __match_any_sync.
void match(Warp& warp, unsigned mask) {
  while (mask != 0) {
    const uint64_t value = warp.value[__builtin_ctz(mask)];
    unsigned equal = 0;
    for_lanes(mask, [&](unsigned lane) { equal |= unsigned(warp.value[lane] == value) << lane; });
    for_lanes(equal, [&](unsigned lane) { warp.threads[lane].result = equal; });
    mask &= ~equal;
  }
}

// Returns the result of a vote or a reduction, which is the same for all lanes of the mask.
uint64_t vote(Op op, const Warp& warp, unsigned mask) {
  unsigned ballot = 0, sum = 0, least = ~0u, most = 0;
  int lowest = INT32_MAX, highest = INT32_MIN;
  for_lanes(mask, [&](unsigned lane) {
    const unsigned value = unsigned(warp.value[lane]);
    ballot |= unsigned(value != 0) << lane;
    sum += value;
    least = min(least, value);
    most = max(most, value);
    lowest = min(lowest, int(value));
    highest = max(highest, int(value));
  });
  switch (op) {
    case Op::Ballot: return ballot;
    case Op::Any: return ballot != 0;
    case Op::All: return ballot == mask;
    case Op::Add: return sum;
    case Op::MinInt: return unsigned(lowest);
    case Op::MaxInt: return unsigned(highest);
    case Op::MinUnsigned: return least;
    case Op::MaxUnsigned: return most;
    default: return 0;
  }
}

// Sets the lanes' results of a meeting that all lanes have reached, removes it and makes the lanes ready.
void complete(Warp& warp, Meeting& meeting) {
  const unsigned mask = meeting.mask;
  if (meeting.op <= Op::ShuffleXor) {
    for_lanes(mask, [&](unsigned lane) { warp.threads[lane].result = warp.value[warp.source[lane]]; });
  } else if (meeting.op == Op::Match) {
    match(warp, mask);
  } else if (meeting.op != Op::SyncWarp) {
    const uint64_t result = vote(meeting.op, warp, mask);
    for_lanes(mask, [&](unsigned lane) { warp.threads[lane].result = result; });
  }
  meeting = warp.meetings[--warp.open];
  for_lanes(mask, [&](unsigned lane) { make_ready(warp.threads[lane]); });
}

// Returns the meeting of the thread's operation, mask and place of call, a new one if the thread is the first to reach it.
// Fails if lanes of the mask wait elsewhere.
Meeting& join(Warp& warp, const Thread& thread) {
  const unsigned self = 1u << thread.lane;
  for (int i = 0; i < warp.open; ++i) {
    Meeting& other = warp.meetings[i];
    if (other.mask == thread.mask && other.op == thread.op && other.site == thread.site) return other;
    if ((other.mask & self) != 0 && (other.arrived & thread.mask) != 0) fail("lanes of one mask are at different operations");
  }
  if ((warp.at_barrier & thread.mask) != 0) fail("a lane of the mask is at a barrier");
  Meeting& meeting = warp.meetings[warp.open++];
  meeting = {thread.op, thread.mask, 0, thread.site};
  return meeting;
}

void check_mask(const Warp& warp, unsigned lane, unsigned mask) {
  if ((mask >> lane & 1) == 0) fail("the caller's lane is not in its own mask");
  if ((mask & ~warp.existing) != 0) fail("the mask names a lane that does not exist");
  if ((mask & warp.exited) != 0) fail("the mask names a lane that has exited");
}

void check_shuffle(unsigned mask, unsigned source, int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail("the width of a shuffle is no power of two up to 32");
  if ((mask >> source & 1) == 0) fail("a shuffle reads a lane outside its mask");
}

// Returns the tokens of the mask's __syncwarp, allocated at its first use; null without ThreadSanitizer.
Rounds* rounds_of(Warp& warp, unsigned mask) {
  if (!has_tsan()) return nullptr;
  Rounds* rounds = warp.rounds;
  while (rounds != nullptr && rounds->mask != mask) rounds = rounds->next;
  if (rounds != nullptr) return rounds;
  rounds = new Rounds(mask);
  rounds->next = warp.rounds;
  return warp.rounds = rounds;
}

// Waits at a barrier for all threads of `count` blocks; returns the number of threads whose predicate holds.
int meet_all(Barrier& barrier, Rounds* rounds, Block* blocks, size_t count, Op op, int predicate, Site site) {
  Thread& thread = *machine.current;
  Warp& warp = *thread.warp;
  const unsigned self = 1u << thread.lane;
  wait_at(thread, op, 0, site);
  for (int i = 0; i < warp.open; ++i) {
    if ((warp.meetings[i].mask & self) != 0) fail("a lane came to a barrier while others wait for it at a warp operation");
  }
  for (size_t i = 0; i < count; ++i) {
    if (blocks[i].exited != 0) fail("a thread came to a barrier that others missed: they have exited");
  }
  if (barrier.arrived == 0) barrier = {op, site, 0, 0};
  if (barrier.op != op || barrier.site != site) fail("threads are at different barriers");
  warp.at_barrier |= self;
  barrier.count += predicate != 0;
  const Order order(rounds);
  if (++barrier.arrived == count * blocks->threads.size()) {
    if (rounds != nullptr) ++rounds->round;
    barrier.arrived = 0;
    for (size_t i = 0; i < count; ++i) {
      for (Warp& each : blocks[i].warps) each.at_barrier = 0;
      for (Thread& each : blocks[i].threads) {
        each.result = unsigned(barrier.count);
        make_ready(each);
      }
    }
  }
  yield();
  return int(thread.result);
}

}  // namespace

void check_exit(Thread& thread) {
  const Warp& warp = *thread.warp;
  if (machine.request.dependent && !thread.waited) fail("a thread of a dependent launch exits and never waited for the stream");
  for (int i = 0; i < warp.open; ++i) {
    if ((warp.meetings[i].mask >> thread.lane & 1) != 0) fail("a lane exits while others wait for it at a warp operation");
  }
  if (thread.block->barrier.arrived != 0) fail("a thread exits while others wait for it at a barrier");
  if (machine.grid.arrived != 0) fail("a thread exits while others wait for it at a barrier of several blocks");
}

uint64_t meet_warp(Op op, unsigned mask, uint64_t value, int argument, int width, const char* file, int line) {
  Thread& thread = *machine.current;
  Warp& warp = *thread.warp;
  const unsigned lane = thread.lane;
  wait_at(thread, op, mask, {file, line});
  check_mask(warp, lane, mask);
  if (op <= Op::ShuffleXor) {
    const unsigned source = shuffle_source(op, lane, argument, width);
    check_shuffle(mask, source, width);
    warp.source[lane] = static_cast<unsigned char>(source);
  }
  warp.value[lane] = value;
  Meeting& meeting = join(warp, thread);
  meeting.arrived |= 1u << lane;
  Rounds* rounds = op == Op::SyncWarp ? rounds_of(warp, mask) : nullptr;
  const Order order(rounds);
  if (meeting.arrived == mask) {
    if (rounds != nullptr) ++rounds->round;
    complete(warp, meeting);
  }
  yield();
  return thread.result;
}

int meet_block(Op op, int predicate, const char* file, int line) {
  Block& block = *machine.current->block;
  Rounds* rounds = block.tokens == nullptr ? nullptr : &block.tokens->barrier;
  const int count = meet_all(block.barrier, rounds, &block, 1, op, predicate, {file, line});
  return op == Op::SyncThreadsOr ? count != 0 : count;
}

void meet_grid(const char* file, int line) {
  if (!machine.request.cooperative) {
    wait_at(*machine.current, Op::SyncGrid, 0, {file, line});
    fail("a barrier of the grid in a launch that is not cooperative");
  }
  Rounds* rounds = machine.tokens == nullptr ? nullptr : &machine.tokens->barrier;
  meet_all(machine.grid, rounds, machine.blocks.data(), machine.blocks.size(), Op::SyncGrid, 0, {file, line});
}

void meet_cluster(const char* file, int line) {
  if (machine.request.cluster == 0) {
    wait_at(*machine.current, Op::SyncCluster, 0, {file, line});
    fail("a barrier of a cluster in a launch that has none");
  }
  Tokens* tokens = machine.blocks.front().tokens;
  Rounds* rounds = tokens == nullptr ? nullptr : &tokens->cluster;
  meet_all(machine.grid, rounds, machine.blocks.data(), machine.blocks.size(), Op::SyncCluster, 0, {file, line});
}

void wait_for_stream(const char* file, int line) {
  Thread& thread = *machine.current;
  if (thread.waited) {
    wait_at(thread, Op::WaitForStream, 0, {file, line});
    fail("a thread waits for the stream a second time");
  }
  thread.waited = true;
  if (has_tsan()) acquire(&machine.tokens->start);
}

void* shared_of(void* address, unsigned rank) {
  const ptrdiff_t offset = static_cast<char*>(address) - static_cast<char*>(machine.current->block->shared);
  return static_cast<char*>(machine.blocks[rank].shared) + offset;
}

}  // namespace simt
