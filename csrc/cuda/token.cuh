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

// Upper limit of the elements of a tile's rows, whose indices have 32 bits.
constexpr int64_t kMostInTile = int64_t(1) << 30;
// Upper limit of the global memory that rows may take, in bytes.
constexpr int64_t kMemoryForRows = int64_t(64) << 20;

// Launch bounds. A block has fewer threads where they need more registers, so that more of these serve.
template <class RowLayout>
constexpr unsigned kBlockThreads = !RowLayout::in_registers    ? kWarp
                                   : RowLayout::unroll > 8     ? SIMT_BLOCK_THREADS / 2
                                                               : SIMT_BLOCK_THREADS;
// Without the number of resident blocks the compiler would spill registers to fit more of them.
template <class RowLayout>
constexpr unsigned kResidentBlocks = !RowLayout::in_registers                  ? 8
                                     : sizeof(typename RowLayout::Scalar) == 8 ? 1
                                     : RowLayout::unroll > 8                   ? 3
                                                                               : 2;

// Plans tiles for as many blocks as are resident, `resident` on each multiprocessor.
template <class RowLayout>
TilePlan plan_tiles(const GateInputs& a, int64_t bytes_per_expert, bool aligned16, int resident) {
  TilePlan plan{};
  plan.aligned16 = aligned16;
  plan.block = kBlockThreads<RowLayout>;
  const int64_t rows = plan.block / RowLayout::width;
  int64_t blocks = int64_t(device_attribute(cudaDevAttrMultiProcessorCount)) * std::max(resident, 1);
  if (!RowLayout::in_registers) {
    plan.row_bytes = ceil_div<int64_t>(a.experts, kWarp) * kWarp * bytes_per_expert;
    blocks = std::min(blocks, std::max<int64_t>(1, kMemoryForRows / plan.row_bytes));
  }
  const int64_t of_group = std::max<int64_t>(1, blocks / std::max<int64_t>(1, a.groups));
  const int64_t most_rows = std::max<int64_t>(1, kMostInTile / std::max(a.experts, a.top_n) / rows);
  plan.tokens = std::clamp<int64_t>(ceil_div(ceil_div(a.tokens, of_group), rows), 1, most_rows) * rows;
  plan.per_group = ceil_div(a.tokens, plan.tokens);
  plan.count = a.groups * plan.per_group;
  plan.grid = unsigned(std::clamp<int64_t>(plan.count, 1, blocks));
  return plan;
}

// The largest sizes of the kernels whose rows are in registers and shared by parts of a warp.
constexpr int64_t kMostExperts = 512, kMostRanks = 16;

// The routers that such a kernel is compiled for. Each kind includes those before it.
enum class Kind {
  Plain,   // softmax gates, experts chosen by their scores, at most eight of them; no noise and no mask
  Scores,  // with noise, a mask, more ranks and given experts
  Gates,   // sigmoids; a bias of the selection and groups of experts
};

// Calls f with a null pointer whose type is the layout for rows of at most kMostExperts.
template <class T, class F>
auto with_layout(int64_t experts, const F& f) {
  constexpr int chunk = kPackSize<T>;
  const auto call = [&](auto* layout) { return f(layout); };
  if (experts <= 8) return call((WarpLayout<float, 1, 8, chunk>*)nullptr);
  if (experts <= 16) return call((WarpLayout<float, 2, 8, chunk>*)nullptr);
  if (experts <= 32) return call((WarpLayout<float, 4, 8, chunk>*)nullptr);
  if (experts <= 64) return call((WarpLayout<float, 8, 8, chunk>*)nullptr);
  if (experts <= 128) return call((WarpLayout<float, 8, 16, chunk>*)nullptr);
  if (experts <= 256) return call((WarpLayout<float, 16, 16, chunk>*)nullptr);
  return call((WarpLayout<float, 32, 16, chunk>*)nullptr);
}

