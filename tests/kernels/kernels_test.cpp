// Compares the CUDA kernels, run on the host in several schedules, with the CPU kernels, and these with plain loops.
// `kernels_test` runs all cases, `kernels_test PATTERN` those whose names contain the pattern, `--quick` a few that together
// reach every barrier of every kernel, and `--cpu` only the comparison of the CPU kernels with plain loops, at the best level
// that the CPU supports. -v prints the name of each case before it runs.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "cuda/simt.cuh"
#include "harness/cases.h"

namespace topn_gating::harness {
namespace {

constexpr DType kDTypes[] = {DType::F32, DType::F64, DType::BF16, DType::F16};
constexpr const char* kPolicies[] = {"random", "threshold", "all", "none"};

// Splits a loop among three threads, however short it is, so that ThreadSanitizer checks the CPU kernels too.
void on_threads(int64_t begin, int64_t end, int64_t /*grain*/, cpu::Body body, void* context) {
  constexpr int64_t threads = 3;
  const auto cut = [&](int64_t thread) { return begin + (end - begin) * thread / threads; };
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < threads; ++thread) {
    if (cut(thread) < cut(thread + 1)) others.emplace_back(body, cut(thread), cut(thread + 1), context);
  }
  if (cut(0) < cut(1)) body(cut(0), cut(1), context);
  for (std::thread& other : others) other.join();
}

struct Schedule {
  const char* name;
  int kind;
  uint64_t seed;
  // Byte with which outputs and workspace are filled. An element that is not written is NaN or -1 in the first schedule, and
  // differs between the schedules.
  int fill;
  int clusters;  // whether the device has them: SimtClusters
};
constexpr Schedule kSchedules[] = {{"fifo", SIMT_FIFO, 0, 0xff, SIMT_NO_CLUSTERS},
                                   {"lifo", SIMT_LIFO, 0, 0x55, SIMT_CLUSTERS},
                                   {"random 1", SIMT_RANDOM, 1, 0xff, SIMT_NO_ROOM_FOR_CLUSTERS},
                                   {"random 2", SIMT_RANDOM, 2, 0x2a, SIMT_CLUSTERS}};

std::string name_of(const Case& c) {
  std::string text = harness::name_of(c.dtype);
  const auto size = [&](const char* letter, int64_t value) { text += letter + std::to_string(value); };
  const auto flag = [&](const char* name, bool value) { text += value ? name : ""; };
  size(" g", c.groups), size(" n", c.tokens), size(" e", c.experts), size(" k", c.top_n), size(" C", c.capacity);
  size(" d", c.dim), size(" mp", c.multiprocessors), text += std::string(" ") + kPolicies[int(c.policy)];
  flag(" soft", c.soft), flag(" noise", c.noise), flag(" mask", c.mask), flag(" no_losses", !c.losses);
  flag(" unaligned", !c.aligned), flag(" ties", c.logits == Logits::Ties), flag(" special", c.logits == Logits::Special);
  if (c.dropless) size(" dropless align", c.align);
  flag(" keys", c.keys), flag(" any_router", c.any_router), flag(" given", c.given);
  flag(" clamped", c.eps > 0.1), flag(" perturbed", c.perturbed), flag(" no_weight", !c.wants_weight);
  size(" gradients ", c.gradients), size(" layouts ", int(c.grad_dispatch)), size("", int(c.grad_combine));
  return text;
}

// Selects cases by the command line, runs them, and counts those that fail.
class Suite {
 public:
  Suite(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
      const std::string argument = argv[i];
      if (argument == "--quick") {
        quick_ = true;
      } else if (argument == "--cpu") {
        cpu_alone_ = true;
      } else if (argument == "-v") {
        verbose_ = true;
      } else {
        pattern_ = argument;
      }
    }
  }

  // Starts a case; returns whether it is selected.
  bool begin(const std::string& name, bool quick) {
    if ((quick_ && !quick) || name.find(pattern_) == std::string::npos) return false;
    name_ = name;
    failed_ = false;
    ++cases_;
    if (verbose_) std::printf("%s\n", name.c_str());
    std::fflush(stdout);  // before a sanitizer may end the process
    return true;
  }

  // Fails the case unless `what` is empty.
  void expect_nothing(const std::string& where, const std::string& what) {
    if (what.empty()) return;
    if (!failed_) ++failures_;
    failed_ = true;
    std::printf("FAILED %s: %s: %s\n", name_.c_str(), where.c_str(), what.c_str());
  }

