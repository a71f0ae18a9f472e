// Cases of assign and its gradient.
#include "kernels_test.h"

namespace kernels_test {
namespace {

struct AssignCase {
  int64_t groups, tokens, experts, top_n, capacity;
  int multiprocessors = 3;
  bool mask = false, made_up_experts = false;

  std::string name() const {
    std::string text = "g" + std::to_string(groups) + " n" + std::to_string(tokens) + " e" + std::to_string(experts) + " k" +
                       std::to_string(top_n) + " C" + std::to_string(capacity) + " mp" + std::to_string(multiprocessors);
    return text + (mask ? " mask" : "") + (made_up_experts ? " made_up" : "");
  }
};

constexpr Policy kPolicies[] = {Policy::Random, Policy::Threshold, Policy::All, Policy::None};
constexpr const char* kPolicyNames[] = {"random", "threshold", "all", "none"};

void run_assign(Suite& suite, const AssignCase& c, Policy policy, bool is_double, bool quick = false) {
  const std::string name = std::string("assign ") + (is_double ? "f64 " : "f32 ") + kPolicyNames[int(policy)] + " " + c.name();
  if (!suite.begin(name, quick)) return;
  simt_set_multiprocessors(c.multiprocessors);
  Random random(uint64_t(c.tokens * 1000 + c.experts));
  const Type real = is_double ? Type::F64 : Type::F32;
  const int64_t tokens = c.groups * c.tokens, pairs = tokens * c.top_n;
  const auto uniforms = [&](int64_t count) {
    return Buffer::of(real, count, false, [&](int64_t) { return random.uniform(); });
  };
  const Buffer weight = uniforms(pairs), draws = uniforms(pairs);
  const Buffer threshold = Buffer::of(real, c.top_n, false, [&](int64_t k) { return k % 5 == 4 ? 0 : 0.6 * random.uniform(); });
  const Buffer mask = Buffer::of(Type::Bool, tokens, true, [&](int64_t) { return random.chance(0.8); });
  // Half of the pairs want one of three experts.
  const Buffer expert = Buffer::of(Type::I32, pairs, false, [&](int64_t) {
    if (c.made_up_experts && random.chance(0.1)) return random.chance(0.5) ? -1.0 : 2147483647.0;
    if (c.made_up_experts && random.chance(0.1)) return double(c.experts);
    return double(random.below(random.chance(0.5) && c.experts > 3 ? 3 : c.experts));
  });

  Assign a{};
  a.is_double = is_double;
  a.groups = c.groups, a.tokens = c.tokens, a.experts = c.experts, a.top_n = c.top_n, a.capacity = c.capacity;
  a.policy = policy;
  a.eps = 1e-9;
  a.weight = weight.data();
  a.expert = expert.as<const int32_t>();
  a.draws = policy == Policy::Random ? draws.data() : nullptr;
  a.threshold = policy == Policy::Random || policy == Policy::Threshold ? threshold.data() : nullptr;
  a.token_mask = c.mask ? mask.as<const bool>() : nullptr;
  Trial<Assign> trial(a, false);
  trial.output("kept", &Assign::kept, real, pairs);
  trial.output("slot", &Assign::slot, Type::I32, pairs);
  trial.output("source", &Assign::source, Type::I32, c.groups * c.experts * c.capacity);
  trial.output("demand", &Assign::demand, Type::I32, c.groups * c.experts);
  trial.run(suite, 1);
}

void run_backward(Suite& suite, int64_t pairs, bool is_double) {
  if (!suite.begin(std::string("assign_backward ") + (is_double ? "f64 " : "f32 ") + std::to_string(pairs))) return;
  Random random(3);
  const Type real = is_double ? Type::F64 : Type::F32;
  const Buffer grad_kept = Buffer::of(real, pairs, false, [&](int64_t) { return random.normal(); });
  const Buffer slot = Buffer::of(Type::I32, pairs, false, [&](int64_t) { return double(random.below(6) - 2); });
  Trial<AssignBackward> trial({is_double, pairs, grad_kept.data(), slot.as<const int32_t>(), nullptr}, false);
  trial.output("grad_weight", &AssignBackward::grad_weight, real, pairs);
  trial.run(suite, 1);
}

constexpr AssignCase kCases[] = {
    {1, 1, 1, 1, 1},
    {1, 10, 8, 2, 3},
    {2, 31, 5, 3, 4, 3, true, true},
    {3, 100, 16, 2, 9},
    {1, 400, 7, 2, 1, 8, true},              // several tiles of a group
    {1, 400, 64, 8, 200, 8, false, true},
    {2, 300, 33, 5, 40, 8, true},
    {1, 1500, 4, 2, 700, 3},                 // several rounds of a run
    {1, 130, 600, 40, 5, 3, true},           // fewer warps, for the counters
    {20, 40, 8, 2, 12, 3, true},             // more groups than processors
    {70, 1, 3, 3, 2},
    {1, 40, 100, 33, 3, 8},
    {2, 8, 600, 60, 2, 3, true, true},       // counters in memory
    {2, 0, 5, 2, 3},
    {0, 5, 5, 2, 3},
};
constexpr AssignCase kSlow[] = {
    {1, 40, 600, 64, 2, 8, false, true},     // counters in memory and several tiles
    {1, 60, 500, 40, 30, 40},                // more than 32 tiles
};
constexpr AssignCase kQuick[] = {{1, 300, 6, 2, 90, 3, true}, {1, 40, 5, 3, 20}, {2, 3, 600, 60, 2}};

}  // namespace

void assign_cases(Suite& suite) {
  for (const AssignCase& c : kQuick) run_assign(suite, c, Policy::Threshold, false, true);
  for (const AssignCase& c : kCases) {
    for (const Policy policy : kPolicies) {
      for (const bool is_double : {false, true}) run_assign(suite, c, policy, is_double);
    }
  }
  for (const AssignCase& c : kSlow) run_assign(suite, c, Policy::Random, true);
  for (const int64_t pairs : {0, 1, 1000, 20000}) {
    for (const bool is_double : {false, true}) run_backward(suite, pairs, is_double);
  }
}

}  // namespace kernels_test
