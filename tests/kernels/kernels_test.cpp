// The CUDA kernels on the host against the CPU's, in several schedules. `kernels_test` runs all cases, `kernels_test PATTERN`
// those whose name has the pattern in it, `--quick` those that together reach every barrier; -v names each as it starts.
#include "kernels_test.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>

namespace kernels_test {

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

struct Format {
  int digits, least_exponent;
  double rounding;  // of Real, relative
};
Format format_of(Type type) {
  switch (type) {
    case Type::BF16: return {8, -126, 0x1p-24};
    case Type::F16: return {11, -14, 0x1p-24};
    case Type::F64: return {53, -1022, 0x1p-53};
    default: return {24, -126, 0x1p-24};
  }
}

double ulp(double value, const Format& format) {
  if (value == 0) return std::ldexp(1.0, format.least_exponent + 1 - format.digits);
  return std::ldexp(1.0, std::max(std::ilogb(value), format.least_exponent) + 1 - format.digits);
}

double largest(const Buffer& buffer) {
  double most = 0;
  for (int64_t i = 0; i < buffer.count(); ++i) {
    if (std::isfinite(buffer.get(i))) most = std::max(most, std::abs(buffer.get(i)));
  }
  return most;
}

bool is_near(double got, double expected, double allowed) {
  if (std::isnan(got) || std::isnan(expected)) return std::isnan(got) && std::isnan(expected);
  return got == expected || std::abs(got - expected) <= allowed;
}

}  // namespace

void compare(Suite& suite, const std::string& name, const Buffer& got, const Buffer& expected, Bound bound) {
  const bool integers = got.type() == Type::I32;
  const Format format = format_of(got.type());
  const double floor = bound.roundings * format.rounding * std::max(bound.roundings > 0 ? largest(expected) : 0, bound.terms);
  for (int64_t i = 0; i < got.count(); ++i) {
    const double a = got.get(i), b = expected.get(i);
    const double allowed = integers || !std::isfinite(b) ? 0 : bound.ulps * ulp(b, format) + floor;
    const bool forgotten = !integers && got.all_ones(i);
    if (is_near(a, b, allowed) && !forgotten) continue;
    char text[160];
    std::snprintf(text, sizeof text, "[%lld of %lld] = %.17g, on the CPU %.17g (allowed %.2g)%s", static_cast<long long>(i),
                  static_cast<long long>(got.count()), a, b, allowed, forgotten ? ", never written" : "");
    return suite.fail(name + text);
  }
}

void on_threads(int64_t begin, int64_t end, int64_t /*grain*/, cpu::Body body, void* context) {
  constexpr int64_t parts = 3;
  const auto cut = [&](int64_t part) { return begin + (end - begin) * part / parts; };
  std::vector<std::thread> others;
  for (int64_t part = 1; part < parts; ++part) {
    if (cut(part) < cut(part + 1)) others.emplace_back(body, cut(part), cut(part + 1), context);
  }
  if (cut(0) < cut(1)) body(cut(0), cut(1), context);
  for (std::thread& other : others) other.join();
}

Suite::Suite(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--quick") {
      quick_ = true;
    } else if (argument == "-v") {
      verbose_ = true;
    } else {
      pattern_ = argument;
    }
  }
}

bool Suite::begin(const std::string& name, bool quick) {
  if ((quick_ && !quick) || name.find(pattern_) == std::string::npos) return false;
  name_ = name;
  failed_ = false;
  ++cases_;
  simt_set_multiprocessors(3);
  if (verbose_) std::printf("%s\n", name.c_str());
  std::fflush(stdout);  // a sanitizer may end the process
  return true;
}

void Suite::fail(const std::string& what) {
  if (!failed_) ++failures_;
  failed_ = true;
  std::printf("FAILED %s: %s\n", name_.c_str(), what.c_str());
}

int Suite::finish() const {
  std::printf("%d cases on %s, %d failed\n", cases_, cpu::level(), failures_);
  return failures_ == 0 && cases_ > 0 ? 0 : 1;
}

}  // namespace kernels_test

int main(int argc, char** argv) {
  // Contracted as little as the host's run of the CUDA kernels, so that they differ in the order of sums alone.
  setenv("TOPN_GATING_CPU_LEVEL", "baseline", 1);
  kernels_test::Suite suite(argc, argv);
  kernels_test::gate_cases(suite);
  kernels_test::assign_cases(suite);
  kernels_test::slot_cases(suite);
  return suite.finish();
}