  // Runs a kernel on the CPU and, as CUDA in every schedule, on the host, and compares the results.
  void run(const char* kernel, const Case& c, bool quick = false) {
    if (!begin(std::string(kernel) + " " + name_of(c), quick)) return;
    simt_set_multiprocessors(c.multiprocessors);
    Call call;
    set_up(kernel, call, c);
    call.visit([&](const auto& args) { run(call, c, args); });
  }

  bool cpu_alone() const { return cpu_alone_; }

  int finish() const {
    std::printf("%d cases on %s, %d failed\n", cases_, cpu::level(), failures_);
    return failures_ == 0 && cases_ > 0 ? 0 : 1;
  }

 private:
  template <class Args>
  void run(Call& call, const Case& c, const Args& args) {
    const Tensors on_cpu = call.attach(host_memory_of, [&] { return cpu::workspace_bytes(args); }, true, 0xff);
    cpu::run(args, on_threads);
    if (c.has_reference()) {
      const Tensors reference = call.run_reference();
      expect_nothing("CPU", call.difference(on_cpu.outputs, reference.outputs, Expected::Reference));
    }
    if constexpr (!kOnCpuAlone<Args>) {
      if (cpu_alone_) return;
      Tensors first;
      for (const Schedule& schedule : kSchedules) {
        simt_set_clusters(schedule.clusters);
        const auto workspace_bytes = [&] { return cuda::workspace_bytes(args); };
        Tensors got = call.attach(host_memory_of, workspace_bytes, c.aligned, schedule.fill);
        simt_reset();
        simt_set_schedule(schedule.kind, schedule.seed);
        const cudaError_t error = cuda::run(args, nullptr);
        if (simt_launches() > most_launches(args)) expect_nothing(schedule.name, std::to_string(simt_launches()) + " launches");
        if (error != cudaSuccess) {
          return expect_nothing(schedule.name, std::string(cudaGetErrorString(error)) + ": " + simt_error());
        }
        if (&schedule == kSchedules) {
          expect_nothing(schedule.name, call.difference(got.outputs, on_cpu.outputs, Expected::OtherBackend));
          first = std::move(got);
        } else {
          expect_nothing(schedule.name, call.difference_in_bits(got.outputs, first.outputs));
        }
      }
    }
  }

  // Return the most launches that a call of the kernel may need.
  static int64_t most_launches(const Gate& a) { return a.statistics != nullptr ? 2 : 1; }
  static int64_t most_launches(const GateBackward& a) {
    const bool of_losses = a.grad_importance != nullptr || a.grad_balance_loss != nullptr || a.grad_router_z_loss != nullptr;
    return a.token_mask != nullptr && of_losses ? 2 : 1;
  }
  template <class Args>
  static int64_t most_launches(const Args&) {
    return 1;
  }

  std::string pattern_, name_;
  bool quick_ = false, cpu_alone_ = false, verbose_ = false;
  int cases_ = 0, failures_ = 0;
  bool failed_ = false;  // whether the case that runs has failed
};

void run_gates(Suite& suite, Case c, bool quick = false) {
  suite.run("gate", c, quick);
  c.losses = true;
  suite.run("gate_backward", c, quick);
}

constexpr int64_t kExperts[] = {1, 2, 3, 7, 8, 16, 17, 33, 64, 100, 128, 200, 256, 300, 512, 600};

// Runs gate for every row layout, with the hard and the soft top-n, then with all other options at random.
void gate_layouts(Suite& suite) {
  Random random(1);
  for (const DType dtype : kDTypes) {
    for (const int64_t experts : kExperts) {
      for (const bool soft : {false, true}) {
        Case c{dtype, 1, 5, experts, std::min<int64_t>(experts, 2)};
        c.soft = soft;
        c.losses = false;
        suite.run("gate", c);
        c.losses = c.mask = true;
        suite.run("gate_backward", c);
      }
      std::vector<int64_t> ranks = {1, 2, 8, 16, 17, std::min<int64_t>(experts, 33)};
      std::sort(ranks.begin(), ranks.end());
      ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
      for (const int64_t top_n : ranks) {
        for (int turn = 0; turn < 2 && top_n <= experts; ++turn) {
          Case c{dtype, 1 + random.below(3), 1 + random.below(24), experts, top_n};
          c.soft = turn == 1;
          c.losses = random.chance(0.7);
          c.noise = random.chance(0.4);
          c.mask = random.chance(0.4);
          c.aligned = random.chance(0.6);
          c.logits = Logits(random.below(3));
          c.eps = random.chance(0.2) ? 0.6 : 1e-9;
          c.multiprocessors = random.chance(0.3) ? 1 : 3;
          suite.run("gate", c);
          c.losses = true;
          c.gradients = unsigned(random.below(16));
          c.perturbed = random.chance(0.2);
          suite.run("gate_backward", c);
        }
      }
    }
  }
}

