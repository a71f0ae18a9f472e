// Kernels that compare warp operations with their definitions, and kernels with wrong uses of warp operations and barriers,
// which the scheduler must report. A comment "// fault NAME" marks a line that the report of that fault must name.
#include <climits>

#include "kernels.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

struct MisuseArgs {
  int* y;
  Fault fault;
};

__device__ int any(int v SIMT_CALLER) { return __any_sync(kAll, v SIMT_PASS); }

// Uses a warp operation wrongly: in most cases half of the lanes do something else than the others.
__device__ int misuse_warp(Fault fault, unsigned lane, int v) {
  const bool half = lane < 16;
  switch (fault) {
    case Fault::DivergentShuffle:
      if (half) v = __shfl_xor_sync(kAll, v, 1);  // fault DivergentShuffle
      return __shfl_xor_sync(kAll, v, 2);  // fault DivergentShuffle
    case Fault::OutsideMask:
      return half ? __shfl_sync(0xffffu, v, 20) : v;  // fault OutsideMask
    case Fault::NotInOwnMask:
      return __shfl_sync(0xffffu, v, 3);  // fault NotInOwnMask
    case Fault::OtherOperation:
      return half ? int(__ballot_sync(kAll, v))  // fault OtherOperation
                  : __any_sync(kAll, v);  // fault OtherOperation
    case Fault::OtherCaller:
      return half ? any(v)  // fault OtherCaller
                  : any(-v);  // fault OtherCaller
    case Fault::OtherMask:
      return int(__ballot_sync(half ? kAll : 0xffff8000u, v));  // fault OtherMask
    case Fault::BadWidth:
      return __shfl_sync(kAll, v, 0, 12);  // fault BadWidth
    default: return v;
  }
}

__global__ void misuse_kernel(MisuseArgs a) {
  const unsigned lane = threadIdx.x % 32;
  const Fault fault = blockIdx.x == 1 ? a.fault : Fault::None;
  int v = int(threadIdx.x);
  if (fault == Fault::ExitedLane && lane == 7) return;
  if (fault == Fault::DivergentExit && lane >= 16) return;
  if (fault == Fault::MissedBarrier && lane == 31) return;
  if (fault == Fault::ExitedLane || fault == Fault::MissingLane) __syncwarp();  // fault ExitedLane, MissingLane
  if (fault == Fault::DivergentExit) v = __shfl_down_sync(kAll, v, 1);  // fault DivergentExit
  v = misuse_warp(fault, lane, v);
  if (fault == Fault::ShuffleAgainstBarrier && lane < 16) __syncwarp();  // fault ShuffleAgainstBarrier
  if (fault == Fault::OtherLine && lane < 16) {
    __syncthreads();  // fault OtherLine
  } else {
    __syncthreads();  // fault OtherLine, MissedBarrier, ShuffleAgainstBarrier
  }
  if (fault == Fault::NotCooperative) simt_grid_sync();  // fault NotCooperative
  if (fault == Fault::NoCluster) simt_cluster_sync();  // fault NoCluster
  a.y[blockIdx.x * blockDim.x + threadIdx.x] = v;
}

// Makes some warps of a block wait at the block's barrier and the others at the grid's.
__global__ void deadlock_kernel(MisuseArgs) {
  if (threadIdx.x < 32) {
    __syncthreads();  // fault Deadlock
  } else {
    simt_grid_sync();  // fault Deadlock
  }
}

struct PrimitivesArgs {
  unsigned* wrong;  // number of threads that got a wrong result
};

// Returns the number of wrong results of shuffles.
__device__ unsigned wrong_shuffles(unsigned lane) {
  unsigned wrong = 0;
  const auto value = [](unsigned from) { return 1000 + 3 * int(from); };
  for (int width = 1; width <= 32; width *= 2) {
    const unsigned first = lane / unsigned(width) * unsigned(width), last = first + unsigned(width) - 1;
    for (unsigned arg = 0; arg < 32; ++arg) {
      const unsigned up = lane - arg < first || lane < arg ? lane : lane - arg;
      const unsigned down = lane + arg > last ? lane : lane + arg;
      const unsigned across = (lane ^ arg) > last ? lane : lane ^ arg;
      wrong += __shfl_sync(kAll, value(lane), int(arg), width) != value(first + arg % unsigned(width));
      wrong += __shfl_up_sync(kAll, double(value(lane)), arg, width) != double(value(up));
      wrong += __shfl_down_sync(kAll, (long long)value(lane) << 32, arg, width) != (long long)value(down) << 32;
      wrong += __shfl_xor_sync(kAll, float(value(lane)), int(arg), width) != float(value(across));
    }
  }
  return wrong;
}

