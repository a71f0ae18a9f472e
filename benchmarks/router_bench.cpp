// Times every kernel, forward and backward, on the CPU and, if CUDA was built and there is a GPU, on the GPU.
//
//   router_bench [--shapes=b,n,d,e,k;...] [--dtypes=float32,...] [--threads=N] [--check_only] and Google Benchmark's own
//   flags (--help), such as --benchmark_filter=gate/cpu --benchmark_format=json
//
// Each kernel's results are first compared with plain loops: on a small shape with as many experts and ranks, also with inputs
// that are likely to reveal errors, and on the inputs that are timed. `bytes` counts the tensors that the kernel must read and
// write; of a tensor that it gathers from, only the rows that it needs. `floor_us` is the time of the fastest copy that reads
// and writes as many bytes on the same threads; a copy that fits into a cache runs at the cache's speed. `of_bandwidth` is that
// time divided by the kernel's. A kernel that mostly reads, or mostly writes, can exceed 1.
//
// Set OMP_WAIT_POLICY=passive: on a machine with few cores, threads that spin at a barrier slow the others down.
#include <benchmark/benchmark.h>
#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <stdexcept>
#include <utility>

#include "device.h"
#include "harness/cases.h"

namespace topn_gating::bench {
namespace {

using harness::Case;
using harness::Expected;
using harness::Inputs;
using harness::Kernel;
using harness::Tensors;
using harness::Type;

struct Shape {
  int64_t groups, tokens, dim, experts, top_n;

  // Returns the slots of an expert for a group, with the module's defaults (docs/spec.md, step 1).
  int64_t capacity() const {
    constexpr double factor = 1.25;
    constexpr int64_t least = 4;
    return std::max(std::min(tokens, int64_t(double(tokens) * factor / double(experts))), least);
  }
  std::string name() const {
    const auto part = [](const char* letter, int64_t size) { return letter + (":" + std::to_string(size)); };
    return part("b", groups) + part("/n", tokens) + part("/d", dim) + part("/e", experts) + part("/k", top_n);
  }
};

struct NamedType {
  const char* name;
  DType dtype;
};
constexpr NamedType kTypes[] = {
    {"float32", DType::F32}, {"bfloat16", DType::BF16}, {"float16", DType::F16}, {"float64", DType::F64}};

struct Options {
  std::vector<Shape> shapes = {
      {1, 1024, 512, 8, 2}, {4, 1024, 512, 16, 2}, {2, 4096, 512, 16, 2}, {8, 2048, 256, 64, 4}, {1, 8192, 512, 64, 8}};
  std::vector<NamedType> types = {kTypes[0], kTypes[1]};
  int threads = omp_get_max_threads();
  bool check_only = false;
};

struct BadOption : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> fields;
  for (size_t begin = 0, end; begin <= text.size(); begin = end + 1) {
    end = std::min(text.find(separator, begin), text.size());
    fields.push_back(text.substr(begin, end - begin));
  }
  return fields;
}

// Returns the number that a text holds, or 0 if it is not an integer from 1 to `most`.
int64_t count_from(const std::string& text, int64_t most) {
  const bool digits = !text.empty() && text.size() <= 10 && text.find_first_not_of("0123456789") == std::string::npos;
  const int64_t value = digits ? std::stoll(text) : 0;
  return value <= most ? value : 0;
}

Shape shape_from(const std::string& text) {
  std::vector<int64_t> sizes;
  for (const std::string& part : split(text, ',')) sizes.push_back(count_from(part, INT32_MAX));
  const bool counts = std::find(sizes.begin(), sizes.end(), 0) == sizes.end();
  if (sizes.size() != 5 || !counts || sizes[4] > sizes[3]) {
    throw BadOption("--shapes must be b,n,d,e,k;..., counts from 1 with k at most e, got '" + text + "'");
  }
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
}

NamedType type_from(const std::string& text) {
  for (const NamedType& type : kTypes) {
    if (text == type.name) return type;
  }
  throw BadOption("--dtypes must be some of float32,bfloat16,float16,float64, got '" + text + "'");
}

// Parses the options that Google Benchmark has not removed.
Options options_from(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = std::min(argument.find('='), argument.size());
    const std::string name = argument.substr(0, equals), value = argument.substr(std::min(equals + 1, argument.size()));
    if (name == "--shapes") {
      options.shapes.clear();
      for (const std::string& part : split(value, ';')) options.shapes.push_back(shape_from(part));
    } else if (name == "--dtypes") {
      options.types.clear();
      for (const std::string& part : split(value, ',')) options.types.push_back(type_from(part));
    } else if (name == "--threads") {
      options.threads = int(count_from(value, 1024));
      if (options.threads == 0) throw BadOption("--threads must be a count from 1 to 1024, got '" + value + "'");
    } else if (argument == "--check_only") {
      options.check_only = true;
    } else {
      throw BadOption("unknown option '" + argument + "': --help names those there are");
    }
  }
  return options;
}

