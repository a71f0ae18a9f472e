#include "cases.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace topn_gating::harness {

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::F32: return "f32";
    case DType::F64: return "f64";
    case DType::BF16: return "bf16";
    case DType::F16: return "f16";
  }
  return "";
}

namespace {

// The sizes and types of a case, and functions that generate its tensors.
struct Problem {
  const Case& c;
  const Type type = type_of(c.dtype), compute_type = compute_type_of(c.dtype);
  const int64_t tokens = c.groups * c.tokens, pairs = tokens * c.top_n, group_experts = c.groups * c.experts,
                group_rows = c.dropless ? dropless_rows(pairs, c.experts, c.align) : c.experts * c.capacity,
                rows = c.groups * group_rows;
  const bool hard = c.inputs == Inputs::Hard, random_inputs = c.inputs == Inputs::Random;
  const bool noise = c.noise || hard, mask = c.mask || hard;
  mutable Random random{uint64_t(c.experts * 1000 + c.top_n)};

  RoutingSizes sizes() const { return {c.groups, c.tokens, c.experts, c.top_n}; }
  int64_t capacity() const { return c.dropless ? 0 : c.capacity; }

  template <class F>
  Buffer buffer(Type of, int64_t count, const F& f) const {
    return Buffer::of(of, count, c.aligned, f);
  }
  // Returns normal numbers, or for inputs that are not Random, numbers uniform in [-1, 1).
  Buffer values(Type of, int64_t count) const {
    return buffer(of, count, [&](int64_t) { return random_inputs ? random.normal() : 2 * random.uniform() - 1; });
  }
  Buffer uniforms(Type of, int64_t count) const {
    return buffer(of, count, [&](int64_t) { return random.uniform(); });
  }
  Buffer copy(Type of, const Buffer& from) const {
    return buffer(of, from.count(), [&](int64_t i) { return from.get(i); });
  }

  // Returns the largest relative error of rounding to the compute type.
  double rounding() const { return compute_type == Type::F64 ? 0x1p-53 : 0x1p-24; }
  // Returns the relative error that docs/spec.md allows a kernel's result; it is larger with noise, which rounds the scores.
  double precision() const { return compute_type == Type::F64 ? 1e-13 : noise ? 4e-6 : 1e-6; }

