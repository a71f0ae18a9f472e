// The CPU, with OpenMP threads as torch uses them.
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "cpu/kernels.h"
#include "device.h"

namespace topn_gating::bench {
namespace {

// Splits a loop as torch's parallel_for does: evenly among the threads, but with at least `grain` items for each.
void parallel_for(int64_t begin, int64_t end, int64_t grain, cpu::Body body, void* context) {
  const int64_t count = end - begin;
  if (count <= grain || omp_in_parallel()) return count > 0 ? body(begin, end, context) : void();
#pragma omp parallel
  {
    const int64_t threads = omp_get_num_threads();
    const int64_t part = std::max(grain, (count + threads - 1) / threads);
    const int64_t first = begin + omp_get_thread_num() * part;
    if (first < end) body(first, std::min(first + part, end), context);
  }
}

struct alignas(64) Line {
  char bytes[64];
};
struct Copy {
  Line* to;
  const Line* from;
};

void copy_lines(int64_t begin, int64_t end, void* context) {
  const Copy& copy = *static_cast<const Copy*>(context);
  std::memcpy(copy.to + begin, copy.from + begin, size_t(end - begin) * sizeof(Line));
}

// Copies with streaming stores, which bypass the caches, so that the target's cache lines are not read first.
void stream_lines(int64_t begin, int64_t end, void* context) {
#ifdef __SSE2__
  const Copy& copy = *static_cast<const Copy*>(context);
  const __m128i *from = reinterpret_cast<const __m128i*>(copy.from + begin),
                *last = reinterpret_cast<const __m128i*>(copy.from + end);
  for (__m128i* to = reinterpret_cast<__m128i*>(copy.to + begin); from < last; ++from, ++to) {
    _mm_stream_si128(to, _mm_load_si128(from));
  }
  _mm_sfence();
#else
  copy_lines(begin, end, context);
#endif
}

class Cpu : public Device {
 public:
  explicit Cpu(int threads) { omp_set_num_threads(threads); }
  const char* name() const override { return "cpu"; }
  bool is_cpu() const override { return true; }
  std::string description() const override {
    return std::string(cpu::level()) + ", " + std::to_string(omp_get_max_threads()) + " threads";
  }

  Memory memory_of(const Buffer& buffer) override { return harness::host_memory_of(buffer); }
  void read_back(const Memory&, const Buffer&) override {}

  std::vector<std::function<void()>> copies(void* to, const void* from, int64_t bytes) override {
    const int64_t lines = bytes / int64_t(sizeof(Line));
    const Copy copy{static_cast<Line*>(to), static_cast<const Line*>(from)};
    const auto way = [=](cpu::Body body, int64_t grain) {
      return [=] { parallel_for(0, lines, grain, body, const_cast<Copy*>(&copy)); };
    };
    const int64_t all = lines, any = 1;  // grains for one thread, and for all threads
    return {way(copy_lines, all), way(copy_lines, any), way(stream_lines, all), way(stream_lines, any)};
  }

  Stopwatch stopwatch(std::function<void()> call) override {
    return {1, [call = std::move(call)] {
              const auto start = std::chrono::steady_clock::now();
              call();
              return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
            }};
  }
  void wait() override {}

  int64_t workspace_bytes(const Call& call) const override {
    int64_t bytes = 0;
    call.visit([&](const auto& args) { bytes = cpu::workspace_bytes(args); });
    return bytes;
  }
  void run(const Call& call) override {
    call.visit([](const auto& args) { cpu::run(args, parallel_for); });
  }
};

}  // namespace

std::unique_ptr<Device> cpu_device(int threads) { return std::make_unique<Cpu>(threads); }

}  // namespace topn_gating::bench