void print_help() {
  std::printf(
      "router_bench [--shapes=b,n,d,e,k;...] [--dtypes=float32,bfloat16,float16,float64] [--threads=N] [--check_only]\n"
      "             [--benchmark_filter=<regex>] [--benchmark_format=<console|json|csv>] [--benchmark_out=<filename>]\n"
      "             [--benchmark_min_time=<seconds>] [--benchmark_repetitions=<count>] [--benchmark_list_tests]\n"
      "             and the other flags of Google Benchmark\n");
}

// Returns the median seconds of the fastest copy that reads and writes `bytes` in all. Each size is measured once.
double seconds_to_copy(Device& device, int64_t bytes) {
  static std::map<std::pair<const Device*, int64_t>, double> known;
  double& best = known[{&device, bytes}];
  if (best > 0) return best;
  constexpr int64_t line = 64;
  constexpr double budget = 0.03;
  const int64_t half = std::max(bytes / 2 / line, int64_t(1)) * line;
  const Buffer from(Type::Bool, half), to(Type::Bool, half);
  const harness::Memory on_device = device.memory_of(from), target = device.memory_of(to);
  best = 1e9;
  for (const std::function<void()>& copy : device.copies(target.get(), on_device.get(), half)) {
    const Stopwatch stopwatch = device.stopwatch(copy);
    stopwatch.seconds();
    std::vector<double> times;
    for (double total = 0; total < budget || times.size() < 5; total += times.back()) times.push_back(stopwatch.seconds());
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    best = std::min(best, times[times.size() / 2] / double(stopwatch.calls));
  }
  best *= double(bytes) / double(2 * half);
  return best;
}

struct Benchmark {
  const Kernel& kernel;
  Device& device;
  NamedType type;
  Shape shape;
  bool dropless = false;  // whether the experts' rows have the dropless layout, in which every pair is routed

  std::string name() const {
    const char* layout = dropless ? "/dropless" : "";
    return std::string(kernel.name) + "/" + device.name() + "/" + type.name + "/" + shape.name() + layout;
  }
  Case on(const Shape& s, Inputs inputs) const {
    Case c{type.dtype, s.groups, s.tokens, s.experts, s.top_n, s.capacity(), s.dim};
    c.inputs = inputs;
    if (dropless) {
      c.tokens *= std::exchange(c.groups, 1);
      c.dropless = true;
      c.policy = Policy::All;
    }
    return c;
  }
};

// Throws if the plain loops' results would exceed the machine's memory: a system that overcommits would kill the process.
void require_memory(int64_t bytes) {
  const int64_t all = int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  if (bytes <= all) return;
  throw std::runtime_error("needs " + std::to_string(bytes >> 30) + " GiB of memory: --benchmark_filter=-dense leaves it out");
}

// A call whose tensors are on a device.
struct Prepared {
  Device& device;
  Call call;
  Tensors tensors;

  // Runs the call once and throws if a result is wrong.
  Prepared(const Benchmark& b, const Case& c) : device(b.device) {
    b.kernel.set_up(call, c);
    require_memory(call.reference_bytes() + call.bytes());
    constexpr int kPattern = 0x55;  // byte whose repetition no result equals
    const Tensors expected = call.run_reference();
    tensors = call.attach([&](const Buffer& buffer) { return device.memory_of(buffer); },
                          [&] { return device.workspace_bytes(call); }, true, kPattern);
    device.run(call);
    device.wait();
    for (size_t i = 0; i < tensors.outputs.size(); ++i) device.read_back(tensors.output_memory[i], tensors.outputs[i]);
    const std::string wrong = call.difference(tensors.outputs, expected.outputs, Expected::Reference);
    if (!wrong.empty()) throw std::runtime_error("on " + std::to_string(c.tokens) + " tokens: " + wrong);
  }
};

