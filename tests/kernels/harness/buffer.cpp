#include "buffer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

namespace topn_gating::harness {
namespace {

// A 16-bit floating-point format: a sign bit, the exponent, and `mantissa` bits of the mantissa.
struct Format {
  int mantissa;
  constexpr int bias() const { return (1 << (14 - mantissa)) - 1; }
  constexpr uint16_t infinity() const { return uint16_t(0x7fff >> mantissa << mantissa); }
};
constexpr Format kBF16{7}, kF16{10};

double decode(uint16_t bits, Format format) {
  const int exponent = (bits & 0x7fff) >> format.mantissa, mantissa = bits & ((1 << format.mantissa) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if ((bits & 0x7fff) > format.infinity()) return std::numeric_limits<double>::quiet_NaN();
  if ((bits & 0x7fff) == format.infinity()) return sign * std::numeric_limits<double>::infinity();
  const int leading = exponent == 0 ? 0 : 1 << format.mantissa;
  return sign * std::ldexp(leading + mantissa, std::max(exponent, 1) - format.bias() - format.mantissa);
}

// Returns the bits of a value rounded to nearest, ties to even.
uint16_t encode(double value, Format format) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7fff;
  if (std::isinf(value)) return sign | format.infinity();
  const int least = 1 - format.bias(), exponent = value == 0 ? least : std::max(std::ilogb(value), least);
  // Adding the mantissa lets its leading bit, and a carry of the rounding, increase the exponent.
  const double mantissa = std::nearbyint(std::ldexp(std::abs(value), format.mantissa - exponent));
  const double bits = std::ldexp(exponent - least, format.mantissa) + mantissa;
  return sign | uint16_t(std::min<double>(bits, format.infinity()));
}

}  // namespace

Type type_of(DType dtype) {
  switch (dtype) {
    case DType::F32: return Type::F32;
    case DType::F64: return Type::F64;
    case DType::BF16: return Type::BF16;
    case DType::F16: return Type::F16;
  }
  return Type::F32;
}
Type compute_type_of(DType dtype) { return dtype == DType::F64 ? Type::F64 : Type::F32; }

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

double ulp(Type type, double value) {
  struct Float {
    int digits, least_exponent;
  };
  const auto [digits, least_exponent] = type == Type::BF16  ? Float{8, -126}
                                        : type == Type::F16 ? Float{11, -14}
                                        : type == Type::F64 ? Float{53, -1022}
                                                            : Float{24, -126};
  if (type == Type::Bool || type == Type::I32) return 0;
  const int exponent = value == 0 ? least_exponent : std::max(std::ilogb(value), least_exponent);
  return std::ldexp(1.0, exponent + 1 - digits);
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
  constexpr size_t alignment = 64;  // bytes, as torch aligns tensors
  const size_t offset = aligned ? 0 : size_t(bytes_of(type)), size = size_t(bytes());
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, offset + size) != 0) throw std::bad_alloc();
  memory_.reset(memory);
  data_ = static_cast<char*>(memory) + offset;
  std::memset(data_, fill, size);
}

double View::operator[](int64_t i) const {
  if (data == nullptr) return 0;
  switch (type) {
    case Type::Bool: return static_cast<const unsigned char*>(data)[i];
    case Type::I32: return static_cast<const int32_t*>(data)[i];
    case Type::F32: return static_cast<const float*>(data)[i];
    case Type::F64: return static_cast<const double*>(data)[i];
    case Type::BF16: {  // the upper half of a float's bits
      const uint32_t bits = uint32_t(static_cast<const uint16_t*>(data)[i]) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    }
    case Type::F16: return decode(static_cast<const uint16_t*>(data)[i], kF16);
  }
  return 0;
}

void Buffer::set(int64_t i, double value) {
  switch (type_) {
    case Type::Bool: as<bool>()[i] = value != 0; break;
    case Type::I32: as<int32_t>()[i] = int32_t(value); break;
    case Type::F32: as<float>()[i] = float(value); break;
    case Type::F64: as<double>()[i] = value; break;
    case Type::BF16: as<uint16_t>()[i] = encode(value, kBF16); break;
    case Type::F16: as<uint16_t>()[i] = encode(value, kF16); break;
  }
}

bool Buffer::all_ones(int64_t i) const {
  const unsigned char* bytes = as<unsigned char>() + i * bytes_of(type_);
  return std::all_of(bytes, bytes + bytes_of(type_), [](unsigned char byte) { return byte == 0xff; });
}

int64_t Buffer::first_difference(const Buffer& other) const {
  const int64_t size = bytes_of(type_);
  if (std::memcmp(data(), other.data(), size_t(bytes())) == 0) return -1;
  int64_t i = 0;
  while (std::memcmp(as<char>() + i * size, other.as<char>() + i * size, size_t(size)) == 0) ++i;
  return i;
}

}  // namespace topn_gating::harness
