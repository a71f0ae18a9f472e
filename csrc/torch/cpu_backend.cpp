// The operators on CPU tensors.
#include "cpu/kernels.h"
#include "grouped_linear.h"
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

  template <class Args>
  void run(const Args& a) const {
    cpu::run(a, parallel_for);
  }
};

}  // namespace
}  // namespace topn_gating::binding

TOPN_LIBRARY_IMPL(CPU, m) {
  using namespace topn_gating::binding;
  using Backend = Cpu;
  TOPN_GATING_OPERATORS(TOPN_GATING_IMPLEMENT)
  TOPN_GATING_CPU_OPERATORS(TOPN_GATING_IMPLEMENT)
}
