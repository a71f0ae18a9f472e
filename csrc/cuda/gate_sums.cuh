// The tokens' sums for the losses: a tile's sums, accumulated by the block that processes it (gate.cu), and where the workspace
// keeps them until they are added up (gate_losses.cu).
#pragma once

#include "cuda/token.cuh"

namespace topn_gating::cuda {

// What step 11 of docs/spec.md needs of some valid tokens.
struct TokenStatistics {
  double valid_tokens;  // their number
  double entropy;       // sum of the entropies of their gates
  double squares;       // sum of their squared logits
  double largest;       // largest magnitude of their logits
};

// The arrays in gate's workspace. Sums are over valid tokens.
struct GateSpace {
  double* importance;     // (tiles, e) sums of the gates
  double* z_loss;         // (tiles) sums of logsumexp²
  double* balance;        // (blocks of gate_losses) sums of the terms of the balance loss
  double* group_z_loss;   // (g) sums of logsumexp²
  double* group_valid;    // (g) number of valid tokens
  int32_t* counts;        // (tiles, e) number of the counted ranks that chose this expert
  int32_t* counted;       // (tiles) sum of the tile's counts
  int32_t* valid_tokens;  // (tiles) number of valid tokens
  TokenStatistics* statistics;  // (tiles, warps of a block)
  unsigned* ticket;       // () number of blocks of gate_losses that have ended
  char* rows;             // rows that do not fit registers
  int64_t bytes;          // bytes of the whole workspace
};

constexpr int64_t kExpertsPerBlock = kWarp;  // experts of a block of gate_losses

struct GateTask {
  Gate gate;
  TilePlan plan;
  GateSpace space;
};

// The sums of a tile's tokens over the block that processes it. Where a kernel is not `General`, each valid token has one counted
// rank.
template <class RowLayout, bool General>
class TileSums {
 public:
  using Scalar = typename RowLayout::Scalar;

  static size_t shared_bytes(unsigned block, int64_t experts) {
    return (block * RowLayout::count + block / kWarp) * sizeof(double) + (experts + 1) * sizeof(int32_t);
  }

  __device__ TileSums(const RowLayout& layout, double* shared)
      : layout_(layout), shared_(shared), importance_(shared + warp_id() * kWarp * RowLayout::count),
        z_losses_(shared + blockDim.x * RowLayout::count),
        counts_(reinterpret_cast<int32_t*>(z_losses_ + blockDim.x / kWarp)) {}

  __device__ void start(const GateSpace& /*space*/, int64_t /*tile*/) {
    TOPN_UNROLL
    for (int i = 0; i < RowLayout::count; ++i) run_[i] = 0, total(i) = 0;
    for (int j = int(threadIdx.x); j <= layout_.experts; j += int(blockDim.x)) counts_[j] = 0;
    __syncthreads();
  }

  // Adds a token's gates p, times `share`, and its logsumexp.
  __device__ __forceinline__ void add(const typename RowLayout::template Row<Scalar>& p, Scalar share, double logsumexp) {
    TOPN_UNROLL
    for (int i = 0; i < RowLayout::count; ++i) run_[i] += p[i] * share;
    if (++run_length_ == kRun) flush();
    if (layout_.thread == 0) {
      if constexpr (General) atomicAdd(&counts_[layout_.experts], 1);
      z_loss_ += logsumexp * logsumexp;
    }
  }

  // Counts an expert that a token of this thread's row chose.
  __device__ __forceinline__ void count(int expert) { atomicAdd(&counts_[expert], 1); }

