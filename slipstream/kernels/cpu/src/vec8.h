// Eight floats at once, the unit in which attention computes on every instruction set.
//
// Invariant: an operation does the same to a lane whatever the others hold, and sums over lanes follow one
// fixed tree, so that a query's result does not depend on the tile it was computed in.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define SS_INLINE inline __attribute__((always_inline))

namespace slipstream {

#if defined(__AVX2__)

struct Vec8 {
  __m256 v;
};
SS_INLINE Vec8 vec8(float x) { return {_mm256_set1_ps(x)}; }
SS_INLINE Vec8 load8(const float* p) { return {_mm256_loadu_ps(p)}; }
SS_INLINE Vec8 load8(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
SS_INLINE void store8(float* p, Vec8 a) { _mm256_storeu_ps(p, a.v); }
SS_INLINE void store8(uint16_t* p, Vec8 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
SS_INLINE Vec8 fma8(Vec8 a, Vec8 b, Vec8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
SS_INLINE Vec8 operator+(Vec8 a, Vec8 b) { return {_mm256_add_ps(a.v, b.v)}; }
SS_INLINE Vec8 operator-(Vec8 a, Vec8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
SS_INLINE Vec8 operator*(Vec8 a, Vec8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
SS_INLINE Vec8 operator/(Vec8 a, Vec8 b) { return {_mm256_div_ps(a.v, b.v)}; }
SS_INLINE Vec8 max8(Vec8 a, Vec8 b) { return {_mm256_max_ps(a.v, b.v)}; }
SS_INLINE Vec8 min8(Vec8 a, Vec8 b) { return {_mm256_min_ps(a.v, b.v)}; }
SS_INLINE Vec8 round8(Vec8 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// 2^n for integral n from -126 to 127.
SS_INLINE Vec8 exp2_of_integer(Vec8 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(biased, 23))};
}
// The sums of eight vectors, one a lane: adds neighbours three times over.
SS_INLINE Vec8 sums8(const Vec8* a) {
  const __m256 s01 = _mm256_hadd_ps(a[0].v, a[1].v), s23 = _mm256_hadd_ps(a[2].v, a[3].v);
  const __m256 s45 = _mm256_hadd_ps(a[4].v, a[5].v), s67 = _mm256_hadd_ps(a[6].v, a[7].v);
  const __m256 low = _mm256_hadd_ps(s01, s23), high = _mm256_hadd_ps(s45, s67);
  const __m256 ends = _mm256_permute2f128_ps(low, high, 0x21);
  return {_mm256_add_ps(ends, _mm256_blend_ps(low, high, 0xF0))};
}
SS_INLINE float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
SS_INLINE uint16_t float_to_half(float x) { return _cvtss_sh(x, 0); }

#elif defined(__aarch64__)

struct Vec8 {
  float32x4_t a, b;
};
SS_INLINE Vec8 vec8(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
SS_INLINE Vec8 load8(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
SS_INLINE Vec8 load8(const uint16_t* p) {
  const float16x8_t h = vreinterpretq_f16_u16(vld1q_u16(p));
  return {vcvt_f32_f16(vget_low_f16(h)), vcvt_f32_f16(vget_high_f16(h))};
}
SS_INLINE void store8(float* p, Vec8 x) {
  vst1q_f32(p, x.a);
  vst1q_f32(p + 4, x.b);
}
SS_INLINE void store8(uint16_t* p, Vec8 x) {
  vst1q_u16(p, vreinterpretq_u16_f16(vcombine_f16(vcvt_f16_f32(x.a), vcvt_f16_f32(x.b))));
}
SS_INLINE Vec8 fma8(Vec8 x, Vec8 y, Vec8 z) { return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)}; }
SS_INLINE Vec8 operator+(Vec8 x, Vec8 y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b)}; }
SS_INLINE Vec8 operator-(Vec8 x, Vec8 y) { return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b)}; }
SS_INLINE Vec8 operator*(Vec8 x, Vec8 y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b)}; }
SS_INLINE Vec8 operator/(Vec8 x, Vec8 y) { return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b)}; }
SS_INLINE Vec8 max8(Vec8 x, Vec8 y) { return {vmaxq_f32(x.a, y.a), vmaxq_f32(x.b, y.b)}; }
SS_INLINE Vec8 min8(Vec8 x, Vec8 y) { return {vminq_f32(x.a, y.a), vminq_f32(x.b, y.b)}; }
SS_INLINE Vec8 round8(Vec8 x) { return {vrndnq_f32(x.a), vrndnq_f32(x.b)}; }
SS_INLINE Vec8 exp2_of_integer(Vec8 n) {
  const int32x4_t bias = vdupq_n_s32(127);
  return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.a), bias), 23)),
          vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.b), bias), 23))};
}
SS_INLINE Vec8 sums8(const Vec8* x) {
  float32x4_t half[2][2];
  for (int i = 0; i < 2; ++i) {
    const Vec8* four = x + 4 * i;
    const float32x4_t low = vpaddq_f32(vpaddq_f32(four[0].a, four[1].a), vpaddq_f32(four[2].a, four[3].a));
    const float32x4_t high = vpaddq_f32(vpaddq_f32(four[0].b, four[1].b), vpaddq_f32(four[2].b, four[3].b));
    half[i][0] = low;
    half[i][1] = high;
  }
  return {vaddq_f32(half[0][1], half[0][0]), vaddq_f32(half[1][1], half[1][0])};
}
SS_INLINE float half_to_float(uint16_t h) {
  __fp16 x;
  std::memcpy(&x, &h, 2);
  return static_cast<float>(x);
}
SS_INLINE uint16_t float_to_half(float f) {
  const __fp16 x = static_cast<__fp16>(f);
  uint16_t h;
  std::memcpy(&h, &x, 2);
  return h;
}

#else
#error "The CPU kernels need AVX2 or 64-bit Arm"
#endif

SS_INLINE float sum8(Vec8 a) {
  alignas(32) float x[8];
  store8(x, a);
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

SS_INLINE float highest8(Vec8 a) {
  alignas(32) float x[8];
  store8(x, a);
  float best = x[0];
  for (int i = 1; i < 8; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// e^x to about 2 units in the last place; 0 below -87.3, bounded above 88.3.
SS_INLINE Vec8 exp8(Vec8 x) {
  const Vec8 lowest = vec8(-87.33654f);
  const Vec8 bounded = min8(max8(x, lowest), vec8(88.37f));
  const Vec8 n = round8(bounded * vec8(1.44269504f));
  // ln 2 in two parts, so that the remainder is exact.
  Vec8 r = fma8(n, vec8(-0.693359375f), bounded);
  r = fma8(n, vec8(2.12194440e-4f), r);
  // The minimax polynomial of Cephes' expf (Moshier).
  Vec8 p = vec8(1.9875691500e-4f);
  p = fma8(p, r, vec8(1.3981999507e-3f));
  p = fma8(p, r, vec8(8.3334519073e-3f));
  p = fma8(p, r, vec8(4.1665795894e-2f));
  p = fma8(p, r, vec8(1.6666665459e-1f));
  p = fma8(p, r, vec8(5.0000001201e-1f));
  p = fma8(p, r * r, r + vec8(1.0f));
  return p * exp2_of_integer(n);
}

// tanh(x) = 1 - 2 / (e^2x + 1); used for soft caps and GELU, where an absolute error of 1e-7 is enough.
SS_INLINE Vec8 tanh8(Vec8 x) {
  const Vec8 one = vec8(1.0f);
  return one - vec8(2.0f) / (exp8(x + x) + one);
}

}  // namespace slipstream
