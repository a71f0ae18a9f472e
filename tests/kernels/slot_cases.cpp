// Cases of what reads slots: dense, dispatch and combine, and their gradients.
#include <cmath>

#include "cuda/simt.cuh"
#include "kernels_test.h"

namespace kernels_test {
namespace {

struct Sizes {
  int64_t groups, tokens, experts, top_n, capacity;

  std::string name() const {
    return "g" + std::to_string(groups) + " n" + std::to_string(tokens) + " e" + std::to_string(experts) + " k" +
           std::to_string(top_n) + " C" + std::to_string(capacity);
  }
};

// What `assign` gives for random weights and experts or, tampered with, something near it.
struct Slots {
  Buffer expert, slot, source;
  Assignment args;

  Slots(const Sizes& s, bool tampered, Random& random)
      : expert(Buffer::of(Type::I32, s.groups * s.tokens * s.top_n, false,
                          [&](int64_t) { return double(random.below(s.experts)); })),
        slot(Type::I32, expert.count(), false), source(Type::I32, s.groups * s.experts * s.capacity, false) {
    assign(s, random);
    if (tampered) {
      for (int64_t i = 0; i < expert.count(); ++i) {
        if (random.chance(0.1)) expert.set(i, double(random.below(s.experts + 2) - 1));
        if (random.chance(0.1)) slot.set(i, double(random.below(s.capacity + 4) - 3));
      }
      for (int64_t i = 0; i < source.count(); ++i) {
        if (random.chance(0.1)) source.set(i, double(random.below(s.tokens * s.top_n + 4) - 2));
        if (random.chance(0.05)) source.set(i, random.chance(0.5) ? 2147483647.0 : -2147483648.0);
      }
    }
    args = {{s.groups, s.tokens, s.experts, s.top_n}, s.capacity, expert.as<int32_t>(), slot.as<int32_t>(), source.as<int32_t>()};
  }

 private:
  void assign(const Sizes& s, Random& random) const {
    const auto uniforms = [&](int64_t) { return random.uniform(); };
    const Buffer weight = Buffer::of(Type::F32, expert.count(), true, uniforms);
    const Buffer threshold = Buffer::of(Type::F32, s.top_n, true, [](int64_t) { return 0.3; });
    const Buffer kept(Type::F32, expert.count()), demand(Type::I32, s.groups * s.experts);
    Assign a{};
    a.groups = s.groups, a.tokens = s.tokens, a.experts = s.experts, a.top_n = s.top_n, a.capacity = s.capacity;
    a.policy = Policy::Threshold;
    a.weight = weight.data();
    a.threshold = threshold.data();
    a.expert = expert.as<const int32_t>();
    a.kept = kept.data();
    a.slot = slot.as<int32_t>();
    a.source = source.as<int32_t>();
    a.demand = demand.as<int32_t>();
    const Buffer workspace(Type::Bool, cpu::workspace_bytes(a));
    a.workspace = workspace.data();
    cpu::run(a, on_threads);
  }
};

struct SlotCase {
  Sizes sizes;
  DType dtype;
  bool aligned, tampered;
  int64_t dim;
  int multiprocessors;
  Random random{7};
  Slots slots{sizes, tampered, random};

