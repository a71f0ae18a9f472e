// A GPU: the current device of the CUDA runtime.
#include <stdexcept>

#include "cuda/kernels.h"
#include "device.h"

namespace topn_gating::bench {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

class Cuda : public Device {
 public:
  Cuda() {
    check(cudaStreamCreate(&stream_));
    check(cudaEventCreate(&start_));
    check(cudaEventCreate(&end_));
  }
  ~Cuda() override {
    cudaEventDestroy(end_);
    cudaEventDestroy(start_);
    cudaStreamDestroy(stream_);
  }
  const char* name() const override { return "cuda"; }
  std::string description() const override {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, 0));
    return std::string(properties.name) + ", L2 cache " + std::to_string(properties.l2CacheSize >> 20) + " MiB";
  }

  std::shared_ptr<void> memory_of(const Buffer& buffer) override {
    void* memory = nullptr;
    check(cudaMalloc(&memory, size_t(buffer.bytes())));
    std::shared_ptr<void> owned(memory, [](void* p) { cudaFree(p); });
    check(cudaMemcpyAsync(memory, buffer.data(), size_t(buffer.bytes()), cudaMemcpyHostToDevice, stream_));
    wait();
    return owned;
  }
  void read_back(const std::shared_ptr<void>& memory, const Buffer& to) override {
    check(cudaMemcpyAsync(to.data(), memory.get(), size_t(to.bytes()), cudaMemcpyDeviceToHost, stream_));
    wait();
  }

  std::vector<std::function<void()>> copies(void* to, const void* from, int64_t bytes) override {
    return {[=] { check(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDeviceToDevice, stream_)); }};
  }

  // A graph of several calls, between two events: what a launch costs the host is not in the time.
  Stopwatch stopwatch(std::function<void()> call) override {
    constexpr int64_t calls = 20;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t made = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    for (int64_t i = 0; i < calls; ++i) call();
    check(cudaStreamEndCapture(stream_, &graph));
    const cudaError_t error = cudaGraphInstantiateWithFlags(&made, graph, 0);
    cudaGraphDestroy(graph);
    check(error);
    const std::shared_ptr<CUgraphExec_st> replayed(made, cudaGraphExecDestroy);
    return {calls, [this, replayed] {
              check(cudaEventRecord(start_, stream_));
              check(cudaGraphLaunch(replayed.get(), stream_));
              check(cudaEventRecord(end_, stream_));
              check(cudaEventSynchronize(end_));
              float milliseconds = 0;
              check(cudaEventElapsedTime(&milliseconds, start_, end_));
              return 1e-3 * milliseconds;
            }};
  }
  void wait() override { check(cudaStreamSynchronize(stream_)); }

  int64_t workspace_bytes(const Gate& a) const override { return cuda::workspace_bytes(a); }
  int64_t workspace_bytes(const GateBackward& a) const override { return cuda::workspace_bytes(a); }
  int64_t workspace_bytes(const Assign& a) const override { return cuda::workspace_bytes(a); }

  void run(const Gate& a) override { check(cuda::run(a, stream_)); }
  void run(const GateBackward& a) override { check(cuda::run(a, stream_)); }
  void run(const Assign& a) override { check(cuda::run(a, stream_)); }
  void run(const AssignBackward& a) override { check(cuda::run(a, stream_)); }
  void run(const Dense& a) override { check(cuda::run(a, stream_)); }
  void run(const DenseBackward& a) override { check(cuda::run(a, stream_)); }
  void run(const Dispatch& a) override { check(cuda::run(a, stream_)); }
  void run(const DispatchBackward& a) override { check(cuda::run(a, stream_)); }
  void run(const Combine& a) override { check(cuda::run(a, stream_)); }
  void run(const CombineBackward& a) override { check(cuda::run(a, stream_)); }

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t start_ = nullptr, end_ = nullptr;
};

}  // namespace

std::unique_ptr<Device> cuda_device(std::string* why_not) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return std::make_unique<Cuda>();
  *why_not = error == cudaSuccess ? "no device" : cudaGetErrorString(error);
  return nullptr;
}

}  // namespace topn_gating::bench
