// Kernels on which the emulator is tested, and their launches. A comment "// fault NAME" marks a line that the report of that
// fault must name.
#include "kernels.h"

#include <cmath>

namespace {

constexpr unsigned kAll = 0xffffffffu;

// Returns a launch's outcome: whether `got` is near `expected`, and the bits of `got`.
template <class T>
Outcome judge(cudaError_t error, const std::vector<T>& got, const std::vector<T>& expected) {
  std::vector<unsigned> bits(got.size() * sizeof(T) / sizeof(unsigned));
  __builtin_memcpy(bits.data(), got.data(), bits.size() * sizeof(unsigned));
  bool right = got.size() == expected.size();
  for (size_t i = 0; right && i < got.size(); ++i) right = std::abs(got[i] - expected[i]) <= T(1e-6);
  return {error, right, bits};
}

struct SoftmaxArgs {
  const float* x;
  float* y;
  int rows;
};

__device__ __forceinline__ float warp_max(float v) {
  for (int step = 16; step > 0; step /= 2) v = max(v, __shfl_xor_sync(kAll, v, step));
  return v;
}

__device__ __forceinline__ float warp_sum(float v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(kAll, v, step);
  return v;
}

__global__ __launch_bounds__(1024) void softmax_kernel(SoftmaxArgs a) {
  const unsigned row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const bool in_range = row < unsigned(a.rows);
  const unsigned at = row * 32 + threadIdx.x % 32;
  const float x = in_range ? a.x[at] : 0.0f;
  const float e = std::exp(x - warp_max(x));
  const float y = e / warp_sum(e);
  if (in_range) a.y[at] = y;
}

struct ScanArgs {
  const int* x;
  int* y;
  int tiles;
  Fault fault;
};

__global__ void scan_kernel(ScanArgs a) {
  SIMT_DYN_SMEM(int, totals);
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int carry = 0;
  for (int tile = 0; tile < a.tiles; ++tile) {
    const unsigned at = (blockIdx.x * unsigned(a.tiles) + unsigned(tile)) * blockDim.x + threadIdx.x;
    int sum = a.x[at];
    for (unsigned step = 1; step < 32; step *= 2) {
      const int below = __shfl_up_sync(kAll, sum, step);
      sum += lane >= step ? below : 0;
    }
    if (lane == 31) totals[warp] = sum;  // fault NoFirstBarrier, NoSecondBarrier
    if (a.fault != Fault::NoFirstBarrier) __syncthreads();
    int before = 0, all = 0;
    for (unsigned w = 0; w < warps; ++w) {
      const int total = totals[w];  // fault NoFirstBarrier, NoSecondBarrier
      before += w < warp ? total : 0;
      all += total;
    }
    a.y[at] = carry + before + sum;
    carry += all;
    if (a.fault != Fault::NoSecondBarrier) __syncthreads();
  }
}

struct ReverseArgs {
  const int* x;
  int* y;
  Fault fault;
};

__global__ void reverse_kernel(ReverseArgs a) {
  SIMT_DYN_SMEM(int, values);
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
  const unsigned mine = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  int v = a.x[at];
  for (int round = 0; round < 3; ++round) {
    values[threadIdx.x] = v;  // fault NoSyncWarp, ShuffleForSyncWarp, HalfMasks
    switch (a.fault) {
      case Fault::NoSyncWarp: break;
      case Fault::ShuffleForSyncWarp: __shfl_sync(kAll, v, 0); break;
      case Fault::HalfMasks: __syncwarp(mine); break;
      default: __syncwarp();
    }
    v = values[threadIdx.x ^ 31];  // fault NoSyncWarp, ShuffleForSyncWarp, HalfMasks
    __syncwarp();
    values[threadIdx.x] = v;
    __syncwarp(mine);
    v += values[threadIdx.x ^ 15];
    __syncwarp(mine);
  }
  a.y[at] = v;
}

struct BlockSumsArgs {
  const int* x;
  int* y;
  int* block_sums;  // (blocks)
  unsigned* done;  // number of blocks that have stored their sums
  Fault fault;
};

// Returns the sum of the block's values, the same in every thread.
__device__ int block_sum(int* shared, int v) {
  shared[threadIdx.x] = v;
  __syncthreads();
  int sum = 0;
  for (unsigned i = threadIdx.x % 32; i < blockDim.x; i += 32) sum += shared[i];
  return __reduce_add_sync(kAll, sum);
}

__global__ void prefix_kernel(BlockSumsArgs a) {
  SIMT_DYN_SMEM(int, shared);
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  const int sum = block_sum(shared, a.x[at]);
  if (threadIdx.x == 0) a.block_sums[blockIdx.x] = sum;  // fault NoGridSync
  if (a.fault != Fault::NoGridSync) simt_grid_sync();
  int before = 0;
  for (unsigned b = 0; b < blockIdx.x; ++b) before += a.block_sums[b];  // fault NoGridSync
  a.y[at] = before + a.x[at];
}

__global__ void cluster_kernel(BlockSumsArgs a) {
  SIMT_DYN_SMEM(int, shared);
  constexpr unsigned blocks = 4;  // of a cluster
  simt_wait_for_stream();
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  const int sum = block_sum(shared, a.x[at]);
  if (threadIdx.x == 0) shared[blockDim.x] = sum;  // fault NoClusterSync
  if (a.fault != Fault::NoClusterSync) simt_cluster_sync();
  int before = 0;
  for (unsigned b = 0; b < blockIdx.x % blocks; ++b) {
    before += *static_cast<int*>(simt::shared_of(&shared[blockDim.x], b));  // fault NoClusterSync, EarlyExit
  }
  a.y[at] = before + a.x[at];
  if (a.fault != Fault::EarlyExit) simt_cluster_sync();
}

__global__ void last_kernel(BlockSumsArgs a) {
  SIMT_DYN_SMEM(int, shared);
  const int sum = block_sum(shared, a.x[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x == 0) a.block_sums[blockIdx.x] = sum;  // fault PlainTicket
  unsigned before = 0;
  if (threadIdx.x == 0) before = a.fault == Fault::PlainTicket ? atomicAdd(a.done, 1u) : simt_ticket(a.done);
  if (__syncthreads_or(int(threadIdx.x == 0 && before == gridDim.x - 1)) == 0) return;
  int total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) total += a.block_sums[b];  // fault PlainTicket
  a.y[threadIdx.x] = total;
}

struct HistogramArgs {
  const unsigned* x;
  unsigned* counts;  // (17): the values of each of 16 bins, and all values
  Fault fault;
};

__global__ void histogram_kernel(HistogramArgs a) {
  SIMT_DYN_SMEM(unsigned, counts);
  if (threadIdx.x < 16) counts[threadIdx.x] = 0;
  __syncthreads();
  const unsigned bin = a.x[blockIdx.x * blockDim.x + threadIdx.x] % 16;
  if (a.fault == Fault::SharedAdd) {
    counts[bin] += 1;  // fault SharedAdd
  } else {
    atomicAdd(&counts[bin], 1u);
  }
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(&a.counts[threadIdx.x], counts[threadIdx.x]);
  if (threadIdx.x != 0) return;
  if (a.fault == Fault::BlocksAdd) {
    a.counts[16] += blockDim.x;  // fault BlocksAdd
  } else {
    atomicAdd(&a.counts[16], blockDim.x);
  }
}

struct MemoryArgs {
  const float* x;
  float* y;
  int shift;
  Fault fault;
};

__global__ void memory_kernel(MemoryArgs a) {
  SIMT_DYN_SMEM(float, shared);
  const unsigned at = threadIdx.x;
  const float* from = a.x + at * 4 + (a.fault == Fault::Misaligned ? 1 : 0);
  const float4 v = *reinterpret_cast<const float4*>(from);  // fault Misaligned
  shared[at + (a.fault == Fault::SharedOverrun ? 1 : 0)] = v.x + v.y + v.z + v.w;  // fault SharedOverrun
  const int one = 1 << (a.fault == Fault::ShiftTooLarge ? a.shift : 0);  // fault ShiftTooLarge
  __syncthreads();
  a.y[at] = shared[at] * float(one);
}

template <class T>
std::vector<T> numbers(size_t count) {
  std::vector<T> x(count);
  unsigned state = 1;
  for (T& v : x) v = T((state = state * 1664525u + 1013904223u) >> 24) / T(16);
  return x;
}

}  // namespace

