// How `assign` shares out the pairs of a group: a tile to a block, a run to a warp; and where their counts lie.
#pragma once

#include <algorithm>

#include "cuda/element.cuh"

namespace topn_gating::cuda {

struct AssignTask {
  Assign assign;
  int64_t pairs, bins;    // n · k, k · e
  int64_t run, tile;      // pairs: of a warp, a multiple of 32; of a block
  unsigned tiles;         // of a group
  unsigned warps;         // of a block
  int64_t block_ints;     // counters (warps, bins), first slots (bins), demand (e)
  bool shared;            // they are in shared memory
  uint32_t* routed;       // (g, words): a bit a pair
  int32_t* counts;        // (g, tiles, bins): routed pairs, then those of the tiles before
  int32_t* totals;        // (g, bins)
  int32_t* block_memory;  // (blocks, block_ints), null where shared
  int64_t bytes;

  __host__ __device__ int64_t words() const { return (pairs + kWarp - 1) / kWarp; }
};

inline AssignTask task_of(const Assign& a) {
  constexpr int64_t most_warps = 2 * SIMT_BLOCK_THREADS / kWarp;
  constexpr int64_t steps = 2;  // that make a run worth a warp
  AssignTask t{};
  t.assign = a;
  t.pairs = a.tokens * a.top_n;
  t.bins = a.top_n * a.experts;
  const int64_t rest = t.bins + a.experts;
  const int64_t ints = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) / int64_t(sizeof(int32_t));
  t.shared = rest + t.bins <= ints;
  const int64_t fit = t.shared ? (ints - rest) / t.bins : most_warps;
  t.warps = unsigned(std::clamp(parts(t.pairs, steps * kWarp), int64_t(1), std::min(fit, most_warps)));
  t.block_ints = t.warps * t.bins + rest;

  // Tiles of a group wait for each other, so all of them must fit on the device.
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t tiles = std::clamp(parts(t.pairs, steps * kWarp * t.warps), int64_t(1),
                                   std::max<int64_t>(1, processors / std::max<int64_t>(1, a.groups)));
  t.run = std::max<int64_t>(1, parts<int64_t>(parts(t.pairs, tiles * t.warps), kWarp)) * kWarp;
  t.tile = t.run * t.warps;
  t.tiles = unsigned(std::max<int64_t>(1, parts(t.pairs, t.tile)));

  char* const begin = static_cast<char*>(a.workspace);
  const auto take = [&](auto*& to, int64_t count) {
    to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(begin + t.bytes);
    t.bytes += count * int64_t(sizeof *to);
  };
  take(t.routed, a.groups * t.words());
  if (t.tiles > 1) {
    take(t.counts, a.groups * t.tiles * t.bins);
    take(t.totals, a.groups * t.bins);
  }
  if (!t.shared) take(t.block_memory, a.groups * t.tiles * t.block_ints);
  return t;
}

// A warp goes through its run in steps of 32 pairs, and reads what several steps need before it goes on.
constexpr int kStepsAtOnce = 4;

// A lane's pair in a step.
struct Pair {
  int64_t of_group;
  int token, rank;
  bool inside;  // the run

  __device__ __forceinline__ int64_t word() const { return of_group / kWarp; }  // the same in the whole warp
};

struct Run {
  int64_t at, end;  // in the group; `at` of lane 0
  int token, rank;  // of this lane's pair
  int top_n;

  __device__ Run(const AssignTask& task, unsigned tile)
      : at(tile * task.tile + warp_id() * task.run), top_n(int(task.assign.top_n)) {
    end = at + task.run < task.pairs ? at + task.run : task.pairs;
    const int64_t first = at + lane_id();
    token = int(first / top_n);
    rank = int(first % top_n);
  }
  __device__ __forceinline__ bool more() const { return at < end; }
  __device__ __forceinline__ Pair take() {
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
