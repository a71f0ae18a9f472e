// The operators on CUDA tensors.
#define USE_CUDA  // for torch's headers before 2.13: declare the function that gives the stream
#include <torch/csrc/stable/accelerator.h>

#include "launchers.h"
#include "operators.h"

namespace topn_gating::binding {
namespace {

using torch::stable::accelerator::DeviceGuard;

// torch's current stream of a device. The stable ABI has it from torch 2.13 on; before, libtorch_cuda.
cudaStream_t current_stream(int32_t device) {
#if defined(TORCH_VERSION_2_13_0) && TORCH_FEATURE_VERSION >= TORCH_VERSION_2_13_0
  return static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(device).nativeHandle());
#else
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS, "torch gives no CUDA stream");
  return static_cast<cudaStream_t>(stream);
#endif
}

// Another argument may have brought the call here.
int32_t device_of(const Tensor& t) {
  STD_TORCH_CHECK(t.is_cuda(), "all tensors must be on the same CUDA device, and the first one is on the CPU");
  return t.get_device_index();
}

// While it lives, the tensor's device is the current one.
class Cuda : DeviceGuard, public Launchers {
 public:
  explicit Cuda(const Tensor& t) : DeviceGuard(device_of(t)), Launchers(current_stream(device_of(t))) {}
};

}  // namespace
}  // namespace topn_gating::binding

TOPN_LIBRARY_IMPL(CUDA, m) {
  using namespace topn_gating::binding;
  using Backend = Cuda;
  TOPN_GATING_OPERATORS(TOPN_GATING_IMPLEMENT)
}
