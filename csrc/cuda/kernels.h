// The launchers of the CUDA kernels: one overload of `run` for each argument struct of router.h. Each enqueues its kernels on the
// stream and returns the launch's error. None synchronises, allocates device memory or throws.
#pragma once

#include "cuda/runtime.h"
#include "router.h"

namespace topn_gating::cuda {

// Bytes that `workspace` must have on the current device: none, unless a struct has an overload below.
template <class Args>
int64_t workspace_bytes(const Args&) {
  return 0;
}
int64_t workspace_bytes(const Gate&);
int64_t workspace_bytes(const GateBackward&);
int64_t workspace_bytes(const Assign&);

#define TOPN_GATING_RUN(Args, name) cudaError_t run(const Args&, cudaStream_t);
TOPN_GATING_KERNELS(TOPN_GATING_RUN)
#undef TOPN_GATING_RUN

}  // namespace topn_gating::cuda
