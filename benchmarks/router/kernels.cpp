#include "kernels.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "reference.h"

namespace topn_gating::bench {
namespace {

// Values that are given at once.
template <class T>
Call::Expected listed(std::vector<T> values) {
  return [values = std::move(values)](int64_t i) { return double(values[size_t(i)]); };
}

template <class Args>
Args sizes_of(const Problem& p) {
  Args a{};
  a.groups = p.shape.groups, a.tokens = p.shape.tokens, a.experts = p.shape.experts, a.top_n = p.shape.top_n;
  return a;
}

template <class Args>
Args logits_of(Call& call, const Problem& p) {
  Args a = sizes_of<Args>(p);
  a.dtype = p.dtype;
  a.eps = p.eps;
  a.noise_mult = p.noise_mult;
  call.reads(a.logits, p.logits);
  call.reads(a.noise, p.noise);
  call.reads(a.token_mask, p.mask);
  return a;
}

void gate(Call& call, const Problem& p) {
  Gate a = logits_of<Gate>(call, p);
  a.losses = true;
  const Tolerance close{p.precision()};
  const int64_t of_experts = p.shape.groups * p.shape.experts;
  const Gates gates = reference_gate(p);
  call.writes(a.weight, "weight", p.real, p.pairs, close, listed(gates.weight));
  call.writes(a.expert, "expert", Type::I32, p.pairs, {}, listed(gates.expert));
  call.writes(a.importance, "importance", p.real, of_experts, close, listed(gates.importance));
  call.writes(a.top_count, "top_count", Type::I32, of_experts, {}, listed(gates.top_count));
  call.writes(a.balance_loss, "balance_loss", p.real, 1, close, listed<double>({gates.balance_loss}));
  call.writes(a.router_z_loss, "router_z_loss", p.real, 1, close, listed<double>({gates.router_z_loss}));
  call.runs(a);
}

void gate_backward(Call& call, const Problem& p) {
  GateBackward a = logits_of<GateBackward>(call, p);
  const GateGradients grad{call.keep(p.uniform(p.real, p.pairs, 2)),
                           call.keep(p.uniform(p.real, p.shape.groups * p.shape.experts, 3)),
                           call.keep(p.uniform(p.real, 1, 4)), call.keep(p.uniform(p.real, 1, 5))};
  call.reads(a.grad_weight, grad.weight);
  call.reads(a.grad_importance, grad.importance);
  call.reads(a.grad_balance_loss, grad.balance_loss);
  call.reads(a.grad_router_z_loss, grad.router_z_loss);
  call.reads(a.expert, p.expert);
  call.reads(a.top_count, p.top_count);
  std::vector<double> expected = reference_gate_backward(p, grad);
  double largest = 0;  // differences of gradients about as large cancel
  for (const double value : expected) largest = std::max(largest, std::abs(value));
  call.writes(a.grad_logits, "grad_logits", p.type, p.logits.count(), {p.precision(), p.precision() * largest},
              listed(std::move(expected)));
  call.runs(a);
}

void assign(Call& call, const Problem& p) {
  Assign a = sizes_of<Assign>(p);
  a.is_double = p.real == Type::F64;
  a.capacity = p.capacity;
  a.policy = p.policy;
  a.eps = p.eps;
  call.reads(a.weight, p.weight);
  call.reads(a.expert, p.expert);
  call.reads(a.draws, p.draws);
  call.reads(a.threshold, p.threshold);
  call.reads(a.token_mask, p.mask);
  const Slots slots = reference_assign(p);
  call.writes(a.kept, "kept", p.real, p.pairs, {}, listed(slots.kept));
  call.writes(a.slot, "slot", Type::I32, p.pairs, {}, listed(slots.slot));
  call.writes(a.source, "source", Type::I32, p.rows, {}, listed(slots.source));
  call.writes(a.demand, "demand", Type::I32, p.shape.groups * p.shape.experts, {}, listed(slots.demand));
  call.runs(a);
}

void assign_backward(Call& call, const Problem& p) {
  AssignBackward a{};
  a.is_double = p.real == Type::F64;
  a.pairs = p.pairs;
  const Buffer& grad_kept = call.keep(p.uniform(p.real, p.pairs, 2));
  call.reads(a.grad_kept, grad_kept);
  call.reads(a.slot, p.slot);
  call.writes(a.grad_weight, "grad_weight", p.real, p.pairs, {},
              [&p, &grad_kept](int64_t pair) { return p.row_of(pair) >= 0 ? grad_kept.get(pair) : 0; });
  call.runs(a);
}

// How many elements of `expert`, `slot` and `source` the kernel needs; 0: it does not read it.
Assignment assignment_of(Call& call, const Problem& p, int64_t of_pairs, int64_t of_rows) {
  Assignment a = sizes_of<Assignment>(p);
  a.capacity = p.capacity;
  call.reads(a.expert, p.expert, of_pairs);
  call.reads(a.slot, p.slot, of_pairs);
  if (of_rows > 0) call.reads(a.source, p.source, of_rows);
  return a;
}

// A system that hands out more memory than it has would end the process instead.
void require_memory(int64_t bytes) {
  const int64_t all = int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  if (bytes <= all) return;
  throw std::runtime_error("needs " + std::to_string(bytes >> 30) + " GiB of memory: --benchmark_filter=-dense leaves it out");
}

// Where each pair stands in (g, n, e, C); -1: nowhere.
std::vector<int64_t> places_of(const Problem& p) {
  const int64_t of_token = p.shape.experts * p.capacity;
  std::vector<int64_t> places;
  for (int64_t pair = 0; pair < p.pairs; ++pair) {
    const int64_t row = p.row_of(pair);
    places.push_back(row < 0 ? -1 : pair / p.shape.top_n * of_token + row % of_token);
  }
  return places;
}

void dense(Call& call, const Problem& p) {
  const int64_t of_token = p.shape.experts * p.capacity, top_n = p.shape.top_n, count = p.tokens * of_token;
  require_memory(2 * count * host::bytes_of(p.type));
  // The pair at an element of (g, n, e, C); -1: none.
  const auto pair_at = [of_token, top_n, places = places_of(p)](int64_t i) {
    const int64_t token = i / of_token;
    for (int64_t pair = token * top_n; pair < (token + 1) * top_n; ++pair) {
      if (places[size_t(pair)] == i) return pair;
    }
    return int64_t(-1);
  };
  Dense a{};
  a.dtype = p.dtype;
  a.assignment = assignment_of(call, p, p.pairs, 0);
  call.reads(a.weight, p.weight);
  call.writes(a.dispatch, "dispatch", p.type, count, {}, [=](int64_t i) { return pair_at(i) >= 0 ? 1 : 0; });
  call.writes(a.combine, "combine", p.type, count, {}, [=, &p](int64_t i) {
    const int64_t pair = pair_at(i);
    return pair >= 0 ? p.weight.get(pair) : 0;
  });
  call.runs(a);
}

void dense_backward(Call& call, const Problem& p) {
  const int64_t n = p.shape.tokens, e = p.shape.experts, slots = p.capacity, count = p.tokens * e * slots;
  require_memory(2 * count * host::bytes_of(p.type));
  const Buffer& grad_dispatch = call.keep(p.uniform(p.type, count, 2));
  const Buffer& grad_combine = call.keep(p.uniform(p.type, count, 3));
  DenseBackward a{};
  a.dtype = p.dtype;
  a.assignment = assignment_of(call, p, p.pairs, 0);
  call.reads(a.grad_dispatch, grad_dispatch, p.held_pairs);
  call.reads(a.grad_combine, grad_combine, p.held_pairs);
  for (int64_t* strides : {a.dispatch_strides, a.combine_strides}) {
    strides[0] = n * e * slots, strides[1] = e * slots, strides[2] = slots, strides[3] = 1;
  }
  call.writes(a.grad_weight, "grad_weight", p.real, p.pairs, {p.precision()},
              [&grad_dispatch, &grad_combine, places = places_of(p)](int64_t pair) {
                const int64_t at = places[size_t(pair)];
                return at >= 0 ? grad_dispatch.get(at) + grad_combine.get(at) : 0;
              });
  call.runs(a);
}

// Σ_j a[row of a, j] · b[row of b, j].
double dot(int64_t dim, const Buffer& a, int64_t row_of_a, const Buffer& b, int64_t row_of_b) {
  double sum = 0;
  for (int64_t j = 0; j < dim; ++j) sum += a.get(row_of_a * dim + j) * b.get(row_of_b * dim + j);
  return sum;
}

// Sums of `terms` products of uniform numbers, which may cancel.
Tolerance sum_of(const Problem& p, int64_t terms) { return {p.precision(), p.precision() * std::sqrt(double(terms))}; }

void dispatch(Call& call, const Problem& p) {
  const int64_t dim = p.shape.dim, top_n = p.shape.top_n;
  const Buffer& x = call.keep(p.uniform(p.type, p.tokens * dim, 2));
  Dispatch a{};
  a.dtype = p.dtype;
  a.dim = dim;
  a.assignment = assignment_of(call, p, p.held_pairs, p.rows);
  call.reads(a.x, x, p.held_tokens * dim);
  call.writes(a.y, "y", p.type, p.rows * dim, {}, [&p, &x, dim, top_n](int64_t i) {
    const int64_t pair = p.pair_of(i / dim);
    return pair >= 0 ? x.get(pair / top_n * dim + i % dim) : 0;
  });
  call.runs(a);
}

void dispatch_backward(Call& call, const Problem& p) {
  const int64_t dim = p.shape.dim, top_n = p.shape.top_n;
  const Buffer& grad_y = call.keep(p.uniform(p.type, p.rows * dim, 2));
  const Buffer& x = call.keep(p.uniform(p.type, p.tokens * dim, 3));
  DispatchBackward a{};
  a.dtype = p.dtype;
  a.dim = dim;
  a.assignment = assignment_of(call, p, p.pairs, p.held_pairs);
  call.reads(a.grad_y, grad_y, p.held_pairs * dim);
  call.reads(a.x, x, p.held_tokens * dim);
  call.writes(a.grad_x, "grad_x", p.type, p.tokens * dim, sum_of(p, top_n), [&p, &grad_y, dim, top_n](int64_t i) {
    const int64_t token = i / dim;
    double sum = 0;
    for (int64_t pair = token * top_n; pair < (token + 1) * top_n; ++pair) {
      if (p.row_of(pair) >= 0) sum += grad_y.get(p.row_of(pair) * dim + i % dim);
    }
    return sum;
  });
  call.writes(a.grad_weight, "grad_weight", p.real, p.pairs, sum_of(p, dim), [&p, &grad_y, &x, dim, top_n](int64_t pair) {
    return p.row_of(pair) >= 0 ? dot(dim, grad_y, p.row_of(pair), x, pair / top_n) : 0;
  });
  call.runs(a);
}

void combine(Call& call, const Problem& p) {
  const int64_t dim = p.shape.dim, top_n = p.shape.top_n;
  const Buffer& y = call.keep(p.uniform(p.type, p.rows * dim, 2));
  Combine a{};
  a.dtype = p.dtype;
  a.dim = dim;
  a.assignment = assignment_of(call, p, p.pairs, p.held_pairs);
  call.reads(a.weight, p.weight, p.held_pairs);
  call.reads(a.y, y, p.held_pairs * dim);
  call.writes(a.out, "out", p.type, p.tokens * dim, sum_of(p, top_n), [&p, &y, dim, top_n](int64_t i) {
    const int64_t token = i / dim;
    double sum = 0;
    for (int64_t pair = token * top_n; pair < (token + 1) * top_n; ++pair) {
      if (p.row_of(pair) >= 0) sum += p.weight.get(pair) * y.get(p.row_of(pair) * dim + i % dim);
    }
    return sum;
  });
  call.runs(a);
}

void combine_backward(Call& call, const Problem& p) {
  const int64_t dim = p.shape.dim, top_n = p.shape.top_n;
  const Buffer& grad_out = call.keep(p.uniform(p.type, p.tokens * dim, 2));
  const Buffer& y = call.keep(p.uniform(p.type, p.rows * dim, 3));
  CombineBackward a{};
  a.dtype = p.dtype;
  a.dim = dim;
  a.assignment = assignment_of(call, p, p.held_pairs, p.rows);
  call.reads(a.weight, p.weight, p.held_pairs);
  call.reads(a.grad_out, grad_out, p.held_tokens * dim);
  call.reads(a.y, y, p.held_pairs * dim);
  call.writes(a.grad_y, "grad_y", p.type, p.rows * dim, {p.precision()}, [&p, &grad_out, dim, top_n](int64_t i) {
    const int64_t pair = p.pair_of(i / dim);
    return pair >= 0 ? p.weight.get(pair) * grad_out.get(pair / top_n * dim + i % dim) : 0;
  });
  call.writes(a.grad_weight, "grad_weight", p.real, p.pairs, sum_of(p, dim), [&p, &grad_out, &y, dim, top_n](int64_t pair) {
    return p.row_of(pair) >= 0 ? dot(dim, y, p.row_of(pair), grad_out, pair / top_n) : 0;
  });
  call.runs(a);
}

template <class Args>
Args product_of(const Problem& p) {
  Args a{};
  a.dtype = p.dtype;
  a.tokens = p.tokens, a.dim = p.shape.dim, a.experts = p.shape.experts;
  return a;
}

void linear(Call& call, const Problem& p) {
  const Buffer& x = call.keep(p.uniform(p.type, p.tokens * p.shape.dim, 2));
  const Buffer& weight = call.keep(p.uniform(p.type, p.shape.experts * p.shape.dim, 3));
  Linear a = product_of<Linear>(p);
  call.reads(a.x, x);
  call.reads(a.weight, weight);
  call.writes(a.logits, "logits", p.type, p.tokens * p.shape.experts, sum_of(p, p.shape.dim),
              listed(product(Matrix(x, p.tokens), Matrix(weight, p.shape.experts).transposed())));
  call.runs(a);
}

void linear_backward(Call& call, const Problem& p) {
  const Buffer& grad_logits = call.keep(p.uniform(p.type, p.tokens * p.shape.experts, 2));
  const Buffer& x = call.keep(p.uniform(p.type, p.tokens * p.shape.dim, 3));
  const Buffer& weight = call.keep(p.uniform(p.type, p.shape.experts * p.shape.dim, 4));
  LinearBackward a = product_of<LinearBackward>(p);
  call.reads(a.grad_logits, grad_logits);
  call.reads(a.x, x);
  call.reads(a.weight, weight);
  const Matrix grad(grad_logits, p.tokens);
  call.writes(a.grad_x, "grad_x", p.type, x.count(), sum_of(p, p.shape.experts),
              listed(product(grad, Matrix(weight, p.shape.experts))));
  call.writes(a.grad_weight, "grad_weight", p.type, weight.count(), sum_of(p, p.tokens),
              listed(product(grad.transposed(), Matrix(x, p.tokens))));
  call.runs(a);
}

}  // namespace

const std::vector<Kernel> kKernels = {{"gate", gate},
                                      {"gate_backward", gate_backward},
                                      {"assign", assign},
                                      {"assign_backward", assign_backward},
                                      {"dense", dense},
                                      {"dense_backward", dense_backward},
                                      {"dispatch", dispatch},
                                      {"dispatch_backward", dispatch_backward},
                                      {"combine", combine},
                                      {"combine_backward", combine_backward},
                                      {"linear", linear, true},
                                      {"linear_backward", linear_backward, true}};

}  // namespace topn_gating::bench
