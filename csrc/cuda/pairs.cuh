// How `assign` divides the pairs of a group among blocks and warps, and where counts are kept.
//
// Slots are counted along lines: the pairs of one rank in the order of tokens, or in the dropless layout all pairs in the order
// of tokens and then of ranks. A step is 32 pairs of each line, which are neighbours in memory. A group's steps are divided
// into tiles, one for each block, and these into runs, one for each team of warps. A unit is a line of a run: a team has a warp
// for each line, or fewer where a block has not so many.
#pragma once

#include <algorithm>
#include <limits>

#include "cuda/element.cuh"

namespace topn_gating::cuda {

constexpr int kDigits = 256;  // values of a digit, by which the largest keys are selected

// Steps whose operands a warp reads before it uses them.
constexpr unsigned kStepsAtOnce = 4;

// Entries in shared memory from a unit's 32 pairs to the next unit's: with gaps, so that a warp that reads or writes 32 pairs
// of 8 lines, or of one, meets no bank twice.
constexpr unsigned kPitch = kWarp + 4;

// Where a block keeps its ints and the codes of its pairs: in shared memory, the codes in the workspace, or both.
enum class Memory { Shared, SharedInts, Workspace };

// Threads of a block at most: fewer where numbers or addresses of 64 bits take more registers.
constexpr unsigned most_threads(Memory memory, bool is_double) {
  return (is_double || memory == Memory::Workspace ? 2 : 4) * SIMT_BLOCK_THREADS;
}

// A pair's expert, or kNotRouted. In shared memory there is room for the counters of 2^16 experts at most.
template <Memory M>
using Code = std::conditional_t<M == Memory::Workspace, uint32_t, uint16_t>;
template <Memory M>
constexpr Code<M> kNotRouted = Code<M>(-1);

struct AssignTask {
  Assign assign;
  unsigned pairs;         // pairs of a group: n · k
  unsigned lines;         // k, or 1 in the dropless layout
  unsigned bins;          // lines and experts
  unsigned tiles;         // tiles of a group
  bool clustered;         // whether a group's tiles are a cluster
  unsigned teams;         // teams of a block
  unsigned steps;         // steps of a run
  unsigned warps;         // warps of a block
  Memory memory;
  int64_t counters;       // ints of the counters: (units, e), and with keys at least those of a digit for each warp
  int64_t block_ints;     // ints of a block: see TileCounts
  int32_t* counts;        // (g, tiles, bins) routed pairs of the tile, later those of the tiles before it
  int32_t* totals;        // (g, bins) routed pairs of the group
  int32_t* block_memory;  // (blocks, block_ints), null where they are in shared memory
  void* codes;            // (blocks, entries), null where they are in shared memory
  void* keys;             // (g, pairs) the order of the keys (order_of) in the experts' queues, one queue behind the other
  int32_t* queues;        // (g, pairs) the pairs there: an expert's routed pairs in the order of slots
  int64_t bytes;          // bytes of the workspace

