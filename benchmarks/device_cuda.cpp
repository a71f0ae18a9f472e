// A GPU: the CUDA runtime's current device.
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

  Memory memory_of(const Buffer& buffer) override {
    void* memory = nullptr;
    check(cudaMalloc(&memory, size_t(buffer.bytes())));
    Memory owned(memory, [](void* p) { cudaFree(p); });
    check(cudaMemcpyAsync(memory, buffer.data(), size_t(buffer.bytes()), cudaMemcpyHostToDevice, stream_));
    wait();
    return owned;
  }
  void read_back(const Memory& memory, const Buffer& to) override {
    check(cudaMemcpyAsync(to.data(), memory.get(), size_t(to.bytes()), cudaMemcpyDeviceToHost, stream_));
    wait();
  }

  std::vector<std::function<void()>> copies(void* to, const void* from, int64_t bytes) override {
    return {[=] { check(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDeviceToDevice, stream_)); }};
  }

  // Times a graph of several calls between two events, which excludes the host's launch overhead.
  Stopwatch stopwatch(std::function<void()> call) override {
    constexpr int64_t calls = 20;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t instance = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    for (int64_t i = 0; i < calls; ++i) call();
    check(cudaStreamEndCapture(stream_, &graph));
    const cudaError_t error = cudaGraphInstantiateWithFlags(&instance, graph, 0);
    cudaGraphDestroy(graph);
    check(error);
    const std::shared_ptr<CUgraphExec_st> replayed(instance, cudaGraphExecDestroy);
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

  int64_t workspace_bytes(const Call& call) const override {
    int64_t bytes = 0;
    visit(call, [&](const auto& args) { bytes = cuda::workspace_bytes(args); });
    return bytes;
  }
  void run(const Call& call) override {
    visit(call, [this](const auto& args) { check(cuda::run(args, stream_)); });
  }

 private:
  template <class F>
  static void visit(const Call& call, const F& function) {
    call.visit([&](const auto& args) {
      if constexpr (!harness::kOnCpuAlone<std::decay_t<decltype(args)>>) function(args);
    });
  }

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
