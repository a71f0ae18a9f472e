// Tests of simt_types.h: conversions and bit operations are compared with their definitions. Each test returns what is wrong,
// or "" if nothing is.
#pragma once

#include <cmath>
#include <limits>
#include <string>

#include "simt_types.h"

// A 16-bit floating-point format, whose values are computed from its definition.
struct Format {
  int exponent_bits, fraction_bits;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  unsigned infinity() const { return ((1u << exponent_bits) - 1) << fraction_bits; }
  double value(unsigned bits) const {
    const unsigned magnitude = bits & 0x7fffu, fraction = magnitude & ((1u << fraction_bits) - 1);
    const int exponent = int(magnitude >> fraction_bits);
    const double significand = fraction + (exponent > 0 ? double(1 << fraction_bits) : 0.0);
    const double v = std::ldexp(significand, (exponent > 0 ? exponent : 1) - bias() - fraction_bits);
    return bits & 0x8000u ? -v : v;
  }
};

// Tests the conversion of every value to float and back, and of the floats at and beside every halfway point.
template <class To, class From>
std::string wrong_conversion(const Format& format, const To& to_float, const From& from_float) {
  const auto at = [](const char* what, unsigned bits) { return what + std::to_string(bits); };
  for (unsigned bits = 0; bits < 0x10000u; ++bits) {
    const float v = to_float(static_cast<unsigned short>(bits));
    const unsigned magnitude = bits & 0x7fffu;
    if (magnitude > format.infinity()) {
      if (!std::isnan(v) || (from_float(v) & 0x7fffu) != 0x7fffu) return at("not a NaN: ", bits);
      continue;
    }
    const bool infinite = magnitude == format.infinity();
    if (infinite ? !std::isinf(v) : double(v) != format.value(bits)) return at("to float: ", bits);
    if (std::signbit(v) != (bits >> 15 != 0) || from_float(v) != bits) return at("there and back: ", bits);
    if (infinite) continue;
    // Halfway to the next value; after the largest value, that is the next power of two.
    const float middle = float((format.value(bits) + format.value(bits + 1)) / 2);
    const unsigned even = bits + (bits & 1);
    if (from_float(middle) != even) return at("halfway above: ", bits);
    if (from_float(std::nextafter(middle, 0.0f)) != bits) return at("under halfway above: ", bits);
    const float over = std::nextafter(middle, std::copysign(std::numeric_limits<float>::infinity(), middle));
    const unsigned up = std::isinf(over) ? even : bits + 1;
    if (from_float(over) != up) return at("over halfway above: ", bits);
  }
  const float most = std::numeric_limits<float>::max(), least = std::numeric_limits<float>::denorm_min();
  if (from_float(most) != format.infinity() || from_float(-most) != (format.infinity() | 0x8000u)) return "the largest float";
  if (from_float(least) != 0 || from_float(-least) != 0x8000u) return "the smallest float";
  return "";
}

inline std::string wrong_halves() {
  const std::string half = wrong_conversion(
      Format{5, 10}, [](unsigned short v) { return __half2float(__ushort_as_half(v)); },
      [](float v) { return unsigned(__half_as_ushort(__float2half_rn(v))); });
  const std::string bfloat = wrong_conversion(
      Format{8, 7}, [](unsigned short v) { return __bfloat162float(__ushort_as_bfloat16(v)); },
      [](float v) { return unsigned(__bfloat16_as_ushort(__float2bfloat16_rn(v))); });
  return !half.empty() ? "half " + half : !bfloat.empty() ? "bfloat16 " + bfloat : "";
}

inline std::string wrong_bits() {
  if (__popc(0xf0f0u) != 8 || __popcll(~0ull) != 64) return "popc";
  if (__ffs(0) != 0 || __ffs(8) != 4 || __ffsll(1ll << 40) != 41) return "ffs";
  if (__clz(0) != 32 || __clz(-1) != 0 || __clz(1) != 31 || __clzll(0) != 64 || __clzll(1) != 63) return "clz";
  if (__brev(1) != 0x80000000u || __brev(0x12345678u) != 0x1e6a2c48u) return "brev";
  if (__int_as_float(__float_as_int(-1.5f)) != -1.5f || __float_as_uint(1.0f) != 0x3f800000u) return "float bits";
  if (__longlong_as_double(__double_as_longlong(-2.5)) != -2.5) return "double bits";
  if (__fmaf_rn(1.0f + 0x1p-12f, 1.0f + 0x1p-12f, -1.0f - 0x1p-11f) != 0x1p-24f) return "fma";
  if (min(3, -2) != -2 || max(3u, 2u) != 3u || min(1.5, 2.5) != 1.5 || max(NAN, 1.0f) != 1.0f) return "min, max";
  if (alignof(uint4) != 16 || alignof(float2) != 8 || alignof(longlong2) != 16 || sizeof(ulonglong4) != 32) return "alignment";
  return "";
}