  __host__ __device__ unsigned units() const { return teams * lines; }
  __host__ __device__ unsigned step_entries() const { return units() * kPitch; }
  __host__ __device__ int64_t entries() const { return int64_t(steps) * step_entries(); }  // codes of a block, with the gaps
  size_t code_bytes() const { return entries() * (memory == Memory::Workspace ? sizeof(uint32_t) : sizeof(uint16_t)); }
  size_t shared_bytes() const {
    const size_t ints = memory == Memory::Workspace ? 0 : block_ints * sizeof(int32_t);
    return ints + (memory == Memory::Shared ? code_bytes() : 0);
  }
};

// Returns whether the indices of the call fit their types.
inline bool fits(const Assign& a) {
  const int64_t most = std::numeric_limits<int32_t>::max(), ranks = std::max<int64_t>(1, a.top_n);
  return a.tokens <= most / ranks && a.experts <= most / ranks;
}

inline AssignTask task_of(const Assign& a, bool has_clusters) {
  // Steps of a run up to which one tile takes less time than several and their barriers, and at least where there are several.
  constexpr int64_t most_alone = 16, fewest = 4;
  // The same of clusters, whose barriers take less time, and the most for which these have processors enough.
  constexpr int64_t most_blocks = 8, most_clustered = 8;
  AssignTask t{};
  t.assign = a;
  if (!fits(a)) return t;
  const bool by_keys = a.keys != nullptr;
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t shared = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  t.pairs = unsigned(a.tokens * a.top_n);
  t.lines = a.dropless() ? 1 : unsigned(a.top_n);
  t.bins = t.lines * unsigned(a.experts);
  const int64_t steps = ceil_div<int64_t>(t.pairs, int64_t(t.lines) * kWarp);  // of a group

  // Without groups enough for all processors a warp has one step if possible, else as many as it reads at once.
  const int64_t fewest_steps = a.groups < processors ? 1 : kStepsAtOnce;
  const auto set_teams = [&](Memory memory, int64_t most_teams) {
    const int64_t most_warps = most_threads(memory, a.is_double) / kWarp;
    t.memory = memory;
    const int64_t teams = std::min({ceil_div(steps, fewest_steps), most_warps / t.lines, most_teams});
    t.teams = unsigned(std::max<int64_t>(1, teams));
    t.warps = unsigned(ceil_div<int64_t>(t.units(), ceil_div<int64_t>(t.units(), most_warps)));
    t.counters = std::max<int64_t>(int64_t(t.units()) * a.experts, by_keys ? int64_t(t.warps) * kDigits : 0);
    t.block_ints = t.counters + 3 * int64_t(t.bins) + 2 * a.experts + 1 + int64_t(kStepsAtOnce) * t.step_entries();
    return t.block_ints * int64_t(sizeof(int32_t)) <= shared;
  };
  bool fit = set_teams(Memory::SharedInts, steps);
  while (!fit && t.teams > 1) fit = set_teams(Memory::SharedInts, t.teams / 2);
  if (!fit) set_teams(Memory::Workspace, steps);

  // The blocks of a group synchronise, so all of them must be resident.
  const int64_t most_tiles = std::max<int64_t>(1, processors / std::max<int64_t>(1, a.groups));
  const int64_t wanted = std::min(ceil_div<int64_t>(steps, t.teams * fewest), most_tiles);
  t.clustered = has_clusters && fit && steps <= most_blocks * t.teams * most_clustered;
  int64_t tiles = !t.clustered && steps <= t.teams * most_alone ? 1 : std::max<int64_t>(1, wanted);
  if (t.clustered) {  // a power of two, of which some may be empty
    tiles = std::min(tiles, most_blocks);
    while ((tiles & (tiles - 1)) != 0) --tiles;
  }
  t.steps = unsigned(ceil_div<int64_t>(steps, tiles * t.teams));
  t.tiles = unsigned(tiles);
  if (!t.clustered && steps > 0) t.tiles = unsigned(ceil_div<int64_t>(steps, int64_t(t.teams) * t.steps));
  const size_t with_codes = t.block_ints * sizeof(int32_t) + t.code_bytes();
  if (t.memory == Memory::SharedInts && int64_t(with_codes) <= shared) t.memory = Memory::Shared;

  const int64_t blocks = a.groups * t.tiles;
  char* const begin = static_cast<char*>(a.workspace);
  const auto reserve = [&](auto*& to, int64_t bytes) {
    to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(begin + t.bytes);
    t.bytes += ceil_div<int64_t>(bytes, 16) * 16;
  };
  constexpr int64_t of_int = sizeof(int32_t);
  if (by_keys) {
    reserve(t.keys, a.groups * t.pairs * int64_t(a.is_double ? sizeof(int64_t) : sizeof(int32_t)));
    reserve(t.queues, a.groups * t.pairs * of_int);
  }
  if (t.tiles > 1 && !t.clustered) {
    reserve(t.counts, blocks * t.bins * of_int);
    reserve(t.totals, a.groups * t.bins * of_int);
  }
  if (t.memory == Memory::Workspace) reserve(t.block_memory, blocks * t.block_ints * of_int);
  if (t.memory != Memory::Shared) reserve(t.codes, blocks * int64_t(t.code_bytes()));
  return t;
}

// Calls store(i, sum of load(j) for j < i) for each i < count, in order, and returns the sum of all. Loads several values
// before it uses them, and may load the last more than once.
template <class Load, class Store>
__device__ __forceinline__ int32_t scan(unsigned count, const Load& load, const Store& store) {
  constexpr unsigned at_once = 8;
  int32_t sum = 0;
  for (unsigned first = 0; first < count; first += at_once) {
    int32_t own[at_once];
    TOPN_UNROLL
    for (unsigned j = 0; j < at_once; ++j) own[j] = load(first + j < count ? first + j : count - 1);
    TOPN_UNROLL
    for (unsigned j = 0; j < at_once; ++j) {
      if (first + j >= count) break;
      store(first + j, sum);
      sum += own[j];
    }
  }
  return sum;
}

}  // namespace topn_gating::cuda
