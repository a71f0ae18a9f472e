// SPEC step 9 on a GPU: two large tensors of zeros with k entries a token, each element written once, 16 bytes at a time.
//
// A warp takes 512 bytes of each output at once. Its lanes hold the entries of 32 pairs; those that fall into the 512 bytes go
// from lane to lane.
#include "cuda/element.cuh"
#include "cuda/kernels.h"

namespace topn_gating::cuda {
namespace {

struct DenseTask {
  Dense dense;
  bool stream;
};

constexpr int64_t kChunksPerWarp = 32;

// Outputs beyond this pass the second-level cache by; smaller ones stay in it for whoever reads them next.
constexpr int64_t kStreamBytes = int64_t(32) << 20;

// The place and the value of a pair's entry.
template <class Real>
struct Entry {
  int64_t at = -1;  // in the output, -1: none
  Real weight = 0;

  __device__ __forceinline__ void find(const Dense& a, int64_t pair) {
    const Assignment& s = a.assignment;
    at = -1;
    if (pair >= s.groups * s.tokens * s.top_n) return;
    const int64_t e = s.expert[pair], c = s.slot[pair];
    if (c < 0 || c >= s.capacity || e < 0 || e >= s.experts) return;
    at = (quotient(pair, s.top_n) * s.experts + e) * s.capacity + c;
    weight = static_cast<const Real*>(a.weight)[pair];
  }
};

template <class T, int Count>
__device__ __forceinline__ void store_part(T* out, const Pack<T, Count>& pack, int64_t at, int64_t size, bool stream) {
  if (at + Count > size) {  // the last, partial part
    TOPN_UNROLL
    for (int j = 0; j < Count; ++j) {
      if (at + j < size) out[at + j] = pack.v[j];
    }
    return;
  }
  if constexpr (sizeof pack == 16) {
    if (stream) {
      uint4 bits;
      memcpy(&bits, &pack, sizeof bits);
      store_streaming(reinterpret_cast<uint4*>(out + at), bits);
      return;
    }
  }
  store_pack(out + at, pack);
}

template <class T, int Count>
__global__ void __launch_bounds__(SIMT_BLOCK_THREADS) dense_chunks(DenseTask task) {
  const Dense& a = task.dense;
  using Real = RealOf<T>;
  constexpr int64_t chunk = int64_t(kWarp) * Count;
  const Assignment& s = a.assignment;
  const int64_t row = s.experts * s.capacity, size = s.groups * s.tokens * row;
  const int64_t warp = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  const int64_t warps = int64_t(gridDim.x) * blockDim.x / kWarp;
  const T one = from_real<T>(Real(1));

  for (int64_t start = warp * kChunksPerWarp * chunk; start < size; start += warps * kChunksPerWarp * chunk) {
    const int64_t end = start + kChunksPerWarp * chunk < size ? start + kChunksPerWarp * chunk : size;
    int64_t token = start / row, found = -1;  // of `start`; the first pair of the entries that the lanes hold
    Entry<Real> entry;
    for (int64_t first = start; first < end; first += chunk) {
      while ((token + 1) * row <= first) ++token;
      const int64_t own = first + int64_t(lane_id()) * Count;
      Pack<T, Count> dispatch{}, combine{};
      // Tokens whose rows share in the chunk, 32 of their pairs at a time.
      for (int64_t t = token, pair = token * s.top_n; t * row < first + chunk && t < s.groups * s.tokens;) {
        if (found != pair) entry.find(a, pair + lane_id());
        found = pair;
        for (unsigned left = ballot(entry.at >= first && entry.at < first + chunk); left != 0; left &= left - 1) {
          const int lane = __ffs(left) - 1;
          const int64_t place = shuffle(entry.at, lane) - own;
          const T value = from_real<T>(shuffle(entry.weight, lane));
          TOPN_UNROLL
          for (int j = 0; j < Count; ++j) {
            if (place == j) dispatch.v[j] = one, combine.v[j] = value;
          }
        }
        pair += kWarp;
        t = quotient(pair, s.top_n);
      }
      store_part(static_cast<T*>(a.dispatch), dispatch, own, size, task.stream);
      store_part(static_cast<T*>(a.combine), combine, own, size, task.stream);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(SIMT_BLOCK_THREADS) dense_backward_pairs(DenseBackward a) {
  using Real = RealOf<T>;
  const Assignment& s = a.assignment;
  const int64_t pairs = s.groups * s.tokens * s.top_n, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t pair = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; pair < pairs; pair += step) {
    const int64_t token = quotient(pair, s.top_n), group = quotient(token, s.tokens), n = token - group * s.tokens;
    const int64_t e = s.expert[pair], c = s.slot[pair];
    Real grad = 0;
    if (c >= 0 && c < s.capacity && e >= 0 && e < s.experts) {
      const auto at = [&](const void* tensor, const int64_t* strides) {
        return to_real(static_cast<const T*>(tensor)[group * strides[0] + n * strides[1] + e * strides[2] + c * strides[3]]);
      };
      if (a.grad_combine != nullptr) grad += at(a.grad_combine, a.combine_strides);
      if (a.grad_dispatch != nullptr) grad += at(a.grad_dispatch, a.dispatch_strides);
    }
    static_cast<Real*>(a.grad_weight)[pair] = grad;
  }
}

}  // namespace

cudaError_t run(const Dense& a, cudaStream_t stream) {
  const Assignment& s = a.assignment;
  const int64_t size = s.groups * s.tokens * s.experts * s.capacity;
  if (size == 0) return cudaSuccess;
  return with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const bool wide = is_wide(0, a.dispatch, a.combine);
    const int64_t warp = kChunksPerWarp * kWarp * (wide ? kWide<T> : 1);
    const unsigned grid = grid_of(parts(size, warp * SIMT_BLOCK_THREADS / kWarp));
    const DenseTask task{a, 2 * size * int64_t(sizeof(T)) >= kStreamBytes};
    const auto kernel = wide ? dense_chunks<T, kWide<T>> : dense_chunks<T, 1>;
    return SIMT_LAUNCH(kernel, grid, SIMT_BLOCK_THREADS, 0, stream, task);
  });
}

cudaError_t run(const DenseBackward& a, cudaStream_t stream) {
  const int64_t pairs = a.assignment.groups * a.assignment.tokens * a.assignment.top_n;
  if (pairs == 0) return cudaSuccess;
  return with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const auto kernel = dense_backward_pairs<T>;
    return SIMT_LAUNCH(kernel, grid_of(parts<int64_t>(pairs, SIMT_BLOCK_THREADS)), SIMT_BLOCK_THREADS, 0, stream, a);
  });
}

}  // namespace topn_gating::cuda