// Returns the number of wrong results of votes, reductions and matches.
__device__ unsigned wrong_votes(unsigned lane) {
  unsigned wrong = 0;
  const int v = int(lane) - 5;
  wrong += __ballot_sync(kAll, lane % 3 == 0) != 0x49249249u;
  wrong += __any_sync(kAll, lane == 9) != 1;
  wrong += __any_sync(kAll, 0) != 0;
  wrong += __all_sync(kAll, 1) != 1;
  wrong += __all_sync(kAll, lane != 9) != 0;
  wrong += __reduce_add_sync(kAll, v) != 31 * 16 - 5 * 32;
  wrong += __reduce_min_sync(kAll, v) != -5;
  wrong += __reduce_max_sync(kAll, v) != 26;
  wrong += __reduce_min_sync(kAll, unsigned(v)) != 0;
  wrong += __reduce_max_sync(kAll, unsigned(v)) != UINT_MAX;
  wrong += __reduce_add_sync(kAll, 1u << 31) != 0;
  wrong += __match_any_sync(kAll, int(lane % 8)) != 0x01010101u << lane % 8;
  wrong += __match_any_sync(kAll, (unsigned long long)(lane % 2) << 40) != 0x55555555u << lane % 2;
  // The two halves of the warp call different operations, each with its own mask.
  if (lane < 16) {
    wrong += __ballot_sync(0xffffu, 1) != 0xffffu;
    wrong += __all_sync(0xffffu, lane < 16) != 1;
  } else {
    wrong += __reduce_add_sync(0xffff0000u, 1) != 16;
  }
  return wrong;
}

__global__ void primitives_kernel(PrimitivesArgs a) {
  const unsigned lane = threadIdx.x % 32;
  unsigned wrong = wrong_shuffles(lane) + wrong_votes(lane);
  wrong += __syncthreads_count(threadIdx.x % 2 == 0) != int(blockDim.x / 2);
  wrong += __syncthreads_or(threadIdx.x == 40) != 1;
  wrong += __syncthreads_or(0) != 0;
  atomicAdd(a.wrong, unsigned(wrong != 0));
}

// Reduces over a warp that has fewer than 32 lanes, with a mask of those that exist.
__global__ void short_warp_kernel(PrimitivesArgs a) {
  const unsigned mask = threadIdx.x < 32 ? kAll : 0x3fu;
  const int count = __reduce_add_sync(mask, 1);
  atomicAdd(a.wrong, unsigned(count != (threadIdx.x < 32 ? 32 : 6)));
}

struct SwitchArgs {
  int rounds;
  unsigned* sum;
};

__global__ void switch_kernel(SwitchArgs a) {
  unsigned v = threadIdx.x;
  for (int i = 0; i < a.rounds; ++i) v += __shfl_xor_sync(kAll, v, 1);
  a.sum[threadIdx.x] = v;
}

}  // namespace

Outcome operations(Fault fault) {
  constexpr int blocks = 3;
  const unsigned block = fault == Fault::MissingLane ? 50 : 64;
  std::vector<int> y(blocks * block);
  const MisuseArgs args{y.data(), fault};
  const cudaError_t error = fault == Fault::Deadlock ? SIMT_LAUNCH_COOPERATIVE(deadlock_kernel, 2, block, 0, nullptr, args)
                                                     : SIMT_LAUNCH(misuse_kernel, blocks, block, 0, nullptr, args);
  bool right = true;
  for (size_t i = 0; i < y.size(); ++i) right = right && y[i] == int(i % block);
  return {error, right, std::vector<unsigned>(y.begin(), y.end())};
}

Outcome primitives(Fault) {
  unsigned wrong = 0;
  const PrimitivesArgs args{&wrong};
  cudaError_t error = SIMT_LAUNCH(primitives_kernel, 1, 64, 0, nullptr, args);
  if (error == cudaSuccess) error = SIMT_LAUNCH(short_warp_kernel, 2, 38, 0, nullptr, args);
  return {error, wrong == 0, {wrong}};
}

Outcome many_switches(Fault) {
  constexpr int block = 64;
  std::vector<unsigned> sum(block);
  const SwitchArgs args{kSwitches / block, sum.data()};
  const cudaError_t error = SIMT_LAUNCH(switch_kernel, 1, block, 0, nullptr, args);
  return {error, true, sum};
}