  // Return the bounds of results that are exact before they are rounded to their type, and of results of several roundings.
  Bound exact() const { return {0.5}; }
  Bound close() const { return {0.5, precision()}; }
  // Return the bounds of sums of `terms` products, which may cancel, to the plain loops and to another backend.
  Bound sum(int64_t terms) const {
    return {0.5, precision(), precision() * std::sqrt(double(terms)) * (random_inputs ? 16 : 1)};
  }
  Bound sum_of_backend(int64_t terms) const {
    return {1, 0, 8 * rounding() * std::sqrt(double(terms)), 8 * rounding()};
  }
};

// Returns a logit of Inputs::Hard. Scores differ by multiples of 1/8, or with noise by far more than a rounding.
double hard_logit(Random& random, int64_t expert, int64_t experts) {
  const double wanted = expert < 2 ? 2 : expert == experts - 1 ? -3 : 0;
  return std::round(8 * (random.normal() / 2 + wanted)) / 8;
}

// Returns a logit of Logits::Special: in group 0, for most tokens NaN, an infinity or equal to all others of the token; in the
// other groups `normal`, so that their sums are finite.
double special_logit(int64_t token, int64_t tokens, int64_t expert, double normal) {
  const double infinity = std::numeric_limits<double>::infinity();
  if (token >= tokens) return normal;
  switch (token % 6) {
    case 0: return expert == token % 5 ? std::nan("") : normal;
    case 1: return expert % 3 == 1 ? infinity : normal;
    case 2: return expert % 2 == 0 ? -infinity : normal;
    case 3: return -infinity;
    case 4: return 1;
  }
  return normal;
}

Buffer mask_of(const Problem& p) {
  Random random(5);
  return Buffer::of(Type::Bool, p.tokens, true, [&](int64_t i) {
    return p.random_inputs && i / p.c.tokens == 1 ? 0 : random.chance(0.8);  // group 1 has no valid token
  });
}

GateInputs gate_inputs(const Problem& p) {
  const Case& c = p.c;
  GateOptions options{c.eps, 1, c.soft, Score::Softmax, 1, 1, GroupScore::Top2, c.top_n > 1, 1, false};
  if (c.any_router) {
    options.score = c.soft ? Score::Softmax : c.experts % 3 == 0 ? Score::SqrtSoftplus : Score::Sigmoid;
    options.scale = 2.5;
    options.all_ranks = true;
    options.group_score = c.experts % 8 == 0 ? GroupScore::Max : GroupScore::Top2;
    options.normalize = c.top_n > 1 && c.experts % 5 != 0;
    if (c.experts % 4 == 0 && c.top_n <= c.experts / 2) options.expert_groups = 4, options.top_groups = 2;
  }
  return {p.sizes(), options, c.dtype};
}

template <class Args>
void add_gate_inputs(Call& call, Args& a, const Problem& p) {
  const Case& c = p.c;
  call.input(a.logits, p.buffer(p.type, p.tokens * c.experts, [&](int64_t i) {
    if (p.hard) return hard_logit(p.random, i % c.experts, c.experts);
    const double normal = p.random.normal() * (p.random_inputs ? 2 : 1);
    if (c.logits == Logits::Special) return special_logit(i / c.experts, c.tokens, i % c.experts, normal);
    return c.logits == Logits::Ties ? std::round(normal / 2) : normal;  // with -0
  }));
  if (p.noise) {
    call.input(a.noise, p.buffer(p.compute_type, p.tokens * c.experts, [&](int64_t) {
      if (p.hard) return double(p.random.below(8)) / 8;
      return p.random.chance(0.01) ? 0 : p.random.uniform();
    }));
  }
  if (p.mask) call.input(a.token_mask, mask_of(p));
}

void gate(Call& call, const Case& c) {
  const Problem p{c};
  Gate& a = call.arguments(Gate{gate_inputs(p)});
  a.losses = c.losses;
  add_gate_inputs(call, a, p);
  if (c.any_router) {
    call.input(a.select_bias, p.buffer(Type::F32, c.experts, [&](int64_t) { return double(p.random.below(16)) / 16; }));
  }
  if (c.given) {
    call.input(a.given, p.buffer(Type::I32, p.pairs, [&](int64_t) { return double(p.random.below(c.experts + 2)) - 1; }));
  }
  // Backends sum a row in different orders, whose errors add up if all gates are equal. The soft top-n magnifies the differences,
  // but computes in double.
  const Bound sums{10 + double(c.experts) / 24};
  const Bound weight_bound = !c.soft ? sums : Bound{c.dtype == DType::F64 ? 10 + double(c.experts) / 6 : 2};
  call.output(a.weight, "weight", p.compute_type, p.pairs, p.close(), weight_bound);
  call.output(a.expert, "expert", Type::I32, p.pairs);
  call.output(a.importance, "importance", p.compute_type, p.group_experts, p.close(), sums);
  call.output(a.counts, "counts", Type::I32, p.group_experts);
  call.output(a.balance_loss, "balance_loss", p.compute_type, 1, p.close(), sums);
  call.output(a.router_z_loss, "router_z_loss", p.compute_type, 1, p.close(), sums);
  if (c.any_router && c.tokens % 2 == 0) call.output(a.statistics, "statistics", p.compute_type, 3, p.close(), sums);
  call.workspace(a.workspace);
}

// Returns the outputs of gate, by the plain loops: weight, expert, importance, counts and the losses.
std::vector<Buffer> gate_outputs(const Case& c) {
  Case with_losses = c;
  with_losses.losses = true;
  Call call;
  gate(call, with_losses);
  return call.run_reference().outputs;
}

// Returns about the largest gradient of a gate value, which is larger the fewer valid tokens a group has. If the gate value is
// near 1, the gradient cancels with the mean, so that its rounding errors remain.
double largest_gradient(const Case& c, const Buffer& counts) {
  double most = 1;
  for (int64_t group = 0; group < c.groups; ++group) {
    double valid = 0;
    for (int64_t e = 0; e < c.experts; ++e) valid += counts.get(group * c.experts + e);
    most = std::max(most, (4 + double(c.experts) / double(c.groups)) / std::max(valid, 1.0));
  }
  return most;
}

void gate_backward(Call& call, const Case& c) {
  const Problem p{c};
  GateBackward& a = call.arguments(GateBackward{gate_inputs(p)});
  add_gate_inputs(call, a, p);
  const std::vector<Buffer> outputs = gate_outputs(c);
  const Buffer mask = mask_of(p);
  if (c.gradients & kOfWeight) {  // 0 for half of the masked tokens, which then get no gradient at all
    call.input(a.grad_weight, p.buffer(p.compute_type, p.pairs, [&](int64_t i) {
      const int64_t token = i / c.top_n;
      return p.mask && mask.get(token) == 0 && token % 2 == 0 ? 0 : p.random.normal();
    }));
  }
  if (c.gradients & kOfImportance) call.input(a.grad_importance, p.values(p.compute_type, p.group_experts));
  if (c.gradients & kOfBalance) call.input(a.grad_balance_loss, p.values(p.compute_type, 1));
  if (c.gradients & kOfZ) call.input(a.grad_router_z_loss, p.values(p.compute_type, 1));
  call.input(a.expert, p.buffer(Type::I32, p.pairs, [&](int64_t i) {
    return c.perturbed && p.random.chance(0.2) ? double(p.random.below(3 * c.experts) - c.experts) : outputs[1].get(i);
  }));
  call.input(a.counts, p.copy(Type::I32, outputs[3]));
  // Gradients of similar size are subtracted.
  const double largest = largest_gradient(c, outputs[3]), roundings = 32 * p.rounding();
  const double cancelled = p.random_inputs ? p.precision() * largest : 0;
  call.output(a.grad_logits, "grad_logits", p.type, p.tokens * c.experts, {0.5, p.precision(), cancelled, p.precision()},
              {1, 0, roundings * largest, roundings});
  call.workspace(a.workspace);
}

// Weights and experts of all pairs: the outputs of gate or, for Inputs::Random, random ones, half of them among three experts.
struct Choice {
  Buffer weight, expert;
};
Choice choice_of(const Problem& p) {
  if (!p.random_inputs) {
    const std::vector<Buffer> outputs = gate_outputs(p.c);
    return {p.copy(p.compute_type, outputs[0]), p.copy(Type::I32, outputs[1])};
  }
  Random random(uint64_t(p.c.tokens * 1000 + p.c.experts));
  return {p.uniforms(p.compute_type, p.pairs), p.buffer(Type::I32, p.pairs, [&](int64_t) {
    if (p.c.perturbed && random.chance(0.1)) return random.chance(0.5) ? -1.0 : 2147483647.0;
    if (p.c.perturbed && random.chance(0.1)) return double(p.c.experts);
    return double(random.below(random.chance(0.5) && p.c.experts > 3 ? 3 : p.c.experts));
  })};
}

void assign(Call& call, const Case& c) {
  const Problem p{c};
  Assign& a = call.arguments(Assign{p.sizes(), {p.capacity(), p.group_rows, c.align, c.policy, c.eps}});
  a.is_double = p.compute_type == Type::F64;
  Choice choice = choice_of(p);
  call.input(a.weight, std::move(choice.weight));
  call.input(a.expert, std::move(choice.expert));
  if (c.policy == Policy::Random) call.input(a.draws, p.uniforms(p.compute_type, p.pairs));
  if (c.policy == Policy::Random || c.policy == Policy::Threshold) {
    call.input(a.threshold, p.buffer(p.compute_type, c.top_n, [&](int64_t k) {
      if (p.random_inputs) return k % 5 == 4 ? 0 : 0.6 * p.random.uniform();
      return p.hard ? double(k % 3) / 2 : 0.2;
    }));
  }
  if (p.mask) call.input(a.token_mask, mask_of(p));
  if (c.keys && !c.dropless) {  // some of them equal, of both signs, or no numbers
    call.input(a.keys, p.buffer(p.compute_type, p.pairs, [&](int64_t) {
      return p.random.chance(0.1) ? std::nan("") : p.random.chance(0.5) ? std::round(p.random.normal()) : p.random.normal();
    }));
  }
  call.output(a.kept, "kept", p.compute_type, p.pairs);
  call.output(a.slot, "slot", Type::I32, p.pairs);
  call.output(a.source, "source", Type::I32, p.rows);
  call.output(a.demand, "demand", Type::I32, p.group_experts);
  if (c.dropless) call.output(a.offsets, "offsets", Type::I32, c.experts);
  call.workspace(a.workspace);
}

// The inputs and outputs of assign, perturbed if the case asks for it, and the number of pairs and tokens that hold a slot.
struct Held {
  Buffer weight, expert, slot, source, offsets;
  int64_t pairs = 0, tokens = 0;

