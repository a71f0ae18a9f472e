// How `gate` and its gradient walk over tokens: which threads share a row, which tokens make a tile, and where rows are that do
// not fit registers.
#pragma once

#include <algorithm>

#include "cuda/layout.cuh"

namespace topn_gating::cuda {

// How the tokens of each group are divided into tiles. A block processes a tile at a time.
struct TilePlan {
  int64_t tokens;     // tokens of a tile; the last one of a group may have fewer
  int64_t per_group;  // tiles of a group
  int64_t count;      // tiles of all groups
  unsigned grid, block;
  int64_t row_bytes;  // global memory for the rows of a block, 0 where rows are in registers
  bool aligned16;     // whether the rows of the tensors are aligned to 16 bytes

  int64_t memory_bytes() const { return row_bytes * grid; }
};

struct Tile {
  int64_t group;
  int64_t first, last;  // range of tokens, indices over all groups

  __device__ Tile(const TilePlan& plan, int64_t tile, int64_t tokens_of_group) : group(tile / plan.per_group) {
    const int64_t start = tile % plan.per_group * plan.tokens;
    first = group * tokens_of_group + start;
    last = group * tokens_of_group + (start + plan.tokens < tokens_of_group ? start + plan.tokens : tokens_of_group);
  }
};

// Threads of a multiprocessor that the tiles should keep busy.
constexpr int64_t kThreadsPerProcessor = 2048;
// Upper limit of the global memory that rows may take, in bytes.
constexpr int64_t kMemoryForRows = int64_t(64) << 20;

// Launch bounds. Without the number of resident blocks the compiler would spill registers to fit more of them.
template <class RowLayout>
constexpr unsigned kBlockThreads = RowLayout::in_registers ? SIMT_BLOCK_THREADS : kWarp;
template <class RowLayout>
constexpr unsigned kResidentBlocks =
    !RowLayout::in_registers ? 8 : RowLayout::unroll > 8 || sizeof(typename RowLayout::Scalar) == 8 ? 1 : 2;

template <class RowLayout>
TilePlan plan_tiles(const GateInputs& a, int64_t bytes_per_expert, bool aligned16) {
  constexpr bool in_registers = RowLayout::in_registers;
  TilePlan plan{};
  plan.aligned16 = aligned16;
  plan.block = kBlockThreads<RowLayout>;
  const int64_t rows = plan.block / RowLayout::width, total = a.groups * a.tokens;
  int64_t blocks = device_attribute(cudaDevAttrMultiProcessorCount) * std::max<int64_t>(1, kThreadsPerProcessor / plan.block);
  if (!in_registers) {
    plan.row_bytes = ceil_div<int64_t>(a.experts, kWarp) * kWarp * bytes_per_expert;
    blocks = std::min(blocks, std::max<int64_t>(1, kMemoryForRows / plan.row_bytes));
  }
  plan.tokens = std::max<int64_t>(1, ceil_div(ceil_div(total, blocks), rows)) * rows;
  plan.per_group = ceil_div(a.tokens, plan.tokens);
  plan.count = a.groups * plan.per_group;
  // Where rows are in registers, each tile has a block. A grid of 0 blocks, which a launch refuses, stands for more than a grid
  // can have.
  const bool fits = plan.count <= std::numeric_limits<int32_t>::max();
  plan.grid = unsigned(in_registers ? fits * std::max<int64_t>(1, plan.count) : std::clamp<int64_t>(plan.count, 1, blocks));
  return plan;
}

// The largest top_n whose chosen experts fit the registers of a row's threads. For a larger one rows are in global memory.
constexpr int kRanks = 16;

// Whether a row serves the soft top-n alone: it is computed in double, although the elements are not double.
template <class T, class RowLayout>
constexpr bool kSoftOnly = std::is_same_v<typename RowLayout::Scalar, double> && !std::is_same_v<T, double>;

// Whether a row's experts are chosen by sorting.
template <class RowLayout>
constexpr bool kSorted = RowLayout::in_registers && std::is_same_v<typename RowLayout::Scalar, float>;

// Calls f with a null pointer whose type is the layout for rows of these sizes.
template <class T, class F>
auto with_layout(int64_t experts, int64_t top_n, bool soft, const F& f) {
  constexpr int chunk = kPackSize<T>;
  const auto call = [&](auto* layout) { return f(layout); };
  if constexpr (std::is_same_v<T, double>) {
    return experts <= 256 ? call((WarpLayout<double, 32, 8, 1>*)nullptr) : call((WarpLayout<double, 32, 0, 1>*)nullptr);
  } else {
    if (soft) return experts <= 256 ? call((WarpLayout<double, 32, 8, 1>*)nullptr) : call((WarpLayout<double, 32, 0, 1>*)nullptr);
    if (experts > 512 || top_n > kRanks) return call((WarpLayout<float, 32, 0, 1>*)nullptr);
    if (experts <= 8) return call((WarpLayout<float, 1, 8, chunk>*)nullptr);
    if (experts <= 16) return call((WarpLayout<float, 2, 8, chunk>*)nullptr);
    if (experts <= 32) return call((WarpLayout<float, 4, 8, chunk>*)nullptr);
    if (experts <= 64) return call((WarpLayout<float, 8, 8, chunk>*)nullptr);
    if (experts <= 128) return call((WarpLayout<float, 16, 8, chunk>*)nullptr);
    if (experts <= 256) return call((WarpLayout<float, 32, 8, chunk>*)nullptr);
    return call((WarpLayout<float, 32, 16, chunk>*)nullptr);
  }
}

// The same for the kernels of any router, whose rows are shared by a whole warp each.
template <class T, class F>
auto with_general_layout(int64_t experts, bool soft, const F& f) {
  const auto call = [&](auto* layout) { return f(layout); };
  if constexpr (!std::is_same_v<T, double>) {
    if (!soft) return experts <= 256 ? call((WarpLayout<float, 32, 8, 1>*)nullptr) : call((WarpLayout<float, 32, 0, 1>*)nullptr);
  }
  return experts <= 256 ? call((WarpLayout<double, 32, 8, 1>*)nullptr) : call((WarpLayout<double, 32, 0, 1>*)nullptr);
}

// Calls f with null pointers whose types are the element type and the layout of the rows, and with `general` as a constant:
// whether the kernel is that of any router, not only of the softmax's largest scores.
template <class F>
cudaError_t with_row(const GateInputs& a, bool general, const F& f) {
  return with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    if (general) {
      return with_general_layout<T>(a.experts, a.soft, [&](auto* layout) { return f(element, layout, std::true_type{}); });
    }
    return with_layout<T>(a.experts, a.top_n, a.soft, [&](auto* layout) { return f(element, layout, std::false_type{}); });
  });
}

