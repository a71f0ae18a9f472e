// docs/spec.md, step 10, on a GPU: adds the sums of tiles to those of groups, and these to the two losses, in a fixed order.
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
  int32_t* const counts = reinterpret_cast<int32_t*>(valids + warps);  // (warps, 32)
  unsigned* const number = reinterpret_cast<unsigned*>(counts + warps * kWarp);

  const int64_t chunks = ceil_div(a.experts, kExpertsPerBlock), blocks = a.groups * chunks;
  const int64_t group = blockIdx.x / chunks, expert = blockIdx.x % chunks * kExpertsPerBlock + lane_id();
  const int64_t first = group * task.plan.per_group, last = group < a.groups ? first + task.plan.per_group : first;
  double importance = 0, z_loss = 0;
  int32_t count = 0, valid = 0;
  for (int64_t tile = first + warp_id(); tile < last && expert < a.experts; tile += warps) {
    importance += space.importance[tile * a.experts + expert];
    count += space.counts[tile * a.experts + expert];
  }
  for (int64_t tile = first + threadIdx.x; tile < last; tile += blockDim.x) {
    z_loss += space.z_loss[tile];
    valid += space.valid_tokens[tile];
  }
  importances[threadIdx.x] = importance;
  counts[threadIdx.x] = count;
  z_loss = warp_sum(z_loss);
  valid = warp_add(valid);
  if (lane_id() == 0) z_losses[warp_id()] = z_loss, valids[warp_id()] = valid;
  __syncthreads();

  if (warp_id() == 0) {
    const double valid_tokens = sum_warps(valids);
    const GroupShares shares(valid_tokens, valid_tokens);
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

}  // namespace

cudaError_t launch_losses(const GateTask& task, cudaStream_t stream) {
  constexpr int64_t most = 4 * SIMT_BLOCK_THREADS / kWarp;
  const Gate& a = task.gate;
  const int64_t blocks = std::max<int64_t>(1, a.groups * ceil_div(a.experts, kExpertsPerBlock));
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const unsigned warps = unsigned(std::clamp(std::max(task.plan.per_group, ceil_div<int64_t>(blocks, kWarp)), int64_t(1), most));
  const size_t shared = warps * ((kWarp + 2) * sizeof(double) + kWarp * sizeof(int32_t)) + sizeof(unsigned);
  const auto kernel = a.dtype == DType::F64 ? gate_losses<double> : gate_losses<float>;
  return SIMT_LAUNCH(kernel, unsigned(blocks), warps * kWarp, shared, stream, task);
}

}  // namespace topn_gating::cuda
