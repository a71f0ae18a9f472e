// The operators on CUDA tensors where the build has no CUDA kernels: a sentence that says what to do.
#include <stdexcept>

#include "operators.h"

namespace topn_gating::binding {
namespace {

struct NoCuda {
  explicit NoCuda(const Tensor&) {
    throw std::runtime_error(
        "topn_gating was built without CUDA kernels: for CUDA tensors, rebuild it where nvcc is installed with "
        "`TOPN_GATING_CUDA=1 pip install --no-build-isolation .` in the source tree");
  }

  template <class Args>
  int64_t workspace_bytes(const Args&) const {
    return 0;
  }

  template <class Args>
  void run(const Args&) const {}
};

}  // namespace
}  // namespace topn_gating::binding

TOPN_LIBRARY_IMPL(CUDA, m) {
  using namespace topn_gating::binding;
  using Backend = NoCuda;
  TOPN_GATING_OPERATORS(TOPN_GATING_IMPLEMENT)
}