template <class T>
__device__ __forceinline__ const T* logits_of(const GateInputs& a, int64_t token) {
  return static_cast<const T*>(a.logits) + token * a.experts;
}

__device__ __forceinline__ bool is_valid(const GateInputs& a, int64_t token) {
  return a.token_mask == nullptr || a.token_mask[token];
}

template <class Scalar>
__device__ __forceinline__ double value_of(const LogSumExp<Scalar>& lse) {
  return double(lse.max) + ::log(double(lse.sum));
}

// Turns scores into gates other than a softmax, in place, and returns their sum. Writes each derivative by slope(i, value).
template <class RowLayout, class Row, class Slope>
__device__ __forceinline__ typename RowLayout::Scalar score_gates_of(Score score, const RowLayout& layout, Row& s,
                                                                     const Slope& slope) {
  return score == Score::Sigmoid ? score_gates<Score::Sigmoid>(layout, s, slope)
                                 : score_gates<Score::SqrtSoftplus>(layout, s, slope);
}

// docs/spec.md, step 3: turns logits into scores, in place.
template <class T, class RowLayout>
__device__ __forceinline__ void add_noise(const RowLayout& layout, const GateInputs& a, int64_t token,
                                          typename RowLayout::template Row<typename RowLayout::Scalar>& s) {
  using Scalar = typename RowLayout::Scalar;
  if (a.noise == nullptr) return;
  const ComputeType<T>* const noise = static_cast<const ComputeType<T>*>(a.noise) + token * a.experts;
  TOPN_UNROLL_BY(RowLayout::unroll)
  for (int i = 0; i < layout.count; ++i) {
    if (layout.valid(i)) s[i] += Scalar(a.noise_mult) * gumbel<RowLayout>(Scalar(noise[layout.index(i)]));
  }
}

// Walks over the tokens of a tile whose rows this thread has a part of, and prefetches each row while the one before is
// processed. Where other rows of the warp still have tokens, a row past the tile's end repeats the tile's last token.
template <class T, class RowLayout>
class TokenRows {
 public:
  using Row = typename RowLayout::template Row<typename RowLayout::Scalar>;

  __device__ TokenRows(const RowLayout& layout, const GateInputs& a, const TilePlan& plan, const Tile& tile)
      : layout_(layout), a_(a), aligned16_(plan.aligned16), last_(tile.last),
        next_(tile.first + threadIdx.x / RowLayout::width) {
    fetch();
  }

  // Returns whether a row of this warp has a token left.
  __device__ __forceinline__ bool more() const {
    return (RowLayout::width == int(kWarp) ? next_ : next_ - threadIdx.x / RowLayout::width) < last_;
  }
  // Moves on to the next token and reads its scores.
  __device__ __forceinline__ void next(Row& s) {
    in_tile = next_ < last_;
    token = in_tile ? next_ : last_ - 1;
    next_ += blockDim.x / RowLayout::width;
    if constexpr (RowLayout::in_registers) {
      const typename RowLayout::template Fetched<T> now = fetched_;
      fetch();
      layout_.unpack(now, s);
    } else {
      layout_.load(logits_of<T>(a_, token), aligned16_, s);
    }
    add_noise<T>(layout_, a_, token, s);
  }

  int64_t token = 0;     // index over all groups of the current token
  bool in_tile = false;  // whether the current token is new: not a repetition of the last one

 private:
  __device__ __forceinline__ void fetch() {
    if constexpr (RowLayout::in_registers) {
      if (more()) layout_.fetch(logits_of<T>(a_, next_ < last_ ? next_ : last_ - 1), aligned16_, fetched_);
    }
  }

  const RowLayout& layout_;
  const GateInputs& a_;
  const bool aligned16_;
  const int64_t last_;
  int64_t next_;
  typename RowLayout::template Fetched<T> fetched_{};
};

}  // namespace topn_gating::cuda
