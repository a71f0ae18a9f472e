// Operators torch.ops.topn_gating_simt, which run the CUDA kernels on CPU tensors, on the host.
#include <exception>
#include <string>

#include "launchers.h"
#include "operators.h"

namespace topn_gating::binding {
namespace {

class Simt : public Launchers {
 public:
  explicit Simt(const Tensor&) : Launchers(nullptr) {}

  // Runs a kernel; the error of a launch that failed includes where its threads were.
  template <class Args>
  void run(const Args& a) const {
    simt_reset();
    try {
      Launchers::run(a);
    } catch (const std::exception& error) {
      STD_TORCH_CHECK(false, error.what(), "\n", simt_error());
    }
  }
};

}  // namespace
}  // namespace topn_gating::binding

STABLE_TORCH_LIBRARY(topn_gating_simt, m) { TOPN_GATING_OPERATORS(TOPN_GATING_DEFINE) }
STABLE_TORCH_LIBRARY_IMPL(topn_gating_simt, CPU, m) {
  using namespace topn_gating::binding;
  using Backend = Simt;
  TOPN_GATING_OPERATORS(TOPN_GATING_IMPLEMENT)
}
