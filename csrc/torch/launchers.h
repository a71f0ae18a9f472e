// The launchers of the CUDA kernels as a backend's `workspace_bytes` and `run`, on the GPU and where the kernels run on the
// host (simt).
#pragma once

#include "cuda/kernels.h"
#include "tensors.h"

namespace topn_gating::binding {

class Launchers {
 public:
  template <class Args>
  int64_t workspace_bytes(const Args& a) const {
    return cuda::workspace_bytes(a);
  }

  template <class Args>
  void run(const Args& a) const {
    const cudaError_t error = cuda::run(a, stream_);
    STD_TORCH_CHECK(error == cudaSuccess, kernel_name(a), ": ", cudaGetErrorString(error));
  }

 protected:
  explicit Launchers(cudaStream_t stream) : stream_(stream) {}

 private:
  cudaStream_t stream_;
};

}  // namespace topn_gating::binding
