// 16 float lanes with AVX-512 F/BW/DQ/VL, and BF16 if LRDS_SIMD_AVX512_BF16 is defined. Only
// translation units compiled for these instruction sets include it.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Simd {
  using V = __m512;
  static constexpr int kWidth = 16;

  static V set(float x) { return _mm512_set1_ps(x); }
  static __mmask16 lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V load(const float* p, int n, float fill) {
    return _mm512_mask_loadu_ps(set(fill), lanes(n), p);
  }
  static V load(const lrds::cpu::BFloat16* p) {
    return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static V load(const lrds::cpu::BFloat16* p, int n, float fill) {
    return _mm512_mask_mov_ps(set(fill), lanes(n),
                              widen_bf16(_mm256_maskz_loadu_epi16(lanes(n), p)));
  }
  static V load(const lrds::cpu::Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static V load(const lrds::cpu::Float16* p, int n, float fill) {
    return _mm512_mask_mov_ps(set(fill), lanes(n),
                              _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(n), p)));
  }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static void store(float* p, V v, int n) { _mm512_mask_storeu_ps(p, lanes(n), v); }
  static void store(lrds::cpu::BFloat16* p, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v));
  }
  static void store(lrds::cpu::BFloat16* p, V v, int n) {
    _mm256_mask_storeu_epi16(p, lanes(n), narrow_bf16(v));
  }
  static void store(lrds::cpu::Float16* p, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(v));
  }
  static void store(lrds::cpu::Float16* p, V v, int n) {
    _mm256_mask_storeu_epi16(p, lanes(n), narrow_f16(v));
  }

  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }
  // c + a * b where a > 0, else c.
  static V fma_where_positive(V a, V b, V c) {
    return _mm512_mask3_fmadd_ps(a, b, c, _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GT_OQ));
  }
  static float reduce_add(V v) { return _mm512_reduce_add_ps(v); }
  static float reduce_max(V v) { return _mm512_reduce_max_ps(v); }

  // exp(x) for x <= 0, -inf or NaN, with a relative error of 1.2e-7, and exactly 1 at 0. scalef
  // also produces subnormal results.
  static V exp(V x) {
    x = _mm512_max_ps(set(-104.0f), x);  // the second operand propagates NaN
    const V n = _mm512_roundscale_ps(_mm512_mul_ps(x, set(1.44269504f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    V r = _mm512_fnmadd_ps(n, set(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, set(1.42860677e-6f), r);
    V p = _mm512_fmadd_ps(set(8.312501013278961e-3f), r, set(4.1890330612659454e-2f));
    p = _mm512_fmadd_ps(p, r, set(0.16667115688323975f));
    p = _mm512_fmadd_ps(p, r, set(0.499992311000824f));
    p = _mm512_fmadd_ps(p, r, set(1.0f));
    p = _mm512_fmadd_ps(p, r, set(1.0f));
    return _mm512_scalef_ps(p, n);
  }

 private:
  static V widen_bf16(__m256i h) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  static __m256i narrow_bf16(V v) {
#if defined(LRDS_SIMD_AVX512_BF16)
    // Values that are subnormal in float become 0.
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#endif
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                                    _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
  static __m256i narrow_f16(V v) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

}  // namespace
