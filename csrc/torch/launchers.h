// The launchers of the CUDA kernels as a backend's `workspace_bytes` and `run`, on the GPU and where the kernels run on the
// host (simt).
#pragma once

#include "cuda/launch.h"
#include "tensors.h"

namespace topn_gating::binding {

class Launchers {
 public:
  template <class Args>
  int64_t workspace_bytes(const Args& a) const {
    return cuda::workspace_bytes(a);
  }

  void run(const Gate& a) const { launch("gate", cuda::gate, a); }
  void run(const GateBackward& a) const { launch("gate_backward", cuda::gate_backward, a); }
  void run(const Assign& a) const { launch("assign", cuda::assign, a); }
  void run(const AssignBackward& a) const { launch("assign_backward", cuda::assign_backward, a); }
  void run(const Dense& a) const { launch("dense", cuda::dense, a); }
  void run(const DenseBackward& a) const { launch("dense_backward", cuda::dense_backward, a); }
  void run(const Dispatch& a) const { launch("dispatch", cuda::dispatch, a); }
  void run(const DispatchBackward& a) const { launch("dispatch_backward", cuda::dispatch_backward, a); }
  void run(const Combine& a) const { launch("combine", cuda::combine, a); }
  void run(const CombineBackward& a) const { launch("combine_backward", cuda::combine_backward, a); }

 protected:
  explicit Launchers(cudaStream_t stream) : stream_(stream) {}

 private:
  template <class Args>
  void launch(const char* name, cudaError_t (*launcher)(const Args&, cudaStream_t), const Args& a) const {
    const cudaError_t error = launcher(a, stream_);
    STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
  }

  cudaStream_t stream_;
};

}  // namespace topn_gating::binding