// The same for rows of any size, in double where T is double or `soft` is set. A whole warp shares a row.
template <class T, class F>
auto with_general_layout(int64_t experts, bool soft, const F& f) {
  const auto call = [&](auto* layout) { return f(layout); };
  if constexpr (!std::is_same_v<T, double>) {
    if (!soft) return experts <= 256 ? call((WarpLayout<float, 32, 8, 1>*)nullptr) : call((WarpLayout<float, 32, 0, 1>*)nullptr);
  }
  return experts <= 256 ? call((WarpLayout<double, 32, 8, 1>*)nullptr) : call((WarpLayout<double, 32, 0, 1>*)nullptr);
}

// Returns f(element, layout, kind): null pointers whose types are the element type and the layout of at most kMostExperts, and
// the kind as a constant. The elements are not double.
template <class Launch, class F>
Launch launch_of_rows(const GateInputs& a, Kind kind, const F& f) {
  Launch launch;
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    if constexpr (!std::is_same_v<T, double>) {
      with_layout<T>(a.experts, [&](auto* layout) {
        switch (kind) {
          case Kind::Plain: launch = f(element, layout, std::integral_constant<Kind, Kind::Plain>()); break;
          case Kind::Scores: launch = f(element, layout, std::integral_constant<Kind, Kind::Scores>()); break;
          case Kind::Gates: launch = f(element, layout, std::integral_constant<Kind, Kind::Gates>()); break;
        }
      });
    }
    return cudaSuccess;
  });
  return launch;
}

// Returns f(element, layout): the same with the layout for any number of experts.
template <class Launch, class F>
Launch launch_of_any(const GateInputs& a, const F& f) {
  Launch launch;
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    with_general_layout<T>(a.experts, a.soft, [&](auto* layout) { launch = f(element, layout); });
    return cudaSuccess;
  });
  return launch;
}

// Whether a row serves the soft top-n alone: it is computed in double, although the elements are not double.
template <class T, class RowLayout>
constexpr bool kSoftOnly = std::is_same_v<typename RowLayout::Scalar, double> && !std::is_same_v<T, double>;

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
      : layout_(layout), a_(a), aligned16_(plan.aligned16), first_(tile.first), count_(int(tile.last - tile.first)),
        next_(int(threadIdx.x) / RowLayout::width), step_(int(blockDim.x) / RowLayout::width),
        rows_(logits_of<T>(a, tile.first)) {
    keep(rows_);
    keep(step_);
    layout.start(fetched_);
    fetch();
  }

  // Returns whether a row of this warp has a token left.
  __device__ __forceinline__ bool more() const {
    return (RowLayout::width == int(kWarp) ? next_ : next_ - int(lane_id()) / RowLayout::width) < count_;
  }
  // Moves on to the next token and reads its logits.
  __device__ __forceinline__ void next_logits(Row& s) {
    in_tile = next_ < count_;
    index = in_tile ? next_ : count_ - 1;
    token = first_ + index;
    next_ += step_;
    if constexpr (RowLayout::in_registers) {
      layout_.unpack(fetched_, s);
      fetch();
    } else {
      layout_.load(logits(), aligned16_, s);
    }
  }
  // Moves on to the next token and reads its scores.
  __device__ __forceinline__ void next(Row& s) {
    next_logits(s);
    add_noise<T>(layout_, a_, token, s);
  }

  // Returns the index in the tile of the token that comes next; past the tile's end, of the last one.
  __device__ __forceinline__ int upcoming() const { return next_ < count_ ? next_ : count_ - 1; }
  // Returns the current token's logits.
  __device__ __forceinline__ const T* logits() const { return rows_ + index * layout_.experts; }

  int64_t token = 0;     // index over all groups of the current token
  int index = 0;         // index in the tile of the current token
  bool in_tile = false;  // whether the current token is new: not a repetition of the last one

 private:
  __device__ __forceinline__ void fetch() {
    if constexpr (RowLayout::in_registers) {
      if (more()) layout_.fetch(rows_ + upcoming() * layout_.experts, aligned16_, fetched_);
    }
  }

  const RowLayout& layout_;
  const GateInputs& a_;
  const bool aligned16_;
  const int64_t first_;
  const int count_;  // tokens of the tile
  int next_;
  int step_;  // rows of the block
  const T* rows_;
  typename RowLayout::template Fetched<T> fetched_;
};

}  // namespace topn_gating::cuda