// Runs gate with many, few and no groups, tokens and tiles.
void gate_sizes(Suite& suite) {
  for (const DType dtype : kDTypes) {
    for (const bool mask : {false, true}) {
      for (const int64_t tokens : {0, 1, 90}) {
        for (const int64_t groups : {0, 1, 70}) {
          Case c{dtype, groups, tokens, 24, 2};
          c.mask = mask;
          run_gates(suite, c);
        }
      }
    }
  }
  for (Case c : {Case{DType::F32, 1, 20000, 5, 2} /* many tokens to a thread */, Case{DType::BF16, 1, 700, 130, 4},
                 Case{DType::F64, 1, 700, 40, 3}, Case{DType::F16, 300, 2, 70, 2}}) {
    c.multiprocessors = c.groups == 1 ? 1 : 3;
    suite.run("gate", c);
    c.mask = c.groups > 1;
    suite.run("gate_backward", c);
  }
}

// Runs gate for any router, in every row layout. The entropy of one expert is rounding alone.
void any_router(Suite& suite) {
  for (const DType dtype : kDTypes) {
    for (const int64_t experts : kExperts) {
      for (const bool soft : {false, true}) {
        if (experts == 1) continue;
        Case c{dtype, 2, 22, experts, std::min<int64_t>(experts, 3)};
        c.soft = soft;
        c.any_router = c.mask = true;
        run_gates(suite, c);
        c.tokens = 23;
        if (!soft) run_gates(suite, c);
        c.noise = c.given = true;
        run_gates(suite, c);
      }
    }
  }
}

void quick_gates(Suite& suite) {
  Case c{DType::F32, 2, 150, 40, 2};
  c.mask = c.noise = true;
  c.multiprocessors = 1;
  run_gates(suite, c, true);
  c = {DType::BF16, 1, 300, 8, 2};  // several rows to a warp
  c.multiprocessors = 1;
  suite.run("gate", c, true);
  c = {DType::F64, 2, 40, 70, 3};
  suite.run("gate", c, true);
  c.soft = c.mask = true;
  suite.run("gate_backward", c, true);
  c = {DType::F32, 3, 60, 64, 17};  // so many ranks that rows are kept in memory, not in registers
  c.multiprocessors = 1;
  run_gates(suite, c, true);
  c = {DType::F32, 1, 150, 64, 8};  // a thread for each rank
  c.multiprocessors = 1;
  suite.run("gate_backward", c, true);
  c.perturbed = true;
  suite.run("gate_backward", c, true);
  c = {DType::F32, 1, 61, 64, 4};
  c.any_router = true;
  c.losses = false;
  suite.run("gate", c, true);
  c = {DType::F32, 2, 90, 48, 3};
  c.any_router = c.mask = true;
  run_gates(suite, c, true);
  c.experts = 300;  // rows in memory
  run_gates(suite, c, true);
  c = {DType::F32, 3, 60, 64, 17};
  c.groups = 70, c.tokens = 2;  // several tiles to a block
  c.mask = true;
  run_gates(suite, c, true);
}

// Runs the kernels that have no barriers but wait for the stream.
void quick_waits(Suite& suite) {
  Case gate{DType::F64, 1, 20, 40, 2};
  gate.losses = false;
  suite.run("gate", gate, true);
  for (const int64_t top_n : {3, 33}) {  // 33: a token's pairs do not fit a warp
    const Case c{DType::F32, 1, 40, 50, top_n, 5, 8};
    for (const char* kernel : {"assign_backward", "dense", "dense_backward", "dispatch", "dispatch_backward", "combine",
                               "combine_backward"}) {
      suite.run(kernel, c, true);
    }
  }
}

Case assign_case(int64_t groups, int64_t tokens, int64_t experts, int64_t top_n, int64_t capacity, int multiprocessors = 3,
                 bool mask = false, bool perturbed = false) {
  Case c{DType::F32, groups, tokens, experts, top_n, capacity};
  c.multiprocessors = multiprocessors;
  c.mask = mask;
  c.perturbed = perturbed;
  c.aligned = false;
  return c;
}

// Returns the case with all tokens in one group, in the dropless layout.
Case dropless(Case c, int64_t align) {
  c.tokens *= std::exchange(c.groups, 1);
  c.dropless = true;
  c.align = align;
  return c;
}

