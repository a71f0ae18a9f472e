// Dependent launches: kernels that may start while the one before them runs, and must wait before they access global memory.
// A comment "// fault NAME" marks a line that the report of that fault must name.
#include "kernels.h"

namespace {

struct ChainArgs {
  int* x;
  int* y;
  Fault fault;
};

// Writes y = 2 x.
__global__ void double_kernel(ChainArgs a) {
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  simt_wait_for_stream();
  const int x = a.x[at];  // fault EarlyWrite
  a.y[at] = 2 * x;  // fault EarlyRead
}

// Adds each value of y to that of x. A thread accesses what the same thread of double_kernel has accessed.
__global__ void add_kernel(ChainArgs a) {
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  int y = 0;
  if (a.fault == Fault::EarlyRead) y = a.y[at];  // fault EarlyRead
  if (a.fault == Fault::EarlyWrite) a.x[at] = int(at);  // fault EarlyWrite
  if (a.fault == Fault::NoWait && at == 70) return;
  simt_wait_for_stream();
  if (a.fault == Fault::TwoWaits && at == 70) simt_wait_for_stream();  // fault TwoWaits
  if (a.fault != Fault::EarlyRead) y = a.y[at];
  a.x[at] += y;
}

}  // namespace

Outcome chain(Fault fault) {
  constexpr int blocks = 3, block = 64;
  std::vector<int> x(blocks * block), y(x.size());
  for (size_t i = 0; i < x.size(); ++i) x[i] = int(i);
  const ChainArgs args{x.data(), y.data(), fault};
  cudaError_t error = SIMT_LAUNCH_DEPENDENT(double_kernel, blocks, block, 0, nullptr, args);
  if (error == cudaSuccess) error = SIMT_LAUNCH_DEPENDENT(add_kernel, blocks, block, 0, nullptr, args);
  bool right = true;
  for (size_t i = 0; i < x.size(); ++i) right = right && x[i] == 3 * int(i);
  return {error, right, std::vector<unsigned>(x.begin(), x.end())};
}
