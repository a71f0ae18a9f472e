// SPEC step 10 on a GPU: the sums of tiles become those of groups, and these the two losses. In a fixed order.
#include "cuda/gate_sums.cuh"

namespace topn_gating::cuda {
namespace {

// Adds up the tiles: a block takes 32 experts of a group, a warp of it every so many tiles. The block that is done last adds
// up the blocks.
template <class Real>
__global__ void gate_losses(GateTask task) {
  const Gate& a = task.gate;
  const GateSpace& space = task.space;
  const unsigned warps = blockDim.x / kWarp;
  SIMT_DYN_SMEM(double, shared);
  double* const importances = shared;                                 // (warps, 32)
  double* const z_losses = importances + warps * kWarp;               // (warps)
  double* const reals = z_losses + warps;                             // (warps)
  int32_t* const counts = reinterpret_cast<int32_t*>(reals + warps);  // (warps, 32)
  unsigned* const number = reinterpret_cast<unsigned*>(counts + warps * kWarp);

  const int64_t chunks = parts(a.experts, kExpertsPerBlock), blocks = a.groups * chunks;
  const int64_t group = blockIdx.x / chunks, expert = blockIdx.x % chunks * kExpertsPerBlock + lane_id();
  const int64_t first = group * task.tiles.of_group, last = group < a.groups ? first + task.tiles.of_group : first;
  double importance = 0, z_loss = 0;
  int32_t count = 0, real = 0;
  for (int64_t tile = first + warp_id(); tile < last && expert < a.experts; tile += warps) {
    importance += space.importance[tile * a.experts + expert];
    count += space.top_count[tile * a.experts + expert];
  }
  for (int64_t tile = first + threadIdx.x; tile < last; tile += blockDim.x) {
    z_loss += space.z_loss[tile];
    real += space.real[tile];
  }
  importances[threadIdx.x] = importance;
  counts[threadIdx.x] = count;
  z_loss = warp_sum(z_loss);
  real = warp_add(real);
  if (lane_id() == 0) z_losses[warp_id()] = z_loss, reals[warp_id()] = real;
  __syncthreads();

  if (warp_id() == 0) {
    const double of_group = sum_warps(reals), share = 1.0 / (of_group > 1 ? of_group : 1.0);
    importance = sum_warps(importances + lane_id(), kWarp);
    count = sum_warps(counts + lane_id(), kWarp);
    if (group < a.groups && expert < a.experts) {
      static_cast<Real*>(a.importance)[group * a.experts + expert] = Real(importance * share);
      a.top_count[group * a.experts + expert] = count;
    }
    const double balance = warp_sum(importance * share * (count * share));
    if (lane_id() == 0) {
      if (group < a.groups) space.balance[blockIdx.x] = balance;
      if (group < a.groups && blockIdx.x % chunks == 0) {
        space.group_z_loss[group] = sum_warps(z_losses);
        space.group_real[group] = of_group;
      }
      *number = take_ticket(space.ticket);
    }
  }
  __syncthreads();
  if (*number + 1 != gridDim.x) return;

  double balance = 0, all_z_loss = 0, all_real = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) balance += space.balance[i];
  for (int64_t g = threadIdx.x; g < a.groups; g += blockDim.x) {
    all_z_loss += space.group_z_loss[g];
    all_real += space.group_real[g];
  }
  balance = warp_sum(balance);
  all_z_loss = warp_sum(all_z_loss);
  all_real = warp_sum(all_real);
  if (lane_id() == 0) importances[warp_id()] = balance, z_losses[warp_id()] = all_z_loss, reals[warp_id()] = all_real;
  __syncthreads();
  if (threadIdx.x != 0) return;
  // e² · mean over groups and experts
  const double groups = a.groups > 1 ? double(a.groups) : 1.0, tokens = sum_warps(reals);
  *static_cast<Real*>(a.balance_loss) = Real(sum_warps(importances) * double(a.experts) / groups);
  *static_cast<Real*>(a.router_z_loss) = Real(sum_warps(z_losses) / (tokens > 1 ? tokens : 1.0));
}

}  // namespace

cudaError_t launch_losses(const GateTask& task, cudaStream_t stream) {
  constexpr int64_t most = 4 * SIMT_BLOCK_THREADS / kWarp;
  const Gate& a = task.gate;
  const int64_t blocks = std::max<int64_t>(1, a.groups * parts(a.experts, kExpertsPerBlock));
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const unsigned warps = unsigned(std::clamp(std::max(task.tiles.of_group, parts<int64_t>(blocks, kWarp)), int64_t(1), most));
  const size_t shared = warps * ((kWarp + 2) * sizeof(double) + kWarp * sizeof(int32_t)) + sizeof(unsigned);
  const auto kernel = a.dtype == DType::F64 ? gate_losses<double> : gate_losses<float>;
  return SIMT_LAUNCH(kernel, unsigned(blocks), warps * kWarp, shared, stream, task);
}

}  // namespace topn_gating::cuda
