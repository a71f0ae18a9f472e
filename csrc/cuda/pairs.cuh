// How `assign` divides the pairs of a group into tiles, one for each block, and runs, one for each warp; and where counts are
// kept.
#pragma once

#include <algorithm>

#include "cuda/element.cuh"

namespace topn_gating::cuda {

constexpr int kDigits = 256;  // values of a digit, by which the largest keys are selected

struct AssignTask {
  Assign assign;
  int64_t pairs;          // pairs of a group: n · k
  int64_t bins;           // ranks and experts: k · e; in the dropless layout experts alone: e
  int64_t run;            // pairs of a run, a multiple of 32
  int64_t tile;           // pairs of a tile
  unsigned tiles;         // tiles of a group
  unsigned warps;         // warps of a block
  int64_t warp_ints;      // ints of a warp: counters of its run (bins), and with keys at least those of a digit (kDigits)
  int64_t block_ints;     // ints of a block: those of its warps, first slots (bins), demand (e), and dropless or with keys
                          // starts (e + 1)
  bool shared;            // whether these ints are in shared memory
  uint32_t* routed;       // (g, words) a bit for each pair
  int32_t* counts;        // (g, tiles, bins) routed pairs of the tile, later those of the tiles before it
  int32_t* totals;        // (g, bins) routed pairs of the group
  int32_t* block_memory;  // (blocks, block_ints), null where they are in shared memory
  void* keys;             // (g, pairs) the order of the keys (order_of) in the queues of the experts, one queue behind the other
  int32_t* queues;        // (g, pairs) the pairs there: an expert's routed pairs in the order of slots
  int64_t bytes;          // bytes of the workspace

  __host__ __device__ int64_t words() const { return (pairs + kWarp - 1) / kWarp; }
};

inline AssignTask task_of(const Assign& a) {
  constexpr int64_t most_warps = 2 * SIMT_BLOCK_THREADS / kWarp;
  constexpr int64_t steps = 2;  // smallest number of steps of a run
  AssignTask t{};
  t.assign = a;
  t.pairs = a.tokens * a.top_n;
  t.bins = (a.dropless() ? 1 : a.top_n) * a.experts;
  const bool by_keys = a.keys != nullptr;
  t.warp_ints = by_keys ? std::max<int64_t>(t.bins, kDigits) : t.bins;
  const int64_t rest = t.bins + a.experts + (a.dropless() || by_keys ? a.experts + 1 : 0);
  const int64_t ints = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) / int64_t(sizeof(int32_t));
  t.shared = rest + t.warp_ints <= ints;
  const int64_t fit = t.shared ? (ints - rest) / t.warp_ints : most_warps;
  t.warps = unsigned(std::clamp(ceil_div(t.pairs, steps * kWarp), int64_t(1), std::min(fit, most_warps)));
  t.block_ints = t.warps * t.warp_ints + rest;

  // The blocks of a group synchronise, so all of them must be resident.
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t tiles = std::clamp(ceil_div(t.pairs, steps * kWarp * t.warps), int64_t(1),
                                   std::max<int64_t>(1, processors / std::max<int64_t>(1, a.groups)));
  t.run = std::max<int64_t>(1, ceil_div<int64_t>(ceil_div(t.pairs, tiles * t.warps), kWarp)) * kWarp;
  t.tile = t.run * t.warps;
  t.tiles = unsigned(std::max<int64_t>(1, ceil_div(t.pairs, t.tile)));

  char* const begin = static_cast<char*>(a.workspace);
  const auto reserve = [&](auto*& to, int64_t count) {
    to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(begin + t.bytes);
    t.bytes += count * int64_t(sizeof *to);
  };
  if (by_keys) {
    t.keys = begin;
    t.bytes = a.groups * t.pairs * (a.is_double ? sizeof(int64_t) : sizeof(int32_t));
    reserve(t.queues, a.groups * t.pairs);
  }
  reserve(t.routed, a.groups * t.words());
  if (t.tiles > 1) {
    reserve(t.counts, a.groups * t.tiles * t.bins);
    reserve(t.totals, a.groups * t.bins);
  }
  if (!t.shared) reserve(t.block_memory, a.groups * t.tiles * t.block_ints);
  return t;
}

// A warp processes its run in steps of 32 pairs, and reads the operands of several steps before it uses them.
constexpr int kStepsAtOnce = 4;

// The pair of this lane in a step.
struct Pair {
  int64_t index;    // token * top_n + rank in the group
  int token, rank;  // token in the group
  bool in_run;

  __device__ __forceinline__ int64_t word() const { return index / kWarp; }  // index in AssignTask::routed, the same in all lanes
};

// The run of this warp.
struct Run {
  int64_t at, end;  // the next pair of lane 0 and the end of the run, in the group
  int token, rank;  // the next pair of this lane
  int top_n;

  __device__ Run(const AssignTask& task, unsigned tile)
      : at(tile * task.tile + warp_id() * task.run), top_n(int(task.assign.top_n)) {
    end = at + task.run < task.pairs ? at + task.run : task.pairs;
    const int64_t first = at + lane_id();
    token = int(first / top_n);
    rank = int(first % top_n);
  }
  __device__ __forceinline__ bool more() const { return at < end; }
  __device__ __forceinline__ Pair next() {
    const int64_t mine = at + lane_id();
    const Pair pair{mine, token, rank, mine < end};
    at += kWarp;
    token += int(kWarp) / top_n;
    rank += int(kWarp) % top_n;
    if (rank >= top_n) rank -= top_n, ++token;
    return pair;
  }
};

}  // namespace topn_gating::cuda
