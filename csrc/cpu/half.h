// 16-bit storage types and their scalar conversions, round to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace lrds::cpu {

struct BFloat16 {
  static constexpr bool kIsBFloat16 = true;
  std::uint16_t bits;
};
struct Float16 {
  static constexpr bool kIsBFloat16 = false;
  std::uint16_t bits;
};

static inline float bits_to_float(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
static inline std::uint32_t float_to_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float to_float(float x) { return x; }
static inline float to_float(BFloat16 x) {
  return bits_to_float(static_cast<std::uint32_t>(x.bits) << 16);
}
static inline float to_float(Float16 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude << 13));
  // A half below 2^-14 is a multiple of 2^-24.
  if (magnitude < 0x0400u) {
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
}

static inline void from_float(float x, float* out) { *out = x; }
static inline void from_float(float x, BFloat16* out) {
  const std::uint32_t bits = float_to_bits(x);
  out->bits = (bits & 0x7fffffffu) > 0x7f800000u
                  ? std::uint16_t{0x7fc0}
                  : static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
static inline void from_float(float x, Float16* out) {
  const std::uint32_t bits = float_to_bits(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520: halfway to the first value that is not finite
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 moves the multiple of 2^-24 into the last mantissa bits, and the
    // addition rounds it.
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<std::uint16_t>(sign | half);
}

}  // namespace lrds::cpu
