// The doors of the CUDA kernels: each puts its kernels on the stream and returns what the launch said. None waits for the
// device, allocates, or throws.
#pragma once

#include "cuda/runtime.h"
#include "router.h"

namespace topn_gating::cuda {

// Bytes of workspace on the current device.
int64_t workspace_bytes(const Gate&);
int64_t workspace_bytes(const GateBackward&);
int64_t workspace_bytes(const Assign&);

cudaError_t gate(const Gate&, cudaStream_t);
cudaError_t gate_backward(const GateBackward&, cudaStream_t);
cudaError_t assign(const Assign&, cudaStream_t);
cudaError_t assign_backward(const AssignBackward&, cudaStream_t);
cudaError_t dense(const Dense&, cudaStream_t);
cudaError_t dense_backward(const DenseBackward&, cudaStream_t);
cudaError_t dispatch(const Dispatch&, cudaStream_t);
cudaError_t dispatch_backward(const DispatchBackward&, cudaStream_t);
cudaError_t combine(const Combine&, cudaStream_t);
cudaError_t combine_backward(const CombineBackward&, cudaStream_t);

}  // namespace topn_gating::cuda