void assign_cases(Suite& suite) {
  for (Case c : {assign_case(1, 520, 6, 8, 90, 3, true), assign_case(1, 40, 5, 3, 20), assign_case(2, 3, 600, 60, 2)}) {
    c.policy = Policy::Threshold;
    suite.run("assign", c, true);
    c.keys = true;
    suite.run("assign", c, true);
    c = dropless(c, 5);
    suite.run("assign", c, true);
    c.experts = 70;  // more than a warp has lanes
    suite.run("assign", c, true);
  }
  const Case cases[] = {
      assign_case(1, 1, 1, 1, 1),
      assign_case(1, 10, 8, 2, 3),
      assign_case(2, 31, 5, 3, 4, 3, true, true),
      assign_case(3, 100, 16, 2, 9),
      assign_case(1, 2100, 7, 2, 1, 8, true),  // several tiles of a group, the last of them shorter
      assign_case(1, 600, 64, 8, 200, 8, false, true),
      assign_case(2, 530, 33, 5, 40, 8, true),
      assign_case(1, 1500, 4, 2, 700, 3),         // a tile of several rounds
      assign_case(1, 130, 300, 9, 5, 3, true),    // more ranks than a block has warps
      assign_case(1, 130, 2600, 2, 3, 3, true),   // counters that leave shared memory for fewer teams
      assign_case(20, 40, 8, 2, 12, 3, true),     // more groups than processors
      assign_case(70, 1, 3, 3, 2),
      assign_case(1, 40, 100, 33, 3, 8),
      assign_case(2, 8, 600, 60, 2, 3, true, true),  // counters in memory
      assign_case(2, 0, 5, 2, 3),
      assign_case(0, 5, 5, 2, 3),
  };
  for (Case c : cases) {
    for (int policy = 0; policy < 4; ++policy) {
      for (const DType dtype : {DType::F32, DType::F64}) {
        c.policy = Policy(policy);
        c.dtype = dtype;
        c.keys = false;
        suite.run("assign", c);
        c.keys = true;
        suite.run("assign", c);
      }
    }
    for (const int64_t align : {1, 2, 16}) suite.run("assign", dropless(c, align));
  }
  for (Case c : {assign_case(1, 520, 600, 64, 2, 3, false, true),  // counters in memory and several tiles
                 assign_case(1, 16000, 6800, 2, 2, 2, true),       // experts of pairs in memory and several tiles
                 assign_case(1, 4200, 50, 8, 300, 40)}) {          // more than 32 tiles
    c.dtype = DType::F64;
    suite.run("assign", c);
    c.keys = true;
    suite.run("assign", c);
    suite.run("assign", dropless(c, 3));
  }
  for (const int64_t pairs : {0, 1, 1000, 20000}) {
    for (const DType dtype : {DType::F32, DType::F64}) {
      Case c = assign_case(1, pairs, 1, 1, 1);
      c.dtype = dtype;
      suite.run("assign_backward", c);
    }
  }
}

void dense_cases(Suite& suite, Case c) {
  suite.run("dense", c);
  for (int layout = 0; layout < 4; ++layout) {
    c.grad_dispatch = Layout(layout), c.grad_combine = Layout((layout + 1) % 4);
    suite.run("dense_backward", c);
  }
  c.grad_dispatch = c.grad_combine = Layout::Absent;
  suite.run("dense_backward", c);
}

void row_cases(Suite& suite, Case c) {
  for (const char* kernel : {"dispatch", "dispatch_backward", "combine", "combine_backward"}) suite.run(kernel, c);
  c.wants_weight = false;
  suite.run("dispatch_backward", c);
}

