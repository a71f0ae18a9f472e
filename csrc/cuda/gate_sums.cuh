// The tokens' sums for the losses: those of a tile, which the block that processes it accumulates, and their addition to those
// of groups and to the losses, in a fixed order.
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
  double* balance;        // (g, chunks of experts) sums of the terms of the balance loss
  double* group_z_loss;   // (g) sums of logsumexp²
  double* group_valid;    // (g) number of valid tokens
  int32_t* counts;        // (tiles, e) number of the counted ranks that chose this expert
  int32_t* counted;       // (tiles) sum of the tile's counts
  int32_t* valid_tokens;  // (tiles) number of valid tokens
  TokenStatistics* statistics;  // (tiles, warps of a block)
  unsigned* ticket;       // () number of blocks that have added up their tiles
  char* rows;             // rows that do not fit registers
  int64_t bytes;          // bytes of the whole workspace
};

struct GateTask {
  Gate gate;
  TilePlan plan;
  GateSpace space;
};

// The sums of a tile's tokens over the block that processes it.
template <class RowLayout>
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
    z_loss_ = 0;
    run_length_ = 0;
    __syncthreads();
  }

  // Adds a token's gates p, times `share`.
  __device__ __forceinline__ void add_gates(const typename RowLayout::template Row<Scalar>& p, Scalar share) {
    TOPN_UNROLL
    for (int i = 0; i < RowLayout::count; ++i) run_[i] += p[i] * share;
  }
  // Must follow each call of add_gates by any thread of the warp.
  __device__ __forceinline__ void next_token() {
    if (++run_length_ == kRun) flush();
  }
  // Adds a token's logsumexp; one thread does.
  __device__ __forceinline__ void add_logsumexp(double value) { z_loss_ += value * value; }
  // Counts an expert that a token chose; one thread does.
  __device__ __forceinline__ void count(int expert) { atomicAdd(&counts_[expert], 1); }
  // Counts a valid token, where their number does not follow from the counted experts; one thread does.
  __device__ __forceinline__ void count_valid() { atomicAdd(&counts_[layout_.experts], 1); }

  // Writes the sums. `ranks` is the number of experts that each valid token has counted, or 0 where `count_valid` was called.
  __device__ void finish(const GateSpace& space, int64_t tile, int ranks) {
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
      space.valid_tokens[tile] = ranks > 0 ? counted / ranks : counts_[layout_.experts];
    }
    __syncthreads();  // the next tile starts with zeros
  }

 private:
  // Number of tokens whose gates are summed in Scalar before the sum is added in double: that costs at most a few roundings,
  // and saves conversions.
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
template <class Scalar>
class TileSums<WarpLayout<Scalar, int(kWarp), 0, 1>> {
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

  __device__ __forceinline__ void add_gates(const Values<Scalar, 0>& p, Scalar share) {
    for (int i = 0; i < layout_.count; ++i) {
      if (layout_.valid(i)) importance_[layout_.index(i)] += p[i] * share;
    }
  }
  __device__ __forceinline__ void next_token() {}
  __device__ __forceinline__ void add_logsumexp(double value) { z_loss_ += value * value; }
  __device__ __forceinline__ void count(int expert) {
    atomicAdd(&counts_[expert], 1);
    counted_ += 1;
  }
  __device__ __forceinline__ void count_valid() { valid_ += 1; }

  __device__ void finish(const GateSpace& space, int64_t tile, int ranks) {
    const int counted = warp_add(counted_), valid = warp_add(valid_);
    z_loss_ = warp_sum(z_loss_);
    if (lane_id() != 0) return;
    space.z_loss[tile] = z_loss_;
    space.counted[tile] = counted;
    space.valid_tokens[tile] = ranks > 0 ? counted / ranks : valid;
  }

 private:
  const RowLayout& layout_;
  double* importance_ = nullptr;
  int32_t* counts_ = nullptr;
  double z_loss_ = 0;
  int32_t valid_ = 0, counted_ = 0;  // of this thread
};

// The losses from the sums of all tiles. Each block adds up the tiles of a group for a few experts, which its warps share, and
// goes on to others; the block that ends last adds up what they found.
struct LossSums {
  static constexpr int kExperts = 8;                    // of a chunk
  static constexpr int kRows = int(kWarp) / kExperts;   // tiles that a warp reads at once

  static __host__ __device__ int64_t chunks(const Gate& a) { return (a.experts + kExperts - 1) / kExperts; }
  static size_t shared_bytes(unsigned block) {
    const unsigned warps = block / kWarp;
    return warps * ((kExperts + 3) * sizeof(double) + kExperts * sizeof(int32_t)) + sizeof(unsigned);
  }
};

