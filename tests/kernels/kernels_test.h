// What the tests of the CUDA kernels on the host have in common: bounds, and a trial, which runs a kernel on the
// same input as the CPU's and compares.
#pragma once

#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "buffer.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "router.h"

namespace kernels_test {

using namespace topn_gating;
using namespace topn_gating::host;

constexpr DType kDTypes[] = {DType::F32, DType::F64, DType::BF16, DType::F16};
const char* name_of(DType);

// How far a result may be from the CPU's: so many units in the last place of its type, and so many roundings of Real relative
// to the largest of the tensor, or to `terms` where the sums are of that size and may cancel. 0: the same bits.
struct Bound {
  double ulps = 0, roundings = 0, terms = 0;
};

// What runs, and what failed.
class Suite {
 public:
  Suite(int argc, char** argv);
  // Whether the case runs. `quick` ones together reach every barrier of every kernel.
  bool begin(const std::string& name, bool quick = false);
  void fail(const std::string& what);
  int finish() const;

 private:
  std::string pattern_, name_;
  bool quick_ = false, verbose_ = false;
  int cases_ = 0, failures_ = 0;
  bool failed_ = false;  // the case
};

struct Schedule {
  const char* name;
  int kind;
  uint64_t seed;
  int fill;  // of outputs and workspace before: what was not written differs, and is NaN or -1 in the first
};
constexpr Schedule kSchedules[] = {{"fifo", SIMT_FIFO, 0, 0xff},
                                   {"lifo", SIMT_LIFO, 0, 0x55},
                                   {"random 1", SIMT_RANDOM, 1, 0xff},
                                   {"random 2", SIMT_RANDOM, 2, 0x2a}};

// The CPU kernels' parallel loops on three threads, however short: so that ThreadSanitizer sees them too.
void on_threads(int64_t begin, int64_t end, int64_t grain, cpu::Body body, void* context);
// Calls fail() where `got` is not within the bound of `expected`.
void compare(Suite& suite, const std::string& name, const Buffer& got, const Buffer& expected, Bound bound);

template <class Args, class = void>
constexpr bool kHasWorkspace = false;
template <class Args>
constexpr bool kHasWorkspace<Args, std::void_t<decltype(Args::workspace)>> = true;

template <class Args>
class Trial {
 public:
  // The arguments but for outputs and workspace.
  Trial(const Args& args, bool aligned) : args_(args), aligned_(aligned) {}

  template <class T>
  void output(const char* name, T* Args::*member, Type type, int64_t count, Bound bound = {}) {
    outputs_.push_back({name, type, count, bound, [=](Args& args, void* data) { args.*member = static_cast<T*>(data); }});
  }

  // `launches`: no more of them.
  void run(Suite& suite, long launches) {
    const std::vector<Buffer> expected = run_on_cpu();
    std::vector<Buffer> first;
    for (const Schedule& schedule : kSchedules) {
      std::vector<Buffer> got = run_on_host(suite, schedule, launches);
      if (got.empty()) return;
      for (size_t i = 0; i < got.size(); ++i) {
        const std::string name = std::string(schedule.name) + ": " + outputs_[i].name;
        if (first.empty()) {
          compare(suite, name, got[i], expected[i], outputs_[i].bound);
        } else if (const int64_t at = got[i].first_difference(first[i]); at >= 0) {
          suite.fail(name + "[" + std::to_string(at) + "] = " + std::to_string(got[i].get(at)) + ", in the first schedule " +
                     std::to_string(first[i].get(at)));
        }
      }
      if (first.empty()) first = std::move(got);
    }
  }

  // What the CPU's kernel gives.
  std::vector<Buffer> run_on_cpu() {
    std::vector<Buffer> results = make_outputs(true, 0xff);
    Buffer workspace(Type::Bool, 0);
    if constexpr (kHasWorkspace<Args>) {
      workspace = Buffer(Type::Bool, cpu::workspace_bytes(args_));
      args_.workspace = workspace.data();
    }
    cpu::run(args_, on_threads);
    return results;
  }

 private:
  struct Output {
    const char* name;
    Type type;
    int64_t count;
    Bound bound;
    std::function<void(Args&, void*)> set;
  };

  std::vector<Buffer> make_outputs(bool aligned, int fill) {
    std::vector<Buffer> made;
    for (const Output& output : outputs_) {
      made.emplace_back(output.type, output.count, aligned, fill);
      output.set(args_, made.back().data());
    }
    return made;
  }

  std::vector<Buffer> run_on_host(Suite& suite, const Schedule& schedule, long launches) {
    std::vector<Buffer> results = make_outputs(aligned_, schedule.fill);
    Buffer workspace(Type::Bool, 0);
    if constexpr (kHasWorkspace<Args>) {
      workspace = Buffer(Type::Bool, cuda::workspace_bytes(args_), true, schedule.fill);
      args_.workspace = workspace.data();
    }
    simt_reset();
    simt_set_schedule(schedule.kind, schedule.seed);
    const cudaError_t error = cuda::run(args_, nullptr);
    if (simt_launches() > launches) suite.fail(std::to_string(simt_launches()) + " launches");
    if (error == cudaSuccess) return results;
    suite.fail(std::string(schedule.name) + ": " + cudaGetErrorString(error) + ": " + simt_error());
    return {};
  }

  Args args_;
  bool aligned_;
  std::vector<Output> outputs_;
};

void gate_cases(Suite&);
void assign_cases(Suite&);
void slot_cases(Suite&);

}  // namespace kernels_test
