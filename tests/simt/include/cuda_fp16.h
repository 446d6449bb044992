// Replaces CUDA's header of this name: float16 in integers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// NOLINTBEGIN(bugprone-reserved-identifier): CUDA's names

struct __half {
  std::uint16_t bits;
};
struct __half2 {
  __half x, y;
  __half2(__half x_, __half y_) : x(x_), y(y_) {}
};

inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  float value = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return (h.bits & 0x8000) != 0 ? -value : value;
}

inline __half __float2half_rn(float x) {
  const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return {0x7fff};
  const float size = std::fabs(x);
  if (size >= 65520.0f) return {static_cast<std::uint16_t>(sign | 0x7c00)};
  // In units of the last place. If rounding overflows the fraction, the carry correctly increments
  // the exponent.
  const int exponent = size < 6.103515625e-5f ? -14 : std::ilogb(size);
  const long ulps = std::lrint(std::ldexp(static_cast<double>(size), 10 - exponent));
  const long bits = size < 6.103515625e-5f ? ulps : (long{exponent} + 14) * 1024 + ulps;
  return {static_cast<std::uint16_t>(sign | bits)};
}

inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}

inline __half __hmax(__half a, __half b) {
  const float x = __half2float(a), y = __half2float(b);
  return std::isnan(x) || y > x ? b : a;
}
inline __half2 __hmax2(__half2 a, __half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }

// NOLINTEND(bugprone-reserved-identifier)
