// How `gate` and its gradient walk over tokens: which threads share a row, which tokens make a tile, where rows too long for
// registers lie.
#pragma once

#include <algorithm>

#include "cuda/lanes.cuh"

namespace topn_gating::cuda {

// Tiles of tokens of one group, each the work of one block.
struct Tiles {
  int64_t tokens;    // of a tile; a group's last has what is left
  int64_t of_group;  // tiles
  int64_t count;     // of all groups
  unsigned grid, block;
  int64_t row_bytes;  // of memory for the rows of a warp, 0 where they are in registers
  bool wide;          // rows are aligned to 16 bytes

  int64_t memory_bytes() const { return row_bytes * grid; }
};

// A tile as a block sees it.
struct Tile {
  int64_t group, first, last;  // tokens, over all groups

  __device__ Tile(const Tiles& tiles, int64_t tile, int64_t tokens_of_group) : group(tile / tiles.of_group) {
    const int64_t start = tile % tiles.of_group * tiles.tokens;
    first = group * tokens_of_group + start;
    last = group * tokens_of_group + (start + tiles.tokens < tokens_of_group ? start + tiles.tokens : tokens_of_group);
  }
};

// Threads of a multiprocessor that the tiles should keep busy, and memory that rows may take beside the tensors.
constexpr int64_t kThreadsPerProcessor = 2048;
constexpr int64_t kMemoryForRows = int64_t(64) << 20;

// Threads of a block, and blocks that a multiprocessor should hold: told to the compiler, or it spills registers to hold more.
template <class Lanes>
constexpr unsigned kBlockThreads = Lanes::in_registers ? SIMT_BLOCK_THREADS : kWarp;
template <class Lanes>
constexpr unsigned kResidentBlocks = !Lanes::in_registers ? 8 : Lanes::unroll > 8 || sizeof(typename Lanes::R) == 8 ? 1 : 2;

template <class Lanes, class Args>
Tiles plan_tiles(const Args& a, int64_t bytes_per_expert, bool wide) {
  constexpr bool in_registers = Lanes::in_registers;
  Tiles t{};
  t.wide = wide;
  t.block = kBlockThreads<Lanes>;
  const int64_t rows = t.block / Lanes::width, total = a.groups * a.tokens;
  int64_t blocks = device_attribute(cudaDevAttrMultiProcessorCount) * std::max<int64_t>(1, kThreadsPerProcessor / t.block);
  if (!in_registers) {
    t.row_bytes = parts<int64_t>(a.experts, kWarp) * kWarp * bytes_per_expert;
    blocks = std::min(blocks, std::max<int64_t>(1, kMemoryForRows / t.row_bytes));
  }
  t.tokens = std::max<int64_t>(1, parts(parts(total, blocks), rows)) * rows;
  t.of_group = parts(a.tokens, t.tokens);
  t.count = a.groups * t.of_group;
  // Rows in registers have a block for each tile: 0, which a launch refuses, where a grid has not as many.
  const bool fits = t.count <= std::numeric_limits<int32_t>::max();
  t.grid = unsigned(in_registers ? fits * std::max<int64_t>(1, t.count) : std::clamp<int64_t>(t.count, 1, blocks));
  return t;
}

// Ranks of a token that the threads of its row keep in registers; with more its row is in memory.
constexpr int kRanks = 16;

// Rows in double of other types are those of the soft top-n.
template <class T, class Lanes>
constexpr bool kSoftOnly = std::is_same_v<typename Lanes::R, double> && !std::is_same_v<T, double>;

// Whether a row's experts are found by sorting.
template <class Lanes>
constexpr bool kSorted = Lanes::in_registers && std::is_same_v<typename Lanes::R, float>;

// Calls f with a null pointer to the lanes that a row of these sizes takes.
template <class T, class F>
auto with_lanes(int64_t experts, int64_t top_n, bool soft, const F& f) {
  constexpr int chunk = kWide<T>;
  const auto of = [&](auto* lanes) { return f(lanes); };
  if constexpr (std::is_same_v<T, double>) {
    return experts <= 256 ? of((WarpLanes<double, 32, 8, 1>*)nullptr) : of((WarpLanes<double, 32, 0, 1>*)nullptr);
  } else {
    if (soft) return experts <= 256 ? of((WarpLanes<double, 32, 8, 1>*)nullptr) : of((WarpLanes<double, 32, 0, 1>*)nullptr);
    if (experts > 512 || top_n > kRanks) return of((WarpLanes<float, 32, 0, 1>*)nullptr);
    if (experts <= 8) return of((WarpLanes<float, 1, 8, chunk>*)nullptr);
    if (experts <= 16) return of((WarpLanes<float, 2, 8, chunk>*)nullptr);
    if (experts <= 32) return of((WarpLanes<float, 4, 8, chunk>*)nullptr);
    if (experts <= 64) return of((WarpLanes<float, 8, 8, chunk>*)nullptr);
    if (experts <= 128) return of((WarpLanes<float, 16, 8, chunk>*)nullptr);
    if (experts <= 256) return of((WarpLanes<float, 32, 8, chunk>*)nullptr);
    return of((WarpLanes<float, 32, 16, chunk>*)nullptr);
  }
}

// Calls f with null pointers to the element type and to the lanes of the rows.
template <class Args, class F>
cudaError_t with_row(const Args& a, const F& f) {
  return with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    return with_lanes<T>(a.experts, a.top_n, a.soft, [&](auto* lanes) { return f(element, lanes); });
  });
}

