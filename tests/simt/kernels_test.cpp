// The CUDA kernels on the host against the CPU's, in several schedules. `kernels_test` runs all cases, `kernels_test PATTERN`
// those whose name has the pattern in it, `--quick` those that together reach every barrier; -v names each as it starts.
#include "kernels_test.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
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

Type type_of(DType dtype) {
  switch (dtype) {
    case DType::F32: return Type::F32;
    case DType::F64: return Type::F64;
    case DType::BF16: return Type::BF16;
    case DType::F16: return Type::F16;
  }
  return Type::F32;
}
Type real_of(DType dtype) { return dtype == DType::F64 ? Type::F64 : Type::F32; }

int64_t bytes_of(Type type) {
  switch (type) {
    case Type::Bool: return 1;
    case Type::BF16:
    case Type::F16: return 2;
    case Type::I32:
    case Type::F32: return 4;
    case Type::F64: return 8;
  }
  return 0;
}

uint64_t Random::bits() {  // splitmix64
  uint64_t z = state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}
double Random::uniform() { return double(bits() >> 40) * 0x1p-24; }
double Random::normal() {
  double sum = -6;
  for (int i = 0; i < 12; ++i) sum += uniform();
  return sum;
}

Buffer::Buffer(Type type, int64_t count, bool aligned, int fill) : type_(type), count_(count) {
  const size_t offset = aligned ? 0 : size_t(bytes_of(type)), size = size_t(count * bytes_of(type));
  memory_.reset(std::malloc(offset + size));
  data_ = static_cast<char*>(memory_.get()) + offset;
  std::memset(data_, fill, size);
}

double Buffer::get(int64_t i) const {
  switch (type_) {
    case Type::Bool: return as<unsigned char>()[i];
    case Type::I32: return as<int32_t>()[i];
    case Type::F32: return as<float>()[i];
    case Type::F64: return as<double>()[i];
    case Type::BF16: return __bfloat162float(as<__nv_bfloat16>()[i]);
    case Type::F16: return __half2float(as<__half>()[i]);
  }
  return 0;
}

void Buffer::set(int64_t i, double value) {
  switch (type_) {
    case Type::Bool: as<bool>()[i] = value != 0; break;
    case Type::I32: as<int32_t>()[i] = int32_t(value); break;
    case Type::F32: as<float>()[i] = float(value); break;
    case Type::F64: as<double>()[i] = value; break;
    case Type::BF16: as<__nv_bfloat16>()[i] = __float2bfloat16_rn(float(value)); break;
    case Type::F16: as<__half>()[i] = __float2half_rn(float(value)); break;
  }
}

bool Buffer::all_ones(int64_t i) const {
  const unsigned char* bytes = as<unsigned char>() + i * bytes_of(type_);
  return std::all_of(bytes, bytes + bytes_of(type_), [](unsigned char byte) { return byte == 0xff; });
}

int64_t Buffer::first_difference(const Buffer& other) const {
  const int64_t bytes = bytes_of(type_);
  if (std::memcmp(data(), other.data(), size_t(count_ * bytes)) == 0) return -1;
  int64_t i = 0;
  while (std::memcmp(as<char>() + i * bytes, other.as<char>() + i * bytes, size_t(bytes)) == 0) ++i;
  return i;
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
  std::printf("%d cases on %s, %d failed\n", cases_, cpu::kernels().level, failures_);
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