  explicit Held(const Problem& p) {
    Case given = p.c;
    given.perturbed = false;
    Call call;
    assign(call, given);
    weight = p.copy(p.compute_type, call.input_of(0));
    expert = p.copy(Type::I32, call.input_of(1));
    const std::vector<Buffer> outputs = call.run_reference().outputs;
    slot = p.copy(Type::I32, outputs[1]);
    source = p.copy(Type::I32, outputs[2]);
    if (p.c.dropless) offsets = p.copy(Type::I32, outputs[4]);
    for (int64_t token = 0; token < p.tokens; ++token) {
      int64_t held = 0;
      for (int64_t pair = token * p.c.top_n; pair < (token + 1) * p.c.top_n; ++pair) held += slot.get(pair) >= 0;
      pairs += held;
      tokens += held > 0;
    }
    if (p.c.perturbed) perturb(p);
  }

 private:
  void perturb(const Problem& p) {
    for (int64_t i = 0; i < expert.count(); ++i) {
      if (p.random.chance(0.1)) expert.set(i, double(p.random.below(p.c.experts + 2) - 1));
      if (p.random.chance(0.1)) slot.set(i, double(p.random.below((p.c.dropless ? p.rows / p.c.experts : p.c.capacity) + 4) - 3));
    }
    for (int64_t i = 0; i < offsets.count(); ++i) {
      if (p.random.chance(0.1)) offsets.set(i, double(p.random.below(p.rows + 8) - 4));
      if (p.random.chance(0.03)) offsets.set(i, p.random.chance(0.5) ? 2147483647.0 : -2147483648.0);
    }
    for (int64_t i = 0; i < source.count(); ++i) {
      if (p.random.chance(0.1)) source.set(i, double(p.random.below(p.c.tokens * p.c.top_n + 4) - 2));
      if (p.random.chance(0.05)) source.set(i, p.random.chance(0.5) ? 2147483647.0 : -2147483648.0);
    }
  }
};

void assign_backward(Call& call, const Case& c) {
  const Problem p{c};
  AssignBackward& a = call.arguments(AssignBackward{p.compute_type == Type::F64, p.pairs});
  call.input(a.grad_kept, p.values(p.compute_type, p.pairs));
  call.input(a.slot, p.buffer(Type::I32, p.pairs, [&](int64_t) { return double(p.random.below(6) - 2); }));
  call.output(a.grad_weight, "grad_weight", p.compute_type, p.pairs);
}

Assignment sizes_of(const Problem& p) { return {p.sizes(), p.capacity(), p.group_rows}; }

// Adds `expert` and `slot`, of which the kernel must read `pairs` elements, `source`, of which it must read `rows`, and `offsets`.
void add_assignment(Call& call, Assignment& a, Held& held, int64_t pairs, int64_t rows) {
  call.input(a.expert, std::move(held.expert), pairs);
  call.input(a.slot, std::move(held.slot), pairs);
  call.input(a.source, std::move(held.source), rows);
  if (held.offsets.count() > 0) call.input(a.offsets, std::move(held.offsets));
}

void dense(Call& call, const Case& c) {
  const Problem p{c};
  Held held(p);
  Dense& a = call.arguments(Dense{c.dtype, sizes_of(p)});
  add_assignment(call, a.assignment, held, p.pairs, held.pairs);
  call.input(a.weight, std::move(held.weight));
  call.output(a.dispatch, "dispatch", p.type, p.tokens * c.experts * c.capacity, p.exact());
  call.output(a.combine, "combine", p.type, p.tokens * c.experts * c.capacity, p.exact());
}

// Adds a gradient (g, n, e, C) of a layout, of which the kernel must read `elements` elements.
void add_strided(Call& call, const void*& field, int64_t* strides, const Problem& p, Layout layout, int64_t elements) {
  constexpr int64_t kSector = 32;  // bytes that are read for each element, which is far from the next
  const int64_t n = p.c.tokens, e = p.c.experts, capacity = p.c.capacity;
  if (layout == Layout::Absent) return;
  const auto set = [&](int64_t group, int64_t token, int64_t expert, int64_t slot) {
    strides[0] = group, strides[1] = token, strides[2] = expert, strides[3] = slot;
  };
  if (layout == Layout::Contiguous) set(n * e * capacity, e * capacity, capacity, 1);
  if (layout == Layout::Transposed) set(n * e * capacity, 1, capacity * n, n);
  if (layout == Layout::Expanded) set(0, 0, 0, 0);  // the gradient of a sum
  const int64_t count = layout == Layout::Expanded ? 1 : p.tokens * e * capacity;
  call.input(field, p.values(p.type, count), elements, kSector);
}

void dense_backward(Call& call, const Case& c) {
  const Problem p{c};
  Held held(p);
  DenseBackward& a = call.arguments(DenseBackward{});
  a.dtype = c.dtype;
  a.assignment = sizes_of(p);
  add_assignment(call, a.assignment, held, p.pairs, held.pairs);
  add_strided(call, a.grad_dispatch, a.dispatch_strides, p, c.grad_dispatch, held.pairs);
  add_strided(call, a.grad_combine, a.combine_strides, p, c.grad_combine, held.pairs);
  call.output(a.grad_weight, "grad_weight", p.compute_type, p.pairs, p.close());
}

// Sets the arguments of a kernel that moves rows.
template <class Args>
Args& rows_of(Call& call, const Problem& p) {
  Args args;
  args.dtype = p.c.dtype;
  args.assignment = sizes_of(p);
  args.dim = p.c.dim;
  return call.arguments(args);
}

void dispatch(Call& call, const Case& c) {
  const Problem p{c};
  Held held(p);
  Dispatch& a = rows_of<Dispatch>(call, p);
  add_assignment(call, a.assignment, held, held.pairs, p.rows);
  call.input(a.x, p.values(p.type, p.tokens * c.dim), held.tokens * c.dim);
  call.output(a.y, "y", p.type, p.rows * c.dim);
}

void dispatch_backward(Call& call, const Case& c) {
  const Problem p{c};
  Held held(p);
  DispatchBackward& a = rows_of<DispatchBackward>(call, p);
  add_assignment(call, a.assignment, held, p.pairs, held.pairs);
  call.input(a.grad_y, p.values(p.type, p.rows * c.dim), held.pairs * c.dim);
  call.output(a.grad_x, "grad_x", p.type, p.tokens * c.dim, p.sum(c.top_n), p.sum_of_backend(c.top_n));
  if (!c.wants_weight) return;
  call.input(a.x, p.values(p.type, p.tokens * c.dim), held.tokens * c.dim);
  call.output(a.grad_weight, "grad_weight", p.compute_type, p.pairs, p.sum(c.dim), p.sum_of_backend(c.dim));
}

void combine(Call& call, const Case& c) {
  const Problem p{c};
  Held held(p);
  Combine& a = rows_of<Combine>(call, p);
  add_assignment(call, a.assignment, held, p.pairs, held.pairs);
  call.input(a.weight, std::move(held.weight), held.pairs);
  call.input(a.y, p.values(p.type, p.rows * c.dim), held.pairs * c.dim);
  call.output(a.out, "out", p.type, p.tokens * c.dim, p.sum(c.top_n), p.sum_of_backend(c.top_n));
}

void combine_backward(Call& call, const Case& c) {
  const Problem p{c};
  Held held(p);
  CombineBackward& a = rows_of<CombineBackward>(call, p);
  add_assignment(call, a.assignment, held, held.pairs, p.rows);
  call.input(a.weight, std::move(held.weight), held.pairs);
  call.input(a.grad_out, p.values(p.type, p.tokens * c.dim), held.tokens * c.dim);
  call.input(a.y, p.values(p.type, p.rows * c.dim), held.pairs * c.dim);
  call.output(a.grad_y, "grad_y", p.type, p.rows * c.dim, p.close());
  call.output(a.grad_weight, "grad_weight", p.compute_type, p.pairs, p.sum(c.dim), p.sum_of_backend(c.dim));
}

void linear(Call& call, const Case& c) {
  const Problem p{c};
  Linear& a = call.arguments(Linear{{c.dtype, p.tokens, c.dim, c.experts}});
  call.input(a.x, p.values(p.type, p.tokens * c.dim));
  call.input(a.weight, p.values(p.type, c.experts * c.dim));
  call.output(a.logits, "logits", p.type, p.tokens * c.experts, p.sum(c.dim));
}

void linear_backward(Call& call, const Case& c) {
  const Problem p{c};
  LinearBackward& a = call.arguments(LinearBackward{{c.dtype, p.tokens, c.dim, c.experts}});
  call.input(a.grad_logits, p.values(p.type, p.tokens * c.experts));
  call.input(a.x, p.values(p.type, p.tokens * c.dim));
  call.input(a.weight, p.values(p.type, c.experts * c.dim));
  call.output(a.grad_x, "grad_x", p.type, p.tokens * c.dim, p.sum(c.experts));
  call.output(a.grad_weight, "grad_weight", p.type, c.experts * c.dim, p.sum(p.tokens));
  call.workspace(a.workspace);
}

// Returns where groups of up to `tokens` rows start, and adds up their rows: the first has as many, some have none.
Buffer starts(const Problem& p, int64_t* rows) {
  return p.buffer(Type::I32, p.c.experts + 1, [&p, rows](int64_t group) {
    return double(group == 0 ? 0 : group == 1 ? *rows += p.c.tokens : *rows += p.random.below(p.c.tokens + 1));
  });
}

// Groups of up to `tokens` rows with a matrix (dim, capacity) for each expert.
void grouped_linear(Call& call, const Case& c) {
  const Problem p{c};
  GroupedLinear& a = call.arguments(GroupedLinear{c.dtype, c.experts, c.dim, c.capacity, c.tokens, c.dim + 3});
  a.weight_strides[0] = c.dim * c.capacity;
  a.weight_strides[1] = c.weight == Layout::Transposed ? 1 : c.capacity;
  a.weight_strides[2] = c.weight == Layout::Transposed ? c.dim : 1;
  int64_t rows = 0;
  call.input(a.start, starts(p, &rows));
  call.input(a.rows, p.values(p.type, rows * a.row_stride));
  call.input(a.weight, p.values(p.type, c.experts * c.dim * c.capacity));
  if (c.bias) call.input(a.bias, p.values(p.type, c.experts * c.capacity));
  call.output(a.result, "result", p.type, rows * c.capacity, p.sum(c.dim));
}

void grouped_outer(Call& call, const Case& c) {
  const Problem p{c};
  GroupedOuter& a = call.arguments(GroupedOuter{c.dtype, c.experts, c.dim, c.capacity, c.dim + 3, c.capacity + 5});
  int64_t rows = 0;
  call.input(a.start, starts(p, &rows));
  call.input(a.left, p.values(p.type, rows * a.left_stride));
  call.input(a.right, p.values(p.type, rows * a.right_stride));
  call.output(a.result, "result", p.type, c.experts * c.dim * c.capacity, p.sum(c.tokens));
}

void grouped_sum(Call& call, const Case& c) {
  const Problem p{c};
  GroupedSum& a = call.arguments(GroupedSum{c.dtype, c.experts, c.dim, c.dim + 3});
  int64_t rows = 0;
  call.input(a.start, starts(p, &rows));
  call.input(a.rows, p.values(p.type, rows * a.row_stride));
  call.output(a.result, "result", p.type, c.experts * c.dim, p.sum(c.tokens));
}

}  // namespace

const std::vector<Kernel> kKernels = {{"gate", gate},
                                      {"gate_backward", gate_backward},
                                      {"assign", assign, false, true},
                                      {"assign_backward", assign_backward},
                                      {"dense", dense},
                                      {"dense_backward", dense_backward},
                                      {"dispatch", dispatch, false, true},
                                      {"dispatch_backward", dispatch_backward, false, true},
                                      {"combine", combine, false, true},
                                      {"combine_backward", combine_backward, false, true},
                                      {"linear", linear, true},
                                      {"linear_backward", linear_backward, true},
                                      {"grouped_linear", grouped_linear, true},
                                      {"grouped_outer", grouped_outer, true},
                                      {"grouped_sum", grouped_sum, true}};

void set_up(const char* name, Call& call, const Case& c) {
  for (const Kernel& kernel : kKernels) {
    if (std::strcmp(kernel.name, name) == 0) return kernel.set_up(call, c);
  }
  throw std::logic_error(std::string("no kernel ") + name);
}

}  // namespace topn_gating::harness