template <class T, class Args>
__device__ __forceinline__ const T* logits_of(const Args& a, int64_t token) {
  return static_cast<const T*>(a.logits) + token * a.experts;
}

// SPEC step 3, in place: logits become scores.
template <class T, class Lanes, class Args>
__device__ __forceinline__ void add_noise(const Lanes& lanes, const Args& a, int64_t token,
                                          typename Lanes::template Row<typename Lanes::R>& s) {
  using R = typename Lanes::R;
  if (a.noise == nullptr) return;
  const RealOf<T>* const noise = static_cast<const RealOf<T>*>(a.noise) + token * a.experts;
  TOPN_UNROLL_BY(Lanes::unroll)
  for (int i = 0; i < lanes.count; ++i) {
    if (lanes.real(i)) s[i] += R(a.noise_mult) * gumbel<R>(R(noise[lanes.index(i)]));
  }
}

// Goes through the tokens of a tile that fall to this thread's row, and reads each row while the one before is worked on. A row
// that shares a warp with a live one works along past the tile's end, on the last token.
template <class T, class Lanes, class Args>
class TokenRows {
 public:
  using Row = typename Lanes::template Row<typename Lanes::R>;

  __device__ TokenRows(const Lanes& lanes, const Args& a, const Tiles& tiles, const Tile& tile)
      : lanes_(lanes), a_(a), wide_(tiles.wide), last_(tile.last), next_(tile.first + threadIdx.x / Lanes::width) {
    fetch();
  }

  // The same in a whole warp.
  __device__ __forceinline__ bool more() const {
    return (Lanes::width == int(kWarp) ? next_ : next_ - threadIdx.x / Lanes::width) < last_;
  }
  // Reads the next token's scores.
  __device__ __forceinline__ void take(Row& s) {
    live = next_ < last_;
    token = live ? next_ : last_ - 1;
    next_ += blockDim.x / Lanes::width;
    if constexpr (Lanes::in_registers) {
      const typename Lanes::template Fetched<T> now = fetched_;
      fetch();
      lanes_.unpack(now, s);
    } else {
      lanes_.load(logits_of<T>(a_, token), wide_, s);
    }
    add_noise<T>(lanes_, a_, token, s);
  }

  int64_t token = 0;  // that was taken
  bool live = false;

 private:
  __device__ __forceinline__ void fetch() {
    if constexpr (Lanes::in_registers) {
      if (more()) lanes_.fetch(logits_of<T>(a_, next_ < last_ ? next_ : last_ - 1), wide_, fetched_);
    }
  }

  const Lanes& lanes_;
  const Args& a_;
  const bool wide_;
  const int64_t last_;
  int64_t next_;
  typename Lanes::template Fetched<T> fetched_{};
};

}  // namespace topn_gating::cuda
