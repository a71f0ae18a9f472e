// Cases of gate and its gradient.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels_test.h"

namespace kernels_test {
namespace {

enum class Logits { Normal, Ties, Special };
enum Gradients : unsigned { kWeight = 1, kImportance = 2, kBalance = 4, kZ = 8, kAll = 15 };

struct GateCase {
  DType dtype = DType::F32;
  int64_t groups = 1, tokens = 1, experts = 1, top_n = 1;
  bool soft = false, losses = true, noise = false, mask = false, aligned = true;
  Logits logits = Logits::Normal;
  double eps = 1e-9;
  int multiprocessors = 3;
  unsigned gradients = kAll;  // of `gate_backward`
  bool made_up_experts = false;

  std::string name() const {
    std::string text = std::string(name_of(dtype)) + " g" + std::to_string(groups) + " n" + std::to_string(tokens) + " e" +
                       std::to_string(experts) + " k" + std::to_string(top_n);
    if (soft) text += " soft";
    if (noise) text += " noise";
    if (mask) text += " mask";
    if (!losses) text += " no_losses";
    if (!aligned) text += " unaligned";
    if (logits == Logits::Ties) text += " ties";
    if (logits == Logits::Special) text += " special";
    if (eps > 0.1) text += " clamped";
    return text;
  }
};

// A row of group 0 with what is not a number, or not finite; those of other groups are normal, as are their sums.
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

struct GateInputs {
  Buffer logits, noise, mask;

  GateInputs(const GateCase& c, Random& random)
      : logits(Buffer::of(type_of(c.dtype), c.groups * c.tokens * c.experts, c.aligned,
                          [&](int64_t i) {
                            const double normal = 2 * random.normal();
                            if (c.logits == Logits::Special) {
                              return special_logit(i / c.experts, c.tokens, i % c.experts, normal);
                            }
                            return c.logits == Logits::Ties ? std::round(normal / 2) : normal;  // -0 too
                          })),
        noise(Buffer::of(real_of(c.dtype), c.noise ? logits.count() : 0, c.aligned,
                         [&](int64_t) { return random.chance(0.01) ? 0 : random.uniform(); })),
        mask(Buffer::of(Type::Bool, c.mask ? c.groups * c.tokens : 0, true, [&](int64_t i) {
          return i / c.tokens == 1 ? 0 : random.chance(0.75);  // group 1 is all padding
        })) {}

