// docs/spec.md, steps 10 and 11, on a GPU: adds the sums of tiles to those of groups, and these to the losses and statistics, in
// a fixed order.
#include "cuda/gate_sums.cuh"

namespace topn_gating::cuda {
namespace {

// Each block adds up the tiles of a group for 32 experts; its warps share the tiles. The block that ends last adds up the blocks.
template <class Weight>
__global__ void gate_losses(GateTask task) {
  const Gate& a = task.gate;
  const GateSpace& space = task.space;
  const unsigned warps = blockDim.x / kWarp;
  SIMT_DYN_SMEM(double, shared);
  double* const importances = shared;                                  // (warps, 32)
  double* const z_losses = importances + warps * kWarp;                // (warps)
  double* const valids = z_losses + warps;                             // (warps)
  double* const counteds = valids + warps;                             // (warps)
  int32_t* const counts = reinterpret_cast<int32_t*>(counteds + warps);  // (warps, 32)
  unsigned* const number = reinterpret_cast<unsigned*>(counts + warps * kWarp);

  const int64_t chunks = ceil_div(a.experts, kExpertsPerBlock), blocks = a.groups * chunks;
  const int64_t group = blockIdx.x / chunks, expert = blockIdx.x % chunks * kExpertsPerBlock + lane_id();
  const int64_t first = group * task.plan.per_group, last = group < a.groups ? first + task.plan.per_group : first;
  double importance = 0, z_loss = 0;
  int32_t count = 0, valid = 0, counted = 0;
  for (int64_t tile = first + warp_id(); tile < last && expert < a.experts; tile += warps) {
    importance += space.importance[tile * a.experts + expert];
    count += space.counts[tile * a.experts + expert];
  }
  for (int64_t tile = first + threadIdx.x; tile < last; tile += blockDim.x) {
    z_loss += space.z_loss[tile];
    valid += space.valid_tokens[tile];
    counted += space.counted[tile];
  }
  importances[threadIdx.x] = importance;
  counts[threadIdx.x] = count;
  z_loss = warp_sum(z_loss);
  valid = warp_add(valid);
  counted = warp_add(counted);
  if (lane_id() == 0) z_losses[warp_id()] = z_loss, valids[warp_id()] = valid, counteds[warp_id()] = counted;
  __syncthreads();

  if (warp_id() == 0) {
    const double valid_tokens = sum_warps(valids);
    const GroupShares shares(valid_tokens, sum_warps(counteds));
    importance = sum_warps(importances + lane_id(), kWarp);
    count = sum_warps(counts + lane_id(), kWarp);
    if (group < a.groups && expert < a.experts) {
      static_cast<Weight*>(a.importance)[group * a.experts + expert] = Weight(importance * shares.of_tokens);
      a.counts[group * a.experts + expert] = count;
    }
    const double balance = warp_sum(balance_term(importance, count, shares));
    if (lane_id() == 0) {
      if (group < a.groups) space.balance[blockIdx.x] = balance;
      if (group < a.groups && blockIdx.x % chunks == 0) {
        space.group_z_loss[group] = sum_warps(z_losses);
        space.group_valid[group] = valid_tokens;
      }
      *number = next_ticket(space.ticket);
    }
  }
  __syncthreads();
  if (*number + 1 != gridDim.x) return;

  double balance = 0, all_z_loss = 0, all_valid = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) balance += space.balance[i];
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

// Runs in a single block.
template <class Weight>
__global__ void gate_statistics(GateTask task) {
  const Gate& a = task.gate;
  const unsigned warps = blockDim.x / kWarp;
  SIMT_DYN_SMEM(double, shared);
  double* const valids = shared;              // (warps)
  double* const entropies = valids + warps;   // (warps)
  double* const squares = entropies + warps;  // (warps)
  double* const largests = squares + warps;   // (warps)
  TokenStatistics sum{};
  const int64_t entries = task.plan.count * (task.plan.block / kWarp);
  for (int64_t i = threadIdx.x; i < entries; i += blockDim.x) {
    const TokenStatistics& of_warp = task.space.statistics[i];
    sum.valid_tokens += of_warp.valid_tokens;
    sum.entropy += of_warp.entropy;
    sum.squares += of_warp.squares;
    sum.largest = of_warp.largest > sum.largest ? of_warp.largest : sum.largest;
  }
  sum.valid_tokens = warp_sum(sum.valid_tokens);
  sum.entropy = warp_sum(sum.entropy);
  sum.squares = warp_sum(sum.squares);
  TOPN_UNROLL
  for (int by = int(kWarp) / 2; by > 0; by /= 2) {
    const double other = shuffle_xor(sum.largest, by);
    sum.largest = other > sum.largest ? other : sum.largest;
  }
  if (lane_id() == 0) {
    valids[warp_id()] = sum.valid_tokens;
    entropies[warp_id()] = sum.entropy;
    squares[warp_id()] = sum.squares;
    largests[warp_id()] = sum.largest;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  double largest = 0;
  for (unsigned w = 0; w < warps; ++w) largest = largests[w] > largest ? largests[w] : largest;
  const double valid = sum_warps(valids), all_squares = sum_warps(squares);
  Weight* const statistics = static_cast<Weight*>(a.statistics);
  statistics[0] = Weight(sum_warps(entropies) / at_least_one(valid));
  statistics[1] = Weight(all_squares == all_squares ? largest : all_squares);  // NaN
  statistics[2] = Weight(logit_rms(all_squares, valid, a.experts));
}

}  // namespace

cudaError_t launch_statistics(const GateTask& task, cudaStream_t stream) {
  const unsigned warps = SIMT_BLOCK_THREADS / kWarp;
  const auto kernel = task.gate.dtype == DType::F64 ? gate_statistics<double> : gate_statistics<float>;
  return SIMT_LAUNCH(kernel, 1u, warps * kWarp, warps * 4 * sizeof(double), stream, task);
}

cudaError_t launch_losses(const GateTask& task, cudaStream_t stream) {
  constexpr int64_t most = 4 * SIMT_BLOCK_THREADS / kWarp;
  const Gate& a = task.gate;
  const int64_t blocks = std::max<int64_t>(1, a.groups * ceil_div(a.experts, kExpertsPerBlock));
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const unsigned warps = unsigned(std::clamp(std::max(task.plan.per_group, ceil_div<int64_t>(blocks, kWarp)), int64_t(1), most));
  const size_t shared = warps * ((kWarp + 3) * sizeof(double) + kWarp * sizeof(int32_t)) + sizeof(unsigned);
  const auto kernel = a.dtype == DType::F64 ? gate_losses<double> : gate_losses<float>;
  return SIMT_LAUNCH(kernel, unsigned(blocks), warps * kWarp, shared, stream, task);
}

}  // namespace topn_gating::cuda
