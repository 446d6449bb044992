// Float lanes of the compiler's vector extension: 8 lanes (AVX2, FMA, F16C) if LRDS_SIMD_AVX2 is
// defined, else 4 lanes of the baseline instruction set (SSE2, NEON).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(LRDS_SIMD_AVX2)
#include <immintrin.h>
#endif

namespace {

struct Simd {
#if defined(LRDS_SIMD_AVX2)
  static constexpr int kWidth = 8;
#else
  static constexpr int kWidth = 4;
#endif
  typedef float V __attribute__((vector_size(kWidth * 4)));
  typedef std::int32_t I __attribute__((vector_size(kWidth * 4)));

  static V set(float x) { return x - V{}; }

  static V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  template <class T>
  static V load(const T* p) {
#if defined(LRDS_SIMD_AVX2)
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (T::kIsBFloat16) {
      return reinterpret_cast<V>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
    } else {
      return reinterpret_cast<V>(_mm256_cvtph_ps(h));
    }
#else
    V v;
    for (int i = 0; i < kWidth; ++i) v[i] = lrds::cpu::to_float(p[i]);
    return v;
#endif
  }
  template <class T>
  static V load(const T* p, int n, float fill) {
    V v = set(fill);
    for (int i = 0; i < n; ++i) v[i] = lrds::cpu::to_float(p[i]);
    return v;
  }
  static void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
  template <class T>
  static void store(T* p, V v) {
#if defined(LRDS_SIMD_AVX2)
    if constexpr (!T::kIsBFloat16) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                       _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
      return;
    }
#endif
    for (int i = 0; i < kWidth; ++i) lrds::cpu::from_float(v[i], p + i);
  }
  template <class T>
  static void store(T* p, V v, int n) {
    for (int i = 0; i < n; ++i) lrds::cpu::from_float(v[i], p + i);
  }

  static V max(V a, V b) {
#if defined(LRDS_SIMD_AVX2)
    return reinterpret_cast<V>(
        _mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
    return a > b ? a : b;
#endif
  }
  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static V mul(V a, V b) { return a * b; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V fnma(V a, V b, V c) { return c - a * b; }
  static V fma_where_positive(V a, V b, V c) { return a > V{} ? a * b + c : c; }
  static float reduce_add(V v) {
    float sum = 0.0f;
    for (int i = 0; i < kWidth; ++i) sum += v[i];
    return sum;
  }
  static float reduce_max(V v) {
    float top = v[0];
    for (int i = 1; i < kWidth; ++i) top = v[i] > top ? v[i] : top;
    return top;
  }

  // exp(x) for x <= 0, -inf or NaN, with a relative error of 1.2e-7, and exactly 1 at 0. Results
  // below 2^-126 become 0.
  static V exp(V x) {
    const I tiny = x < set(-87.33654f);
    const V clamped = tiny ? set(-87.33654f) : x;
    const V magic = set(12582912.0f);  // 1.5 * 2^23: the sum's low bits are the rounded integer
    const V shifted = clamped * set(1.44269504f) + magic;
    const V n = shifted - magic;
    V r = clamped - n * set(0.693145752f);
    r = r - n * set(1.42860677e-6f);
    V p = set(8.312501013278961e-3f) * r + set(4.1890330612659454e-2f);
    p = p * r + set(0.16667115688323975f);
    p = p * r + set(0.499992311000824f);
    p = p * r + set(1.0f);
    p = p * r + set(1.0f);
    const I exponent = (reinterpret_cast<I>(shifted) - 0x4b400000) << 23;
    const V scaled = reinterpret_cast<V>(reinterpret_cast<I>(p) + exponent);
    return tiny ? V{} : (x == x ? scaled : x);
  }
};

}  // namespace