Outcome softmax(Fault) {
  constexpr int rows = 7;
  const std::vector<float> x = numbers<float>(rows * 32);
  std::vector<float> y(x.size()), expected(x.size());
  for (int r = 0; r < rows; ++r) {
    double sum = 0, most = 0;
    for (int i = 0; i < 32; ++i) most = std::fmax(most, x[r * 32 + i]);
    for (int i = 0; i < 32; ++i) sum += std::exp(x[r * 32 + i] - most);
    for (int i = 0; i < 32; ++i) expected[r * 32 + i] = float(std::exp(x[r * 32 + i] - most) / sum);
  }
  const SoftmaxArgs args{x.data(), y.data(), rows};
  return judge(SIMT_LAUNCH(softmax_kernel, 2, 128, 0, nullptr, args), y, expected);
}

Outcome block_scan(Fault fault) {
  constexpr int blocks = 3, tiles = 4, block = 96;
  const std::vector<int> x = numbers<int>(blocks * tiles * block);
  std::vector<int> y(x.size()), expected(x);
  for (size_t i = 0; i < x.size(); ++i) expected[i] += i % (tiles * block) == 0 ? 0 : expected[i - 1];
  const ScanArgs args{x.data(), y.data(), tiles, fault};
  return judge(SIMT_LAUNCH(scan_kernel, blocks, block, block / 32 * sizeof(int), nullptr, args), y, expected);
}

