// The operators on CPU tensors.
#include "linear.h"
#include "operators.h"

namespace topn_gating::binding {
namespace {

void parallel_for(int64_t begin, int64_t end, int64_t grain, cpu::Body body, void* context) {
  torch::stable::parallel_for(begin, end, grain, [=](int64_t b, int64_t e) { body(b, e, context); });
}

struct Cpu {
  explicit Cpu(const Tensor&) {}

  template <class Args>
  int64_t workspace_bytes(const Args& a) const {
    return cpu::workspace_bytes(a);
  }

  void run(const Gate& a) const { cpu::kernels().gate(a, parallel_for); }
  void run(const GateBackward& a) const { cpu::kernels().gate_backward(a, parallel_for); }
  void run(const Assign& a) const { cpu::kernels().assign(a, parallel_for); }
  void run(const AssignBackward& a) const { cpu::kernels().assign_backward(a, parallel_for); }
  void run(const Dense& a) const { cpu::kernels().dense(a, parallel_for); }
  void run(const DenseBackward& a) const { cpu::kernels().dense_backward(a, parallel_for); }
  void run(const Dispatch& a) const { cpu::kernels().dispatch(a, parallel_for); }
  void run(const DispatchBackward& a) const { cpu::kernels().dispatch_backward(a, parallel_for); }
  void run(const Combine& a) const { cpu::kernels().combine(a, parallel_for); }
  void run(const CombineBackward& a) const { cpu::kernels().combine_backward(a, parallel_for); }
  void run(const Linear& a) const { cpu::kernels().linear(a, parallel_for); }
  void run(const LinearBackward& a) const { cpu::kernels().linear_backward(a, parallel_for); }
};

}  // namespace
}  // namespace topn_gating::binding

STABLE_TORCH_LIBRARY_IMPL(topn_gating, CPU, m) {
  using namespace topn_gating::binding;
  using Backend = Cpu;
  TOPN_GATING_OPERATORS(TOPN_GATING_IMPLEMENT)
  TOPN_GATING_CPU_OPERATORS(TOPN_GATING_IMPLEMENT)
}