// Runs the kernels that read slots: dense, dispatch and combine, and their gradients.
void slot_cases(Suite& suite) {
  constexpr RoutingSizes kSizes[] = {{1, 1, 1, 1},   {2, 9, 3, 2},    {1, 40, 5, 3},  {3, 17, 8, 2}, {1, 6, 64, 33},
                                     {1, 5, 50, 40}, {2, 12, 16, 16}, {1, 7, 600, 5}, {2, 0, 4, 2},  {0, 3, 4, 2}};
  constexpr int64_t kCapacities[] = {1, 1, 30, 5, 2, 3, 4, 1, 2, 2};
  // So many rows to a multiprocessor that each warp handles several at once.
  constexpr RoutingSizes kManyRows[] = {{2, 300, 16, 2}, {1, 300, 12, 12}, {1, 70, 64, 32}, {1, 40, 50, 40}};
  constexpr int64_t kManyCapacities[] = {50, 40, 8, 30};
  Random random(11);
  const auto slot_case = [&](DType dtype, const RoutingSizes& s, int64_t capacity, int64_t dim, double aligned,
                             double perturbed) {
    Case c{dtype, s.groups, s.tokens, s.experts, s.top_n, capacity, dim};
    c.aligned = random.chance(aligned);
    c.perturbed = random.chance(perturbed);
    return c;
  };
  for (const DType dtype : kDTypes) {
    for (size_t i = 0; i < std::size(kSizes); ++i) {
      for (const int aligned : {0, 1}) dense_cases(suite, slot_case(dtype, kSizes[i], kCapacities[i], 1, aligned, 0.5));
      for (const int64_t dim : {0, 1, 3, 8, 64, 130, 1024}) {
        row_cases(suite, slot_case(dtype, kSizes[i], kCapacities[i], dim, 0.7, 0.4));
      }
      for (const int64_t dim : {1, 8, 130}) {
        row_cases(suite, dropless(slot_case(dtype, kSizes[i], kCapacities[i], dim, 0.7, 0.4), int64_t(1) << i));
      }
    }
    for (size_t i = 0; i < std::size(kManyRows); ++i) {
      for (const int aligned : {0, 1}) {
        Case c = slot_case(dtype, kManyRows[i], kManyCapacities[i], 8, aligned, 0.5);
        c.multiprocessors = 1;
        row_cases(suite, c);
        row_cases(suite, dropless(c, 1));
      }
    }
  }
  dense_cases(suite, {DType::F32, 1, 300, 25, 2, 600});  // larger than the L2 cache
}

// Runs the CPU's matrix products.
void linear_cases(Suite& suite) {
  for (const DType dtype : kDTypes) {
    for (const int64_t experts : {1, 5, 64}) {
      for (const int64_t dim : {1, 37, 130}) {
        for (const char* kernel : {"linear", "linear_backward"}) suite.run(kernel, {dtype, 2, 31, experts, 1, 1, dim});
      }
    }
  }
}

// Runs the products of groups of rows, with every number of rows that is multiplied at once, and of several tiles and blocks.
void grouped_cases(Suite& suite) {
  const auto run = [&](const Case& c) {
    suite.run("grouped_outer", c);
    suite.run("grouped_sum", c);
    for (const Layout weight : {Layout::Contiguous, Layout::Transposed}) {
      Case linear = c;
      linear.weight = weight;
      linear.bias = c.tokens % 2 == 0;
      suite.run("grouped_linear", linear);
    }
  };
  for (const DType dtype : kDTypes) {
    for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 20, 32, 33, 80}) {
      for (const auto& [in, out] : {std::pair{1, 1}, {7, 50}, {64, 33}, {130, 96}}) run({dtype, 1, rows, 3, 1, out, in});
    }
    for (const int64_t rows : {9, 70}) {
      for (const auto& [in, out] : {std::pair{130, 1100}, {1100, 70}}) run({dtype, 1, rows, 3, 1, out, in});
    }
    run({dtype, 1, 600, 2, 1, 40, 300});
  }
}

// Compares cuda::quotient with integer division, for numerators of every size that are multiples of the divisor, one less, and
// others.
void quotient_cases(Suite& suite) {
  if (!suite.begin("dispatch quotient", false)) return;
  Random random(11);
  for (int i = 0; i < 200000; ++i) {
    const int64_t b = 1 + random.below(int64_t(1) << (1 + i % 40)), q = random.below(1 + (int64_t(1) << 50) / b);
    for (const int64_t a : {q * b, q * b + b - 1, q * b + random.below(b)}) {
      if (cuda::quotient(a, b) != a / b) suite.expect_nothing(std::to_string(a), "wrong for / " + std::to_string(b));
    }
  }
}

}  // namespace
}  // namespace topn_gating::harness

int main(int argc, char** argv) {
  using namespace topn_gating::harness;
  Suite suite(argc, argv);
  // The baseline level fuses as few multiplications and additions as the CUDA kernels on the host, so that the two differ only in
  // the order of sums.
  if (!suite.cpu_alone()) setenv("TOPN_GATING_CPU_LEVEL", "baseline", 1);
  quick_gates(suite);
  quick_waits(suite);
  any_router(suite);
  gate_sizes(suite);
  gate_layouts(suite);
  assign_cases(suite);
  slot_cases(suite);
  quotient_cases(suite);
  linear_cases(suite);
  grouped_cases(suite);
  return suite.finish();
}
