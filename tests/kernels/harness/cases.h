// Calls of every kernel on inputs that a case describes.
#pragma once

#include <string>
#include <vector>

#include "call.h"

namespace topn_gating::harness {

// Timed: what a model would bring. Hard: equal scores, noise, a mask, experts that overflow and others that stay empty, and
// thresholds of 0 and 1, all exact in every type, so that the plain loops choose as the kernels do. Random: by the case's fields.
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
  bool made_up = false;  // whether experts, slots and sources have values that no kernel gave
  Logits logits = Logits::Normal;
  unsigned gradients = kOfAll;  // those that gate_backward gets
  Layout grad_dispatch = Layout::Contiguous, grad_combine = Layout::Contiguous;
  bool wants_weight = true;  // whether dispatch_backward computes the weight's gradient
  int multiprocessors = 3;   // of the host run of the CUDA kernels

  bool has_reference() const { return !soft && logits != Logits::Special; }
};
const char* name_of(DType);

struct Kernel {
  const char* name;
  void (*set_up)(Call&, const Case&);
  bool on_cpu_alone = false;
};
extern const std::vector<Kernel> kKernels;
void set_up(const char* kernel, Call&, const Case&);  // of that name

}  // namespace topn_gating::harness
