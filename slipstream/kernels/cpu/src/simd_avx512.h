// What do 16 lanes look like on AVX-512 with VNNI? One register of 512 bits, of which there are 32.
//
// The interface is that of simd.h; lane i of every type is row i of a weight tile. One instruction multiplies
// 64 unsigned bytes with 64 signed ones and adds them by fours into 32 bits, which cannot overflow here.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace slipstream {

constexpr int kTokens = 8;
constexpr int kRegisterVectors = 32;

SS_INLINE __m512i repeat_word(int32_t word) { return _mm512_set1_epi32(word); }

struct Floats {
  __m512 lanes;

  static SS_INLINE Floats set(float x) { return {_mm512_set1_ps(x)}; }
  static SS_INLINE Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static SS_INLINE Floats load_half(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static SS_INLINE Floats load_bfloat(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  SS_INLINE void store(float* p) const { _mm512_storeu_ps(p, lanes); }
  SS_INLINE void store_half(uint16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(lanes, _MM_FROUND_TO_NEAREST_INT));
  }
  // Lanes hold integers from -128 to 127.
  SS_INLINE void store_int8(int8_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(lanes)));
  }
};

SS_INLINE Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.lanes, b.lanes)}; }
SS_INLINE Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.lanes, b.lanes)}; }
SS_INLINE Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.lanes, b.lanes)}; }
SS_INLINE Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.lanes, b.lanes)}; }
SS_INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.lanes, b.lanes, c.lanes)}; }
SS_INLINE Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.lanes, b.lanes)}; }
SS_INLINE Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.lanes, b.lanes)}; }
SS_INLINE Floats round_to_even(Floats a) {
  return {_mm512_roundscale_ps(a.lanes, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
SS_INLINE Floats zero_where_less(Floats value, Floats x, Floats limit) {
  const __mmask16 keeps = _mm512_cmp_ps_mask(x.lanes, limit.lanes, _CMP_NLT_UQ);
  return {_mm512_maskz_mov_ps(keeps, value.lanes)};
}
SS_INLINE Floats power_of_two(Floats n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.lanes), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}
SS_INLINE __m256 upper_half(__m512 v) {
  return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
}
SS_INLINE float horizontal_sum(Floats a) {
  const __m256 by_8 = _mm256_add_ps(_mm512_castps512_ps256(a.lanes), upper_half(a.lanes));
  const __m128 by_4 = _mm_add_ps(_mm256_castps256_ps128(by_8), _mm256_extractf128_ps(by_8, 1));
  const __m128 by_2 = _mm_add_ps(by_4, _mm_movehl_ps(by_4, by_4));
  return _mm_cvtss_f32(_mm_add_ss(by_2, _mm_movehdup_ps(by_2)));
}
SS_INLINE float horizontal_max(Floats a) {
  const __m256 by_8 = _mm256_max_ps(_mm512_castps512_ps256(a.lanes), upper_half(a.lanes));
  const __m128 by_4 = _mm_max_ps(_mm256_castps256_ps128(by_8), _mm256_extractf128_ps(by_8, 1));
  const __m128 by_2 = _mm_max_ps(by_4, _mm_movehl_ps(by_4, by_4));
  return _mm_cvtss_f32(_mm_max_ss(by_2, _mm_movehdup_ps(by_2)));
}
SS_INLINE uint32_t largest_magnitude_bits(Floats a, Floats b) {
  const __m512i no_sign = _mm512_set1_epi32(0x7fffffff);
  const __m512i first = _mm512_and_si512(_mm512_castps_si512(a.lanes), no_sign);
  const __m512i second = _mm512_and_si512(_mm512_castps_si512(b.lanes), no_sign);
  const __m512i both = _mm512_max_epi32(first, second);
  const __m256i by_8 = _mm256_max_epi32(_mm512_castsi512_si256(both), _mm512_extracti64x4_epi64(both, 1));
  const __m128i by_4 = _mm_max_epi32(_mm256_castsi256_si128(by_8), _mm256_extracti128_si256(by_8, 1));
  const __m128i by_2 = _mm_max_epi32(by_4, _mm_shuffle_epi32(by_4, 0x4E));
  const __m128i last = _mm_max_epi32(by_2, _mm_shuffle_epi32(by_2, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(last));
}
SS_INLINE float half_bits_to_float(uint16_t bits) { return _cvtsh_ss(bits); }
SS_INLINE uint16_t float_to_half_bits(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

struct Integers {
  __m512i lanes;

  SS_INLINE Floats to_floats() const { return {_mm512_cvtepi32_ps(lanes)}; }
};
SS_INLINE Integers operator+(Integers a, Integers b) { return {_mm512_add_epi32(a.lanes, b.lanes)}; }
SS_INLINE Integers operator-(Integers a, Integers b) { return {_mm512_sub_epi32(a.lanes, b.lanes)}; }
SS_INLINE Integers weighted_sum(int32_t pair, int first, int second) {
  const __m512i factors = repeat_word(static_cast<int>(static_cast<uint32_t>(second) << 16) | first);
  return {_mm512_madd_epi16(repeat_word(pair), factors)};
}

// 4 columns of 16 rows, a byte each: [row][column].
struct Bytes {
  __m512i lanes;

  static SS_INLINE Bytes load(const uint8_t* p) { return {_mm512_load_si512(p)}; }
  SS_INLINE void store(uint8_t* p) const { _mm512_store_si512(p, lanes); }
};
SS_INLINE Bytes masked(Bytes a, int mask) {
  return {_mm512_and_si512(a.lanes, _mm512_set1_epi8(static_cast<char>(mask)))};
}
// Bits of one byte move into its neighbour, so a mask follows.
SS_INLINE Bytes shifted_right(Bytes a, int bits) { return {_mm512_srli_epi16(a.lanes, bits)}; }
SS_INLINE Bytes shifted_left(Bytes a, int bits) { return {_mm512_slli_epi16(a.lanes, bits)}; }
SS_INLINE Bytes operator|(Bytes a, Bytes b) { return {_mm512_or_si512(a.lanes, b.lanes)}; }

// The codes that one token has for 4 columns, seen by every row.
struct Quad {
  __m512i bytes;

  static SS_INLINE Quad load(const int8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return {repeat_word(word)};
  }
};

// Sums of (code from 0 to 255) x (activation from -127 to 127).
struct UnsignedSums {
  __m512i lanes;

  static constexpr int max_steps(int) { return 1 << 10; }

  static SS_INLINE UnsignedSums first(Bytes codes, Quad x) {
    return {_mm512_dpbusd_epi32(_mm512_setzero_si512(), codes.lanes, x.bytes)};
  }
  SS_INLINE void add(Bytes codes, Quad x) { lanes = _mm512_dpbusd_epi32(lanes, codes.lanes, x.bytes); }
  SS_INLINE Integers total() const { return {lanes}; }
};

// The multiplication wants the weights unsigned: w + 128 is, and 128 x the sum of the activations is taken
// off.
struct SignedSums : UnsignedSums {
  static constexpr int kBias = 128;

  static SS_INLINE Bytes prepared(Bytes codes) {
    return {_mm512_xor_si512(codes.lanes, _mm512_set1_epi8(static_cast<char>(0x80)))};
  }
  static SS_INLINE SignedSums first(Bytes codes, Quad x) {
    SignedSums made;
    made.lanes = UnsignedSums::first(codes, x).lanes;
    return made;
  }
};

// With 32 registers nothing has to be pinned.
SS_INLINE void keep_in_register(Bytes&) {}
template <class Sums>
SS_INLINE void keep_sums(Sums&) {}

SS_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace slipstream
