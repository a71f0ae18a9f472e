// docs/spec.md, step 9, on a GPU: two large tensors of zeros with at most k entries for each token. Each element is written
// once, 16 bytes at a time.
//
// A warp writes a chunk of 512 bytes of each output at once, and the warps of a block neighbouring chunks. The lanes hold the
// entries of 32 pairs; those inside the chunk are broadcast from lane to lane.
#include "cuda/kernels.h"
#include "cuda/rows.cuh"

namespace topn_gating::cuda {
namespace {

struct DenseTask {
  Dense dense;
  bool nontemporal;  // whether the outputs bypass the second-level cache
};

constexpr int64_t kChunksPerWarp = 32;

// Outputs of at least so many bytes are written with non-temporal stores; smaller ones stay in the cache for the next kernel.
constexpr int64_t kNontemporalBytes = int64_t(32) << 20;

// The position and the value of a pair's entry.
template <class Weight>
struct Entry {
  int64_t at = -1;  // index in the outputs; -1: none
  Weight weight = 0;

  __device__ __forceinline__ void find(const Dense& a, int64_t pair) {
    const Assignment& s = a.assignment;
    at = -1;
    if (pair >= s.groups * s.tokens * s.top_n) return;
    const int64_t held = held_row(s, pair);
    if (held < 0) return;
    const int64_t token = quotient(pair, s.top_n), group = quotient(token, s.tokens);
    at = (token - group) * s.experts * s.capacity + held;
    weight = static_cast<const Weight*>(a.weight)[pair];
  }
};

// Returns the token of an element that is not before the row of `token`: in most cases it or the next, without a division.
__device__ __forceinline__ int64_t token_of(int64_t element, int64_t token, int64_t row) {
  const int64_t next = (token + 1) * row;
  return element < next ? token : element < next + row ? token + 1 : quotient(element, row);
}

template <class T, int Count>
__device__ __forceinline__ void store_part(T* out, const Pack<T, Count>& pack, int64_t at, int64_t size, bool nontemporal) {
  if (at + Count > size) {  // the last part may be smaller
    TOPN_UNROLL
    for (int j = 0; j < Count; ++j) {
      if (at + j < size) out[at + j] = pack.v[j];
    }
    return;
  }
  if constexpr (sizeof pack == 16) {
    if (nontemporal) {
      uint4 bits;
      memcpy(&bits, &pack, sizeof bits);
      store_streaming(reinterpret_cast<uint4*>(out + at), bits);
      return;
    }
  }
  store_pack(out + at, pack);
}

// Four blocks a multiprocessor: without the number the compiler spills registers on sm_100 to hold more.
template <class T, int Count>
__global__ void __launch_bounds__(SIMT_BLOCK_THREADS, 4) dense_chunks(DenseTask task) {
  const Dense& a = task.dense;
  using Weight = ComputeType<T>;
  constexpr int64_t chunk = int64_t(kWarp) * Count;
  const Assignment& s = a.assignment;
  const int64_t row = s.experts * s.capacity, size = s.groups * s.tokens * row;
  const int64_t step = int64_t(blockDim.x / kWarp) * chunk, run = kChunksPerWarp * step;  // elements of a block
  const T one = from_compute<T>(Weight(1));
  wait_for_stream();
  let_next_start();

  int64_t found = -1;  // the 32 pairs whose entries the lanes hold
  Entry<Weight> entry;
  for (int64_t start = blockIdx.x * run; start < size; start += gridDim.x * run) {
    const int64_t end = start + run < size ? start + run : size;
    int64_t first = start + warp_id() * chunk;
    int64_t token = quotient(first, row);  // the token of element `first`
    for (; first < end; first += step) {
      token = token_of(first, token, row);
      const int64_t last = first + chunk < size ? first + chunk - 1 : size - 1;
      const int64_t last_pair = (token_of(last, token, row) + 1) * s.top_n - 1;
      const int64_t own = first + int64_t(lane_id()) * Count;
      Pack<T, Count> dispatch{}, combine{};
      for (int64_t pairs = (token * s.top_n) / kWarp; pairs <= last_pair / kWarp; ++pairs) {
        if (found != pairs) entry.find(a, pairs * kWarp + lane_id());
        found = pairs;
        for (unsigned left = ballot(entry.at >= first && entry.at <= last); left != 0; left &= left - 1) {
          const int lane = __ffs(int(left)) - 1;
          const int64_t place = shuffle(entry.at, lane) - own;
          const T value = from_compute<T>(shuffle(entry.weight, lane));
          TOPN_UNROLL
          for (int j = 0; j < Count; ++j) {
            if (place == j) dispatch.v[j] = one, combine.v[j] = value;
          }
        }
      }
      store_part(static_cast<T*>(a.dispatch), dispatch, own, size, task.nontemporal);
      store_part(static_cast<T*>(a.combine), combine, own, size, task.nontemporal);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(SIMT_BLOCK_THREADS) dense_backward_pairs(DenseBackward a) {
  using Weight = ComputeType<T>;
  const Assignment& s = a.assignment;
  const int64_t pairs = s.groups * s.tokens * s.top_n, step = int64_t(gridDim.x) * blockDim.x;
  wait_for_stream();
  let_next_start();
  for (int64_t pair = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; pair < pairs; pair += step) {
    const int64_t token = quotient(pair, s.top_n), group = quotient(token, s.tokens), n = token - group * s.tokens;
    const int64_t e = s.expert[pair], c = s.slot[pair];
    Weight grad = 0;
    if (held_row(s, pair) >= 0) {
      const auto at = [&](const void* tensor, const int64_t* strides) {
        return to_compute(static_cast<const T*>(tensor)[group * strides[0] + n * strides[1] + e * strides[2] + c * strides[3]]);
      };
      if (a.grad_combine != nullptr) grad += at(a.grad_combine, a.combine_strides);
      if (a.grad_dispatch != nullptr) grad += at(a.grad_dispatch, a.dispatch_strides);
    }
    static_cast<Weight*>(a.grad_weight)[pair] = grad;
  }
}

}  // namespace

cudaError_t run(const Dense& a, cudaStream_t stream) {
  const Assignment& s = a.assignment;
  const int64_t size = s.groups * s.tokens * s.experts * s.capacity;
  if (size == 0) return cudaSuccess;
  return with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const bool aligned16 = is_aligned16(0, a.dispatch, a.combine);
    const int64_t warp = kChunksPerWarp * kWarp * (aligned16 ? kPackSize<T> : 1);
    const unsigned grid = grid_of(ceil_div(size, warp * SIMT_BLOCK_THREADS / kWarp));
    const DenseTask task{a, 2 * size * int64_t(sizeof(T)) >= kNontemporalBytes};
    const auto kernel = aligned16 ? dense_chunks<T, kPackSize<T>> : dense_chunks<T, 1>;
    return SIMT_LAUNCH_DEPENDENT(kernel, grid, SIMT_BLOCK_THREADS, 0, stream, task);
  });
}

cudaError_t run(const DenseBackward& a, cudaStream_t stream) {
  const int64_t pairs = a.assignment.groups * a.assignment.tokens * a.assignment.top_n;
  if (pairs == 0) return cudaSuccess;
  return with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const auto kernel = dense_backward_pairs<T>;
    const unsigned grid = grid_of(ceil_div<int64_t>(pairs, SIMT_BLOCK_THREADS));
    return SIMT_LAUNCH_DEPENDENT(kernel, grid, SIMT_BLOCK_THREADS, 0, stream, a);
  });
}

}  // namespace topn_gating::cuda
