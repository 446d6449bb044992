// The logarithm of float lanes, in the compiler's vector extension, for every Simd.
#pragma once

#include <cstdint>

namespace {

// log(x) for x >= 0, inf or NaN, with a relative error of 1e-7, also for subnormal x; log(0) =
// -inf. The polynomial is that of Cephes' logf.
template <class Simd>
typename Simd::V log_lanes(typename Simd::V x) {
  using V = typename Simd::V;
  typedef std::int32_t I __attribute__((vector_size(Simd::kWidth * 4)));
  const auto set = [](auto value) { return Simd::set(value); };
  const I tiny = x < set(1.17549435e-38f);
  const V scaled = tiny ? x * set(8388608.0f) : x;
  const I bits = reinterpret_cast<I>(scaled);
  I exponent = (bits >> 23) - 127 - (tiny & 23);
  V m = reinterpret_cast<V>((bits & 0x007fffff) | 0x3f800000);
  const I upper = m > set(1.41421356f);
  m = upper ? m * set(0.5f) : m;
  exponent -= upper;
  const V f = m - set(1.0f), square = f * f, e = __builtin_convertvector(exponent, V);
  V p = set(7.0376836292e-2f) * f - set(1.1514610310e-1f);
  p = p * f + set(1.1676998740e-1f);
  p = p * f - set(1.2420140846e-1f);
  p = p * f + set(1.4249322787e-1f);
  p = p * f - set(1.6668057665e-1f);
  p = p * f + set(2.0000714765e-1f);
  p = p * f - set(2.4999993993e-1f);
  p = p * f + set(3.3333331174e-1f);
  p = p * f * square + e * set(-2.12194440e-4f) - set(0.5f) * square;
  const V result = f + p + e * set(0.693359375f);
  const V infinity = set(__builtin_inff());
  return x > V{} ? (x == infinity ? x : result)
                 : (x == V{} ? -infinity : x - x + set(__builtin_nanf("")));
}

}  // namespace
