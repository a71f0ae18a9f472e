// The text of simt_error() after a failed launch: what happened, and where every thread is.
#include <cstdio>

#include "scheduler.h"

namespace simt {
namespace {

std::string number(uint64_t value) { return std::to_string(value); }

std::string hex(unsigned value) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", value);
  return text;
}

// Describes where a thread waits: operation, file and line, and mask.
std::string place(const Thread& thread) {
  std::string text = std::string(op_name(thread.op)) + ", " + thread.site.file + ":" + number(thread.site.line);
  if (thread.op <= Op::SyncWarp) text += ", mask " + hex(thread.mask);
  return text;
}

// Describes the state of threads, as the predicate of "threads 0-31 ...".
std::string where(const Thread& thread) {
  switch (thread.state) {
    case State::Ready: return "can run";
    case State::Exited: return "exited";
    case State::Waiting: return "wait at " + place(thread);
  }
  return "";
}

bool same_place(const Thread& a, const Thread& b) {
  return a.state == b.state &&
         (a.state != State::Waiting || (a.op == b.op && a.mask == b.mask && a.site == b.site));
}

// Lists the threads of the block that are at the same place as thread `first`, such as "0-15, 32". Returns "" if a thread
// before `first` is there too, whose list has named them.
std::string others_at(const Block& block, unsigned first) {
  std::string text;
  const auto there = [&](size_t i) { return i < block.threads.size() && same_place(block.threads[i], block.threads[first]); };
  for (size_t i = 0; i < first; ++i) {
    if (there(i)) return "";
  }
  for (size_t i = first; i < block.threads.size(); ++i) {
    if (!there(i) || (i > first && there(i - 1))) continue;
    size_t end = i;
    while (there(end + 1)) ++end;
    text += (text.empty() ? "" : ", ") + number(i) + (end > i ? "-" + number(end) : "");
  }
  return text;
}

}  // namespace

const char* op_name(Op op) {
  switch (op) {
    case Op::ShuffleIndex: return "__shfl_sync";
    case Op::ShuffleUp: return "__shfl_up_sync";
    case Op::ShuffleDown: return "__shfl_down_sync";
    case Op::ShuffleXor: return "__shfl_xor_sync";
    case Op::Ballot: return "__ballot_sync";
    case Op::Any: return "__any_sync";
    case Op::All: return "__all_sync";
    case Op::Match: return "__match_any_sync";
    case Op::Add: return "__reduce_add_sync";
    case Op::MinInt:
    case Op::MinUnsigned: return "__reduce_min_sync";
    case Op::MaxInt:
    case Op::MaxUnsigned: return "__reduce_max_sync";
    case Op::SyncWarp: return "__syncwarp";
    case Op::SyncThreads: return "__syncthreads";
    case Op::SyncThreadsOr: return "__syncthreads_or";
    case Op::SyncThreadsCount: return "__syncthreads_count";
    case Op::SyncGrid: return "simt_grid_sync";
    case Op::SyncCluster: return "simt_cluster_sync";
    case Op::WaitForStream: return "simt_wait_for_stream";
  }
  return "";
}

std::string describe_error() {
  const Thread& culprit = *machine.current;
  std::string text = std::string("simt: kernel ") + machine.request.kernel + ", " + number(machine.request.grid) +
                     " blocks of " + number(machine.request.block) + " threads: " + machine.error;
  text += "\n  block " + number(culprit.block->index) + " thread " + number(culprit.index) + " (lane " +
          number(culprit.lane) + " of warp " + number(culprit.index / 32) + ")";
  text += culprit.state == State::Exited ? " exits" : " is at " + place(culprit);
  for (const Block& block : machine.blocks) {
    for (const Thread& thread : block.threads) {
      const std::string threads = others_at(block, thread.index);
      if (!threads.empty()) text += "\n  block " + number(block.index) + " threads " + threads + ": " + where(thread);
    }
  }
  return text + "\n";
}

}  // namespace simt
