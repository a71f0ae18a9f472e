// Measures the limits of a GPU, with which the kernels' times are compared: the time of an empty node of a CUDA graph and of a
// barrier of all blocks, the bandwidth of memset and of a copy, and the clock of its multiprocessors under load.
//
//   nvcc -O2 -std=c++17 -arch=native benchmarks/card.cu -o card && ./card
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

namespace {

void check(cudaError_t error, int line) {
  if (error == cudaSuccess) return;
  std::printf("line %d: %s\n", line, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) check((call), __LINE__)

__global__ void empty() {}

__global__ void barriers(int count) {
  for (int i = 0; i < count; ++i) cooperative_groups::this_grid().sync();
}

// Keeps every multiprocessor busy for `cycles` of its clock and stores the nanoseconds that they took.
__global__ void spin(long long cycles, unsigned long long* nanoseconds, float* sink) {
  unsigned long long start, end;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
  const long long first = clock64();
  float x = float(threadIdx.x);
  while (clock64() - first < cycles) {
    for (int i = 0; i < 64; ++i) x = x * 1.0000001f + 1e-6f;
  }
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(end));
  if (x < 0) *sink = x;
  if (blockIdx.x == 0 && threadIdx.x == 0) *nanoseconds = end - start;
}

// Returns the milliseconds of the fastest replay of a graph of `count` calls.
template <class F>
double replay_milliseconds(int count, const F& call) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t instance;
  cudaEvent_t start, end;
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < count; ++i) call(stream);
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiateWithFlags(&instance, graph, 0));
  float best = 1e9f;
  for (int round = 0; round < 20; ++round) {
    float milliseconds = 0;
    CHECK(cudaEventRecord(start, stream));
    CHECK(cudaGraphLaunch(instance, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaEventElapsedTime(&milliseconds, start, end));
    if (milliseconds < best) best = milliseconds;
  }
  return best;
}

}  // namespace

int main() {
  cudaDeviceProp card;
  CHECK(cudaGetDeviceProperties(&card, 0));
  std::printf("%s, %d multiprocessors, L2 cache %d MiB\n", card.name, card.multiProcessorCount, card.l2CacheSize >> 20);

  const auto nodes = [](cudaStream_t stream) { empty<<<1, 32, 0, stream>>>(); };
  CHECK((empty<<<1, 32>>>(), cudaDeviceSynchronize()));  // loads the kernel, which a capture does not allow
  std::printf("empty node of a graph: %.2f us\n", 1e3 * (replay_milliseconds(1001, nodes) - replay_milliseconds(1, nodes)) / 1000);

  for (const int blocks_per_processor : {1, 2}) {
    const auto run = [&](int count) {
      cudaEvent_t start, end;
      float best = 1e9f;
      CHECK(cudaEventCreate(&start));
      CHECK(cudaEventCreate(&end));
      for (int round = 0; round < 5; ++round) {
        void* arguments[] = {&count};
        float milliseconds = 0;
        CHECK(cudaEventRecord(start));
        CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(barriers), card.multiProcessorCount * blocks_per_processor, 256,
                                          arguments, 0, nullptr));
        CHECK(cudaEventRecord(end));
        CHECK(cudaEventSynchronize(end));
        CHECK(cudaEventElapsedTime(&milliseconds, start, end));
        if (milliseconds < best) best = milliseconds;
      }
      return best;
    };
    std::printf("barrier of %d blocks a multiprocessor: %.2f us\n", blocks_per_processor, 1e3 * (run(1001) - run(1)) / 1000);
  }

  constexpr size_t kBytes = size_t(1) << 31;
  void *from, *to;
  CHECK(cudaMalloc(&from, kBytes));
  CHECK(cudaMalloc(&to, kBytes));
  const double set = replay_milliseconds(4, [&](cudaStream_t s) { CHECK(cudaMemsetAsync(to, 1, kBytes, s)); }) / 4;
  const double copy = replay_milliseconds(
      4, [&](cudaStream_t s) { CHECK(cudaMemcpyAsync(to, from, kBytes, cudaMemcpyDeviceToDevice, s)); }) / 4;
  std::printf("memset: %.0f GB/s written\n", 1e-6 * kBytes / set);
  std::printf("copy: %.0f GB/s read and written\n", 2e-6 * kBytes / copy);

  unsigned long long nanoseconds = 0;
  constexpr long long kCycles = 200'000'000;
  spin<<<card.multiProcessorCount * 4, 512>>>(kCycles, static_cast<unsigned long long*>(from), static_cast<float*>(to));
  CHECK(cudaMemcpy(&nanoseconds, from, sizeof nanoseconds, cudaMemcpyDeviceToHost));
  std::printf("clock under load: %.0f MHz\n", 1e3 * double(kCycles) / double(nanoseconds));
  return 0;
}