// Checks benchmarks, and keeps the last one's call, since Google Benchmark calls a benchmark's function several times.
class Checker {
 public:
  // Returns the call that is to be timed, or null if a result is wrong.
  Prepared* prepare(const Benchmark& b) {
    if (name_ == b.name()) return prepared_.get();
    name_.clear();
    ++checked_;
    const Shape small{2, 501, 37, b.shape.experts, b.shape.top_n};  // not multiples of a tile or a vector
    try {
      for (const Case& c : {b.on(small, Inputs::Timed), b.on(small, Inputs::Hard), b.on(b.shape, Inputs::Timed)}) {
        prepared_.reset();
        prepared_ = std::make_unique<Prepared>(b, c);
      }
      name_ = b.name();
      return prepared_.get();
    } catch (const std::exception& error) {
      ++failures_;
      failure_ = error.what();
      std::fprintf(stderr, "FAILED %s: %s\n", b.name().c_str(), error.what());
      return nullptr;
    }
  }

  int checked() const { return checked_; }
  int failures() const { return failures_; }
  const std::string& failure() const { return failure_; }  // returns the last failure

 private:
  std::string name_, failure_;
  std::unique_ptr<Prepared> prepared_;
  int checked_ = 0, failures_ = 0;
};

void time_call(benchmark::State& state, Prepared& prepared) {
  Device& device = prepared.device;
  const Call& call = prepared.call;
  const double floor = seconds_to_copy(device, call.bytes());
  const Stopwatch stopwatch = device.stopwatch([&] { device.run(call); });
  stopwatch.seconds();
  double total = 0;
  while (state.KeepRunningBatch(stopwatch.calls)) {
    const double seconds = stopwatch.seconds();
    state.SetIterationTime(seconds);
    total += seconds;
  }
  state.SetBytesProcessed(state.iterations() * call.bytes());
  state.counters["bytes"] = double(call.bytes());
  state.counters["floor_us"] = 1e6 * floor;
  state.counters["of_bandwidth"] = floor * double(state.iterations()) / total;
}

using Devices = std::vector<std::unique_ptr<Device>>;

Devices devices_of(const Options& options) {
  Devices devices;
  devices.push_back(cpu_device(options.threads));
#ifdef TOPN_GATING_CUDA
  std::string why_not;
  devices.push_back(cuda_device(&why_not));
  if (devices.back() == nullptr) {
    std::fprintf(stderr, "router_bench: no GPU (%s), so the CPU alone\n", why_not.c_str());
    devices.pop_back();
  }
#endif
  return devices;
}

// Adds the bandwidth of a copy that fits a cache, and of one that does not, to the head of the table.
void add_context(Device& device) {
  const std::string name = device.name();
  benchmark::AddCustomContext(name, device.description());
  for (const int64_t mebibytes : {1, 512}) {
    const int64_t bytes = mebibytes << 20;
    benchmark::AddCustomContext(name + "_copy_of_" + std::to_string(mebibytes) + "_MiB",
                                std::to_string(std::lround(1e-9 * double(bytes) / seconds_to_copy(device, bytes))) + " GB/s");
  }
}

std::vector<Benchmark> benchmarks_of(const Options& options, const Devices& devices) {
  std::vector<Benchmark> benchmarks;
  for (const Shape& shape : options.shapes) {
    for (const NamedType& type : options.types) {
      for (const std::unique_ptr<Device>& device : devices) {
        for (const Kernel& kernel : harness::kKernels) {
          if (device->is_cpu() || !kernel.on_cpu_alone) benchmarks.push_back({kernel, *device, type, shape});
          if (kernel.knows_dropless) benchmarks.push_back({kernel, *device, type, shape, true});
        }
      }
    }
  }
  return benchmarks;
}

int run(const Options& options) {
  const Devices devices = devices_of(options);
  Checker checker;
  for (const Benchmark& b : benchmarks_of(options, devices)) {
    if (options.check_only) {
      checker.prepare(b);
      continue;
    }
    const auto timed = [b, &checker](benchmark::State& state) {
      if (Prepared* prepared = checker.prepare(b)) return time_call(state, *prepared);
      state.SkipWithError(checker.failure().c_str());
    };
    benchmark::RegisterBenchmark(b.name().c_str(), timed)->UseManualTime()->Unit(benchmark::kMicrosecond);
  }
  if (options.check_only) {
    std::printf("%d kernels checked, %d failed\n", checker.checked(), checker.failures());
  } else {
    for (const std::unique_ptr<Device>& device : devices) add_context(*device);
    benchmark::RunSpecifiedBenchmarks();
  }
  return checker.failures() == 0 ? 0 : 1;
}

}  // namespace
}  // namespace topn_gating::bench

int main(int argc, char** argv) {
  using namespace topn_gating::bench;
  benchmark::Initialize(&argc, argv, print_help);
  try {
    return run(options_from(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "router_bench: %s\n", error.what());
    return 1;
  }
}