  std::string name() const {
    std::string text = std::string(name_of(dtype)) + " " + sizes.name();
    if (dim >= 0) text += " d" + std::to_string(dim);
    return text + " mp" + std::to_string(multiprocessors) + (aligned ? "" : " unaligned") + (tampered ? " tampered" : "");
  }
  Type type() const { return type_of(dtype); }
  Type real() const { return real_of(dtype); }
  int64_t tokens() const { return sizes.groups * sizes.tokens; }
  int64_t pairs() const { return tokens() * sizes.top_n; }
  int64_t num_slots() const { return sizes.groups * sizes.experts * sizes.capacity; }
  Buffer normals(Type of, int64_t count) {
    return Buffer::of(of, count, aligned, [&](int64_t) { return random.normal(); });
  }
  bool begin(Suite& suite, const char* kernel) const {
    if (!suite.begin(kernel + (" " + name()))) return false;
    simt_set_multiprocessors(multiprocessors);
    return true;
  }
};

void run_dense(Suite& suite, SlotCase& c) {
  if (!c.begin(suite, "dense")) return;
  const Buffer weight = c.normals(c.real(), c.pairs());
  Assignment without_source = c.slots.args;
  without_source.source = nullptr;
  Trial<Dense> trial({c.dtype, without_source, weight.data(), nullptr, nullptr}, c.aligned);
  const int64_t size = c.tokens() * c.sizes.experts * c.sizes.capacity;
  trial.output("dispatch", &Dense::dispatch, c.type(), size);
  trial.output("combine", &Dense::combine, c.type(), size);
  trial.run(suite, 1);
}

enum class Layout { Absent, Contiguous, Transposed, Expanded };

// A tensor (g, n, e, C): its elements and strides.
Buffer strided(SlotCase& c, Layout layout, int64_t* strides) {
  const int64_t n = c.sizes.tokens, e = c.sizes.experts, slots = c.sizes.capacity;
  if (layout == Layout::Absent) return Buffer(c.type(), 0);
  const auto set = [&](int64_t group, int64_t token, int64_t expert, int64_t slot) {
    strides[0] = group, strides[1] = token, strides[2] = expert, strides[3] = slot;
  };
  if (layout == Layout::Expanded) {  // the gradient of a sum
    set(0, 0, 0, 0);
    return c.normals(c.type(), 1);
  }
  if (layout == Layout::Contiguous) set(n * e * slots, e * slots, slots, 1);
  if (layout == Layout::Transposed) set(n * e * slots, 1, slots * n, n);
  return c.normals(c.type(), c.tokens() * e * slots);
}

void run_dense_backward(Suite& suite, SlotCase& c, Layout of_dispatch, Layout of_combine) {
  const std::string name = "dense_backward layouts " + std::to_string(int(of_dispatch)) + std::to_string(int(of_combine));
  if (!c.begin(suite, name.c_str())) return;
  DenseBackward a{};
  a.dtype = c.dtype;
  a.assignment = c.slots.args;
  a.assignment.source = nullptr;
  const Buffer grad_dispatch = strided(c, of_dispatch, a.dispatch_strides);
  const Buffer grad_combine = strided(c, of_combine, a.combine_strides);
  a.grad_dispatch = of_dispatch == Layout::Absent ? nullptr : grad_dispatch.data();
  a.grad_combine = of_combine == Layout::Absent ? nullptr : grad_combine.data();
  Trial<DenseBackward> trial(a, c.aligned);
  trial.output("grad_weight", &DenseBackward::grad_weight, c.real(), c.pairs());
  trial.run(suite, 1);
}

// Sums of `terms` products of normal numbers.
Bound sum_of(int64_t terms) { return {1, 8, std::sqrt(double(terms))}; }

void run_dispatch(Suite& suite, SlotCase& c) {
  if (!c.begin(suite, "dispatch")) return;
  const Buffer x = c.normals(c.type(), c.tokens() * c.dim);
  Trial<Dispatch> trial({{c.dtype, c.slots.args, c.dim}, x.data(), nullptr}, c.aligned);
  trial.output("y", &Dispatch::y, c.type(), c.num_slots() * c.dim);
  trial.run(suite, 1);
}

void run_dispatch_backward(Suite& suite, SlotCase& c, bool of_weight) {
  if (!c.begin(suite, of_weight ? "dispatch_backward with x" : "dispatch_backward")) return;
  const Buffer grad_y = c.normals(c.type(), c.num_slots() * c.dim), x = c.normals(c.type(), c.tokens() * c.dim);
  Trial<DispatchBackward> trial({{c.dtype, c.slots.args, c.dim}, grad_y.data(), of_weight ? x.data() : nullptr, nullptr, nullptr},
                                c.aligned);
  trial.output("grad_x", &DispatchBackward::grad_x, c.type(), c.tokens() * c.dim, sum_of(c.sizes.top_n));
  if (of_weight) trial.output("grad_weight", &DispatchBackward::grad_weight, c.real(), c.pairs(), sum_of(c.dim));
  trial.run(suite, 1);
}

void run_combine(Suite& suite, SlotCase& c) {
  if (!c.begin(suite, "combine")) return;
  const Buffer y = c.normals(c.type(), c.num_slots() * c.dim), weight = c.normals(c.real(), c.pairs());
  Trial<Combine> trial({{c.dtype, c.slots.args, c.dim}, y.data(), weight.data(), nullptr}, c.aligned);
  trial.output("out", &Combine::out, c.type(), c.tokens() * c.dim, sum_of(c.sizes.top_n));
  trial.run(suite, 1);
}

void run_combine_backward(Suite& suite, SlotCase& c) {
  if (!c.begin(suite, "combine_backward")) return;
  const Buffer grad_out = c.normals(c.type(), c.tokens() * c.dim), y = c.normals(c.type(), c.num_slots() * c.dim);
  const Buffer weight = c.normals(c.real(), c.pairs());
  Trial<CombineBackward> trial({{c.dtype, c.slots.args, c.dim}, grad_out.data(), y.data(), weight.data(), nullptr, nullptr},
                               c.aligned);
  trial.output("grad_y", &CombineBackward::grad_y, c.type(), c.num_slots() * c.dim);
  trial.output("grad_weight", &CombineBackward::grad_weight, c.real(), c.pairs(), sum_of(c.dim));
  trial.run(suite, 1);
}

constexpr Sizes kSizes[] = {{1, 1, 1, 1, 1}, {2, 9, 3, 2, 1},  {1, 40, 5, 3, 30},  {3, 17, 8, 2, 5},
                            {1, 6, 64, 33, 2}, {1, 5, 50, 40, 3}, {2, 12, 16, 16, 4}, {1, 7, 600, 5, 1},
                            {2, 0, 4, 2, 2}, {0, 3, 4, 2, 2}};
// Many rows to a processor: a warp takes several at once.
constexpr Sizes kManyRows[] = {{2, 300, 16, 2, 50}, {1, 300, 12, 12, 40}, {1, 70, 64, 32, 8}, {1, 40, 50, 40, 30}};
constexpr int64_t kDims[] = {0, 1, 3, 8, 64, 130, 1024};

void dense_cases(Suite& suite, const Sizes& sizes, DType dtype, bool aligned, bool tampered) {
  SlotCase c{sizes, dtype, aligned, tampered, -1, 3};
  run_dense(suite, c);
  for (int of_dispatch = 0; of_dispatch < 4; ++of_dispatch) {
    run_dense_backward(suite, c, Layout(of_dispatch), Layout((of_dispatch + 1) % 4));
  }
  run_dense_backward(suite, c, Layout::Absent, Layout::Absent);
}

void row_cases(Suite& suite, SlotCase c) {
  run_dispatch(suite, c);
  run_dispatch_backward(suite, c, false);
  run_dispatch_backward(suite, c, true);
  run_combine(suite, c);
  run_combine_backward(suite, c);
}

// Quotients that are whole, and one below and above, of every size.
void quotient_cases(Suite& suite, Random& random) {
  if (!suite.begin("dispatch quotient")) return;
  for (int i = 0; i < 200000; ++i) {
    const int64_t b = 1 + random.below(int64_t(1) << (1 + i % 40)), q = random.below(1 + (int64_t(1) << 50) / b);
    for (const int64_t a : {q * b, q * b + b - 1, q * b + random.below(b)}) {
      if (cuda::quotient(a, b) != a / b) suite.fail(std::to_string(a) + " / " + std::to_string(b));
    }
  }
}

}  // namespace

void slot_cases(Suite& suite) {
  Random random(11);
  quotient_cases(suite, random);
  for (const DType dtype : kDTypes) {
    for (const Sizes& sizes : kSizes) {
      for (const bool aligned : {true, false}) dense_cases(suite, sizes, dtype, aligned, random.chance(0.5));
      for (const int64_t dim : kDims) {
        row_cases(suite, {sizes, dtype, random.chance(0.7), random.chance(0.4), dim, 3});
      }
    }
    for (const Sizes& sizes : kManyRows) {
      for (const bool aligned : {true, false}) row_cases(suite, {sizes, dtype, aligned, random.chance(0.5), 8, 1});
    }
  }
  dense_cases(suite, {1, 300, 25, 2, 600}, DType::F32, true, false);  // past the second-level cache
}

}  // namespace kernels_test