  __device__ void finish(const GateSpace& space, int64_t tile) {
    double sums[RowLayout::count];
    TOPN_UNROLL
    for (int i = 0; i < RowLayout::count; ++i) sums[i] = total(i) + double(run_[i]);
    TOPN_UNROLL
    for (int by = RowLayout::width; by < int(kWarp); by *= 2) {
      TOPN_UNROLL
      for (int i = 0; i < RowLayout::count; ++i) sums[i] += shuffle_xor(sums[i], by);
    }
    __syncwarp();  // the warp's sums, in the order of the experts, overwrite its totals
    if (lane_id() < RowLayout::width) {
      TOPN_UNROLL
      for (int i = 0; i < RowLayout::count; ++i) importance_[layout_.index(i)] = sums[i];
    }
    z_loss_ = warp_sum(z_loss_);
    if (lane_id() == 0) z_losses_[warp_id()] = z_loss_;
    __syncthreads();
    for (int j = int(threadIdx.x); j < layout_.experts; j += int(blockDim.x)) {
      space.importance[tile * layout_.experts + j] = sum_warps(shared_ + j, kWarp * RowLayout::count);
      space.counts[tile * layout_.experts + j] = counts_[j];
    }
    int counted = 0;
    if (warp_id() == 0) {
      for (int j = int(lane_id()); j < layout_.experts; j += int(kWarp)) counted += counts_[j];
      counted = warp_add(counted);
    }
    if (threadIdx.x == 0) {
      space.z_loss[tile] = sum_warps(z_losses_);
      space.counted[tile] = counted;
      space.valid_tokens[tile] = General ? counts_[layout_.experts] : counted;
    }
  }

 private:
  // Number of tokens whose gates are summed in Scalar before the sum is added in double: that costs at most a few roundings, and
  // saves conversions.
  static constexpr int kRun = 8;

  __device__ __forceinline__ void flush() {
    TOPN_UNROLL
    for (int i = 0; i < RowLayout::count; ++i) total(i) += double(run_[i]), run_[i] = 0;
    run_length_ = 0;
  }
  // The total of this thread's value i, in shared memory since it is used rarely.
  __device__ __forceinline__ double& total(int i) { return importance_[i * kWarp + lane_id()]; }

  const RowLayout& layout_;
  double* shared_;
  double* importance_;  // the warp's part of shared_
  double* z_losses_;    // (warps)
  int32_t* counts_;     // (e), and the number of valid tokens
  Scalar run_[RowLayout::count];
  double z_loss_ = 0;
  int run_length_ = 0;
};

// The same where rows are in global memory and a block is one warp: the sums are accumulated in the workspace.
template <class Scalar, bool General>
class TileSums<WarpLayout<Scalar, int(kWarp), 0, 1>, General> {
 public:
  using RowLayout = WarpLayout<Scalar, int(kWarp), 0, 1>;

  static size_t shared_bytes(unsigned /*block*/, int64_t /*experts*/) { return 0; }

  __device__ TileSums(const RowLayout& layout, double* /*shared*/) : layout_(layout) {}

  __device__ void start(const GateSpace& space, int64_t tile) {
    importance_ = space.importance + tile * layout_.experts;
    counts_ = space.counts + tile * layout_.experts;
    z_loss_ = valid_ = counted_ = 0;
    for (int j = int(lane_id()); j < layout_.experts; j += int(kWarp)) importance_[j] = 0, counts_[j] = 0;
    __syncwarp();
  }

  __device__ __forceinline__ void add(const Values<Scalar, 0>& p, Scalar share, double logsumexp) {
    for (int i = 0; i < layout_.count; ++i) {
      if (layout_.valid(i)) importance_[layout_.index(i)] += p[i] * share;
    }
    z_loss_ += logsumexp * logsumexp;
    valid_ += 1;
  }

  __device__ __forceinline__ void count(int expert) {
    atomicAdd(&counts_[expert], 1);
    counted_ += 1;
  }

  __device__ void finish(const GateSpace& space, int64_t tile) {
    const int counted = warp_add(counted_);
    if (lane_id() != 0) return;
    space.z_loss[tile] = z_loss_;
    space.counted[tile] = counted;
    space.valid_tokens[tile] = valid_;
  }

 private:
  const RowLayout& layout_;
  double* importance_ = nullptr;
  int32_t* counts_ = nullptr;
  double z_loss_ = 0;
  int32_t valid_ = 0;    // of the warp
  int32_t counted_ = 0;  // of this thread
};

// Adds up the sums of all tiles and writes importance, counts and both losses.
cudaError_t launch_losses(const GateTask& task, cudaStream_t stream);
// Adds up what all warps have written to GateSpace::statistics and writes the statistics.
cudaError_t launch_statistics(const GateTask& task, cudaStream_t stream);

}  // namespace topn_gating::cuda