// Writes importance, counts and both losses. All blocks of a cooperative launch call it, when all tiles are done.
template <class Weight>
__device__ void finish_losses(const GateTask& task, double* shared) {
  constexpr int kExperts = LossSums::kExperts;
  const Gate& a = task.gate;
  const GateSpace& space = task.space;
  const unsigned warps = blockDim.x / kWarp;
  double* const importances = shared;                                    // (warps, experts of a chunk)
  double* const z_losses = importances + warps * kExperts;               // (warps)
  double* const valids = z_losses + warps;                               // (warps)
  double* const counteds = valids + warps;                               // (warps)
  int32_t* const counts = reinterpret_cast<int32_t*>(counteds + warps);  // (warps, experts of a chunk)
  unsigned* const number = reinterpret_cast<unsigned*>(counts + warps * kExperts);

  const int64_t chunks = LossSums::chunks(a), all = a.groups * chunks;
  for (int64_t chunk = blockIdx.x; chunk < all; chunk += gridDim.x) {
    const int64_t group = chunk / chunks, expert = chunk % chunks * kExperts + lane_id() % kExperts;
    const int64_t first = group * task.plan.per_group, last = first + task.plan.per_group;
    double importance = 0, z_loss = 0;
    int32_t count = 0, valid = 0, counted = 0;
    for (int64_t tile = first + threadIdx.x / kExperts; tile < last && expert < a.experts; tile += blockDim.x / kExperts) {
      importance += space.importance[tile * a.experts + expert];
      count += space.counts[tile * a.experts + expert];
    }
    for (int64_t tile = first + threadIdx.x; tile < last; tile += blockDim.x) {
      z_loss += space.z_loss[tile];
      valid += space.valid_tokens[tile];
      counted += space.counted[tile];
    }
    TOPN_UNROLL
    for (int by = kExperts; by < int(kWarp); by *= 2) {
      importance += shuffle_xor(importance, by);
      count += shuffle_xor(count, by);
    }
    z_loss = warp_sum(z_loss);
    valid = warp_add(valid);
    counted = warp_add(counted);
    if (lane_id() < kExperts) {
      importances[warp_id() * kExperts + lane_id()] = importance;
      counts[warp_id() * kExperts + lane_id()] = count;
    }
    if (lane_id() == 0) z_losses[warp_id()] = z_loss, valids[warp_id()] = valid, counteds[warp_id()] = counted;
    __syncthreads();
    if (warp_id() == 0) {
      const double valid_tokens = sum_warps(valids);
      const GroupShares shares(valid_tokens, sum_warps(counteds));
      const bool mine = lane_id() < kExperts && expert < a.experts;
      importance = mine ? sum_warps(importances + lane_id(), kExperts) : 0;
      count = mine ? sum_warps(counts + lane_id(), kExperts) : 0;
      if (mine) {
        static_cast<Weight*>(a.importance)[group * a.experts + expert] = Weight(importance * shares.of_tokens);
        a.counts[group * a.experts + expert] = count;
      }
      const double balance = warp_sum(balance_term(importance, count, shares));
      if (lane_id() == 0) {
        space.balance[chunk] = balance;
        if (chunk % chunks == 0) space.group_z_loss[group] = sum_warps(z_losses), space.group_valid[group] = valid_tokens;
      }
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) *number = next_ticket(space.ticket);
  __syncthreads();
  if (*number + 1 != gridDim.x) return;

  double balance = 0, all_z_loss = 0, all_valid = 0;
  for (int64_t i = threadIdx.x; i < all; i += blockDim.x) balance += space.balance[i];
  for (int64_t g = threadIdx.x; g < a.groups; g += blockDim.x) {
    all_z_loss += space.group_z_loss[g];
    all_valid += space.group_valid[g];
  }
  balance = warp_sum(balance);
  all_z_loss = warp_sum(all_z_loss);
  all_valid = warp_sum(all_valid);
  if (lane_id() == 0) importances[warp_id()] = balance, z_losses[warp_id()] = all_z_loss, valids[warp_id()] = all_valid;
  __syncthreads();
  if (threadIdx.x != 0) return;
  *static_cast<Weight*>(a.balance_loss) = Weight(balance_loss(sum_warps(importances), a.experts, a.groups));
  *static_cast<Weight*>(a.router_z_loss) = Weight(router_z_loss(sum_warps(z_losses), sum_warps(valids)));
}

}  // namespace topn_gating::cuda