Outcome warp_reverse(Fault fault) {
  constexpr int blocks = 2, block = 64;
  const std::vector<int> x = numbers<int>(blocks * block);
  std::vector<int> y(x.size()), expected(x);
  for (int round = 0; round < 3; ++round) {
    std::vector<int> reversed(expected);
    for (size_t i = 0; i < x.size(); ++i) reversed[i] = expected[i ^ 31];
    for (size_t i = 0; i < x.size(); ++i) expected[i] = reversed[i] + reversed[i ^ 15];
  }
  const ReverseArgs args{x.data(), y.data(), fault};
  return judge(SIMT_LAUNCH(reverse_kernel, blocks, block, block * sizeof(int), nullptr, args), y, expected);
}

Outcome grid_prefix(Fault fault) {
  constexpr int blocks = 3, block = 64;
  const std::vector<int> x = numbers<int>(blocks * block);
  std::vector<int> y(x.size()), block_sums(blocks, -1), expected(x);
  for (int b = 1; b < blocks; ++b) {
    for (int i = 0; i < block; ++i) {
      for (int j = 0; j < b * block; ++j) expected[b * block + i] += x[j];
    }
  }
  const BlockSumsArgs args{x.data(), y.data(), block_sums.data(), nullptr, fault};
  return judge(SIMT_LAUNCH_COOPERATIVE(prefix_kernel, blocks, block, block * sizeof(int), nullptr, args), y, expected);
}

Outcome cluster_sums(Fault fault) {
  constexpr int blocks = 8, cluster = 4, block = 64;
  const std::vector<int> x = numbers<int>(blocks * block);
  std::vector<int> y(x.size()), expected(x);
  for (int b = 0; b < blocks; ++b) {
    for (int i = 0; i < block; ++i) {
      for (int j = b / cluster * cluster * block; j < b * block; ++j) expected[b * block + i] += x[j];
    }
  }
  const BlockSumsArgs args{x.data(), y.data(), nullptr, nullptr, fault};
  const size_t shared = (block + 1) * sizeof(int);
  return judge(SIMT_LAUNCH_CLUSTERS(cluster_kernel, blocks, cluster, block, shared, nullptr, args), y, expected);
}

Outcome last_block(Fault fault) {
  constexpr int blocks = 5, block = 64;
  const std::vector<int> x = numbers<int>(blocks * block);
  int sum = 0;
  for (int v : x) sum += v;
  std::vector<int> y(block), block_sums(blocks, -1), expected(block, sum);
  unsigned done = 0;
  const BlockSumsArgs args{x.data(), y.data(), block_sums.data(), &done, fault};
  return judge(SIMT_LAUNCH(last_kernel, blocks, block, block * sizeof(int), nullptr, args), y, expected);
}

Outcome histogram(Fault fault) {
  constexpr int blocks = 4, block = 64;
  const std::vector<unsigned> x = numbers<unsigned>(blocks * block);
  std::vector<unsigned> counts(17);
  std::vector<int> expected(17);
  for (unsigned v : x) expected[v % 16] += 1;
  expected[16] = int(x.size());
  const HistogramArgs args{x.data(), counts.data(), fault};
  const cudaError_t error = SIMT_LAUNCH(histogram_kernel, blocks, block, 16 * sizeof(unsigned), nullptr, args);
  return judge(error, std::vector<int>(counts.begin(), counts.end()), expected);
}

Outcome memory(Fault fault) {
  constexpr int block = 64;
  const std::vector<float> x = numbers<float>(block * 4 + 4);
  std::vector<float> y(block), expected(block);
  for (int i = 0; i < block; ++i) expected[i] = x[i * 4] + x[i * 4 + 1] + x[i * 4 + 2] + x[i * 4 + 3];
  const MemoryArgs args{x.data(), y.data(), 32, fault};
  return judge(SIMT_LAUNCH(memory_kernel, 1, block, block * sizeof(float), nullptr, args), y, expected);
}
