// Calls of every kernel, on inputs that a case describes.
#pragma once

#include <string>
#include <vector>

#include "call.h"

namespace topn_gating::harness {

// Timed: inputs like those of a model. Hard: equal scores, noise, a mask, experts that overflow and others that stay empty, and
// thresholds of 0 and 1; the scores are exact in every type, so that the plain loops choose the same experts as the kernels.
// Random: as the case's fields say.
enum class Inputs { Timed, Hard, Random };
enum class Logits { Normal, Ties, Special };  // Special: NaN, infinities, equal values
enum class Layout { Absent, Contiguous, Transposed, Expanded };
enum Gradients : unsigned { kOfWeight = 1, kOfImportance = 2, kOfBalance = 4, kOfZ = 8, kOfAll = 15 };

struct Case {
  DType dtype = DType::F32;
  int64_t groups = 1, tokens = 1, experts = 1, top_n = 1, capacity = 1, dim = 1;
  Inputs inputs = Inputs::Random;
  Policy policy = Policy::Random;
  double eps = 1e-9;
  bool aligned = true;  // whether tensors start at addresses that are multiples of 64
  bool soft = false, losses = true, noise = false, mask = false;
  bool any_router = false;  // whether gate has a sigmoid, a bias, expert groups where these divide the experts, and for an even
                            // number of tokens statistics
  bool given = false;       // whether gate has given experts
  bool perturbed = false;  // whether some experts, slots, sources and offsets are replaced by others, also out of range
  bool keys = false;       // whether keys decide in assign which pairs hold slots, in the capacity layout
  bool dropless = false;   // whether the experts' rows have the dropless layout, which has one group and no capacity
  int64_t align = 1;       // divisor of each expert's number of rows there
  Logits logits = Logits::Normal;
  unsigned gradients = kOfAll;  // set of Gradients that gate_backward gets
  Layout grad_dispatch = Layout::Contiguous, grad_combine = Layout::Contiguous;
  bool bias = false;                   // whether grouped_linear adds one
  Layout weight = Layout::Contiguous;  // of the matrices of grouped_linear
  bool wants_weight = true;  // whether dispatch_backward computes the weight's gradient
  int multiprocessors = 3;   // number that the emulated device has

  // Returns whether the plain loops can compute the case.
  bool has_reference() const { return !soft && !any_router && !given && logits != Logits::Special; }
};
const char* name_of(DType);

// A kernel and the function that prepares its call on a case.
struct Kernel {
  const char* name;
  void (*set_up)(Call&, const Case&);
  bool on_cpu_alone = false;
  bool knows_dropless = false;  // whether a case may be dropless, and changes by it
};
extern const std::vector<Kernel> kKernels;
// Prepares the call of the kernel with that name.
void set_up(const char* kernel, Call&, const Case&);

}  // namespace topn_gating::harness
