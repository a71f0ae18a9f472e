// What the tokens give to the losses: the sums of a tile, made by the block that goes through it (gate.cu), and where they wait
// to be added up (gate_losses.cu).
#pragma once

#include "cuda/token.cuh"

namespace topn_gating::cuda {

// Sums of tiles and groups, and rows.
struct GateSpace {
  double* importance;    // (tiles, e)
  double* z_loss;        // (tiles)
  double* balance;       // (blocks of gate_losses)
  double* group_z_loss;  // (g)
  double* group_real;    // (g) real tokens
  int32_t* top_count;    // (tiles, e)
  int32_t* real;         // (tiles)
  unsigned* ticket;
  char* rows;
  int64_t bytes;
};

constexpr int64_t kExpertsPerBlock = kWarp;  // of gate_losses

struct GateTask {
  Gate gate;
  Tiles tiles;
  GateSpace space;
};

// What a tile's tokens give to the losses, summed over the block that goes through them.
template <class Lanes>
class TileSums {
 public:
  using R = typename Lanes::R;

  static size_t shared_bytes(unsigned block, int64_t experts) {
    return (block * Lanes::count + block / kWarp) * sizeof(double) + experts * sizeof(int32_t);
  }

  __device__ TileSums(const Lanes& lanes, double* shared)
      : lanes_(lanes), shared_(shared), importance_(shared + warp_id() * kWarp * Lanes::count),
        z_losses_(shared + blockDim.x * Lanes::count),
        top_count_(reinterpret_cast<int32_t*>(z_losses_ + blockDim.x / kWarp)) {}

  __device__ void start(const GateSpace& /*space*/, int64_t /*tile*/) {
    TOPN_UNROLL
    for (int i = 0; i < Lanes::count; ++i) run_[i] = 0, total(i) = 0;
    for (int j = int(threadIdx.x); j < lanes_.experts; j += int(blockDim.x)) top_count_[j] = 0;
    __syncthreads();
  }

  // A token's gates, its first expert, its logsumexp.
  __device__ __forceinline__ void add(const typename Lanes::template Row<R>& p, int expert, double logsumexp) {
    TOPN_UNROLL
    for (int i = 0; i < Lanes::count; ++i) run_[i] += p[i];
    if (++run_length_ == kRun) fold();
    if (lanes_.thread == 0) {
      atomicAdd(&top_count_[expert], 1);
      z_loss_ += logsumexp * logsumexp;
    }
  }

  __device__ void finish(const GateSpace& space, int64_t tile) {
    double sums[Lanes::count];
    TOPN_UNROLL
    for (int i = 0; i < Lanes::count; ++i) sums[i] = total(i) + double(run_[i]);
    TOPN_UNROLL
    for (int by = Lanes::width; by < int(kWarp); by *= 2) {
      TOPN_UNROLL
      for (int i = 0; i < Lanes::count; ++i) sums[i] += shuffle_xor(sums[i], by);
    }
    __syncwarp();  // the warp's totals make room for its sums, in the order of the experts
    if (lane_id() < Lanes::width) {
      TOPN_UNROLL
      for (int i = 0; i < Lanes::count; ++i) importance_[lanes_.index(i)] = sums[i];
    }
    z_loss_ = warp_sum(z_loss_);
    if (lane_id() == 0) z_losses_[warp_id()] = z_loss_;
    __syncthreads();
    for (int j = int(threadIdx.x); j < lanes_.experts; j += int(blockDim.x)) {
      space.importance[tile * lanes_.experts + j] = sum_warps(shared_ + j, kWarp * Lanes::count);
      space.top_count[tile * lanes_.experts + j] = top_count_[j];
    }
    int real = 0;
    if (warp_id() == 0) {
      for (int j = int(lane_id()); j < lanes_.experts; j += int(kWarp)) real += top_count_[j];
      real = warp_add(real);
    }
    if (threadIdx.x == 0) {
      space.z_loss[tile] = sum_warps(z_losses_);
      space.real[tile] = real;
    }
  }

 private:
  // Tokens summed in R before they go to double: a few roundings of float at most, and few conversions.
  static constexpr int kRun = 8;

  __device__ __forceinline__ void fold() {
    TOPN_UNROLL
    for (int i = 0; i < Lanes::count; ++i) total(i) += double(run_[i]), run_[i] = 0;
    run_length_ = 0;
  }
  // Of this thread, in shared memory: it is seldom wanted.
  __device__ __forceinline__ double& total(int i) { return importance_[i * kWarp + lane_id()]; }

  const Lanes& lanes_;
  double* shared_;
  double* importance_;  // the warp's
  double* z_losses_;    // (warps)
  int32_t* top_count_;  // (e)
  R run_[Lanes::count];
  double z_loss_ = 0;
  int run_length_ = 0;
};

// The same where rows are in memory and a warp is a block: the sums are where they are wanted.
template <class Real>
class TileSums<WarpLanes<Real, int(kWarp), 0, 1>> {
 public:
  using Lanes = WarpLanes<Real, int(kWarp), 0, 1>;

  static size_t shared_bytes(unsigned /*block*/, int64_t /*experts*/) { return 0; }

  __device__ TileSums(const Lanes& lanes, double* /*shared*/) : lanes_(lanes) {}

  __device__ void start(const GateSpace& space, int64_t tile) {
    importance_ = space.importance + tile * lanes_.experts;
    top_count_ = space.top_count + tile * lanes_.experts;
    z_loss_ = real_ = 0;
    for (int j = int(lane_id()); j < lanes_.experts; j += int(kWarp)) importance_[j] = 0, top_count_[j] = 0;
    __syncwarp();
  }

  __device__ __forceinline__ void add(const Values<Real, 0>& p, int expert, double logsumexp) {
    for (int i = 0; i < lanes_.count; ++i) {
      if (lanes_.real(i)) importance_[lanes_.index(i)] += p[i];
    }
    if (lanes_.thread == 0) top_count_[expert] += 1;
    z_loss_ += logsumexp * logsumexp;
    real_ += 1;
  }

  __device__ void finish(const GateSpace& space, int64_t tile) {
    if (lane_id() != 0) return;
    space.z_loss[tile] = z_loss_;
    space.real[tile] = real_;
  }

 private:
  const Lanes& lanes_;
  double* importance_ = nullptr;
  int32_t* top_count_ = nullptr;
  double z_loss_ = 0;
  int32_t real_ = 0;
};

// Adds up the tiles, for `losses == true`.
cudaError_t launch_losses(const GateTask& task, cudaStream_t stream);

}  // namespace topn_gating::cuda