  template <class Args>
  Args args(const GateCase& c) const {
    Args a{};
    a.dtype = c.dtype;
    a.groups = c.groups, a.tokens = c.tokens, a.experts = c.experts, a.top_n = c.top_n;
    a.eps = c.eps;
    a.noise_mult = 1;
    a.soft = c.soft;
    a.logits = logits.data();
    a.noise = c.noise ? noise.data() : nullptr;
    a.token_mask = c.mask ? mask.as<const bool>() : nullptr;
    return a;
  }
};

// Of weights: a row is summed in another order, which where all gates are equal rounds one way. The soft top-n multiplies it,
// but is in double.
Bound of_weight(const GateCase& c) {
  if (!c.soft) return {10 + double(c.experts) / 24};
  return {c.dtype == DType::F64 ? 10 + double(c.experts) / 6 : 2};
}

Trial<Gate> gate_trial(const GateCase& c, const GateInputs& inputs) {
  Gate a = inputs.args<Gate>(c);
  a.losses = c.losses;
  const Type real = real_of(c.dtype);
  const Bound sums{10 + double(c.experts) / 24};
  Trial<Gate> trial(a, c.aligned);
  trial.output("weight", &Gate::weight, real, c.groups * c.tokens * c.top_n, of_weight(c));
  trial.output("expert", &Gate::expert, Type::I32, c.groups * c.tokens * c.top_n);
  trial.output("importance", &Gate::importance, real, c.groups * c.experts, sums);
  trial.output("top_count", &Gate::top_count, Type::I32, c.groups * c.experts);
  trial.output("balance_loss", &Gate::balance_loss, real, 1, sums);
  trial.output("router_z_loss", &Gate::router_z_loss, real, 1, sums);
  return trial;
}

void run_gate(Suite& suite, const GateCase& c, bool quick = false) {
  if (!suite.begin("gate " + c.name(), quick)) return;
  simt_set_multiprocessors(c.multiprocessors);
  Random random(uint64_t(c.experts * 1000 + c.top_n));
  const GateInputs inputs(c, random);
  gate_trial(c, inputs).run(suite, c.losses ? 2 : 1);
}

// About how large a gradient at a gate is, which cancels against the mean where the gate is near 1: the fewer real tokens a
// group has, the larger.
double largest_gradient(const GateCase& c, const Buffer& top_count) {
  double most = 1;
  for (int64_t group = 0; group < c.groups; ++group) {
    double real = 0;
    for (int64_t e = 0; e < c.experts; ++e) real += top_count.get(group * c.experts + e);
    most = std::max(most, (4 + double(c.experts) / double(c.groups)) / std::max(real, 1.0));
  }
  return most;
}

void run_backward(Suite& suite, const GateCase& c, bool quick = false) {
  std::string name = "gate_backward " + c.name() + " gradients ";
  for (int i = 0; i < 4; ++i) name += c.gradients >> i & 1 ? "wibz"[i] : '-';
  if (!suite.begin(name + (c.made_up_experts ? " made_up" : ""), quick)) return;
  simt_set_multiprocessors(c.multiprocessors);
  Random random(uint64_t(c.experts * 1000 + c.top_n));
  const GateInputs inputs(c, random);
  const std::vector<Buffer> chosen = gate_trial(c, inputs).run_on_cpu();
  const Buffer& top_count = chosen[3];
  const Type real = real_of(c.dtype);
  const Buffer expert = Buffer::of(Type::I32, chosen[1].count(), c.aligned, [&](int64_t i) {
    return c.made_up_experts && random.chance(0.2) ? double(random.below(3 * c.experts) - c.experts) : chosen[1].get(i);
  });
  const auto normals = [&](int64_t count) {
    return Buffer::of(real, count, c.aligned, [&](int64_t) { return random.normal(); });
  };
  // Of some padding only: padding without one gets no gradient at all.
  const Buffer grad_weight = Buffer::of(real, expert.count(), c.aligned, [&](int64_t i) {
    const int64_t token = i / c.top_n;
    return c.mask && inputs.mask.get(token) == 0 && token % 2 == 0 ? 0 : random.normal();
  });
  const Buffer grad_importance = normals(c.groups * c.experts), grad_balance = normals(1), grad_z = normals(1);

  GateBackward a = inputs.args<GateBackward>(c);
  a.grad_weight = c.gradients & kWeight ? grad_weight.data() : nullptr;
  a.grad_importance = c.gradients & kImportance ? grad_importance.data() : nullptr;
  a.grad_balance_loss = c.gradients & kBalance ? grad_balance.data() : nullptr;
  a.grad_router_z_loss = c.gradients & kZ ? grad_z.data() : nullptr;
  a.expert = expert.as<const int32_t>();
  a.top_count = top_count.as<const int32_t>();
  Trial<GateBackward> trial(a, c.aligned);
  trial.output("grad_logits", &GateBackward::grad_logits, type_of(c.dtype), inputs.logits.count(),
               Bound{1, 32, largest_gradient(c, top_count)});
  trial.run(suite, 2);
}

constexpr int64_t kExperts[] = {1, 2, 3, 7, 8, 16, 17, 33, 64, 100, 128, 200, 256, 300, 512, 600};

// Every layout of a row, hard and soft.
void all_layouts(Suite& suite) {
  for (const DType dtype : kDTypes) {
    for (const int64_t experts : kExperts) {
      for (const bool soft : {false, true}) {
        GateCase c{dtype, 1, 5, experts, std::min<int64_t>(experts, 2), soft};
        c.losses = false;
        run_gate(suite, c);
        c.losses = c.mask = true;
        run_backward(suite, c);
      }
    }
  }
}

// And with all else at random.
void all_combinations(Suite& suite) {
  Random random(1);
  for (const DType dtype : kDTypes) {
    for (const int64_t experts : kExperts) {
      std::vector<int64_t> ranks = {1, 2, 8, 16, 17, std::min<int64_t>(experts, 33)};
      std::sort(ranks.begin(), ranks.end());
      ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
      for (const int64_t top_n : ranks) {
        if (top_n > experts) continue;
        for (int turn = 0; turn < 2; ++turn) {
          GateCase c{dtype, 1 + random.below(3), 1 + random.below(24), experts, top_n};
          c.soft = turn == 1;
          c.losses = random.chance(0.7);
          c.noise = random.chance(0.4);
          c.mask = random.chance(0.4);
          c.aligned = random.chance(0.6);
          c.logits = Logits(random.below(3));
          c.eps = random.chance(0.2) ? 0.6 : 1e-9;
          c.multiprocessors = random.chance(0.3) ? 1 : 3;
          run_gate(suite, c);
          c.losses = true;
          c.gradients = unsigned(random.below(16));
          c.made_up_experts = random.chance(0.2);
          run_backward(suite, c);
        }
      }
    }
  }
}

// Tiles, groups and blocks: many of each, few, and none.
void all_sizes(Suite& suite) {
  for (const DType dtype : kDTypes) {
    for (const bool mask : {false, true}) {
      GateCase c{dtype, 2, 90, 24, 2};
      c.mask = mask;
      for (const int64_t tokens : {int64_t(0), int64_t(1), int64_t(90)}) {
        for (const int64_t groups : {int64_t(0), int64_t(1), int64_t(70)}) {
          c.tokens = tokens, c.groups = groups;
          run_gate(suite, c);
          run_backward(suite, c);
        }
      }
    }
  }
  GateCase c{DType::F32, 1, 20000, 5, 2};  // many tokens to a thread
  c.multiprocessors = 1;
  run_gate(suite, c);
  run_backward(suite, c);
  c = {DType::BF16, 1, 700, 130, 4};
  c.multiprocessors = 1;
  run_gate(suite, c);
  c = {DType::F64, 1, 700, 40, 3};
  c.multiprocessors = 1;
  run_gate(suite, c);
  run_backward(suite, c);
  c = {DType::F16, 300, 2, 70, 2};
  run_gate(suite, c);
  c.mask = true;
  run_backward(suite, c);
}

void quick(Suite& suite) {
  GateCase c{DType::F32, 2, 150, 40, 2};
  c.mask = c.noise = true;
  c.multiprocessors = 1;
  run_gate(suite, c, true);
  run_backward(suite, c, true);
  c = {DType::BF16, 1, 300, 8, 2};  // many rows to a warp
  c.multiprocessors = 1;
  run_gate(suite, c, true);
  c = {DType::F64, 2, 40, 70, 3};
  run_gate(suite, c, true);
  c.soft = c.mask = true;
  run_backward(suite, c, true);
  c = {DType::F32, 3, 60, 64, 17};  // rows in memory
  c.multiprocessors = 1;
  run_gate(suite, c, true);
  run_backward(suite, c, true);
  c.groups = 70, c.tokens = 2;  // and several tiles to a block
  c.mask = true;
  run_gate(suite, c, true);
  run_backward(suite, c, true);
}

}  // namespace

void gate_cases(Suite& suite) {
  quick(suite);
  all_sizes(suite);
  all_layouts(suite);
  all_combinations(suite);
}

}  // namespace kernels_test
