// What do 16 lanes look like on AVX2? Two registers of 256 bits each.
//
// The interface is that of simd.h; lane i of every type is row i of a weight tile. There are only 16
// registers and no dot product of bytes: products of two bytes are added in 16 bits, as often as that is
// exact.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace slipstream {

// 6 tokens x 2 halves of a tile, one activation and the weights fill the registers.
constexpr int kTokens = 6;
constexpr int kRegisterVectors = 8;

// Stops the compiler from moving `v` to the stack and back around every use, which GCC 12 does to
// accumulators.
SS_INLINE void keep_in_register(__m256i& v) { asm volatile("" : "+x"(v)); }

struct Floats {
  __m256 low, high;

  static SS_INLINE Floats set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static SS_INLINE Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static SS_INLINE Floats load_half(const uint16_t* p) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
  }
  static SS_INLINE Floats load_bfloat(const uint16_t* p) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(p);
    const __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128(halves));
    const __m256i high = _mm256_cvtepu16_epi32(_mm_loadu_si128(halves + 1));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
  }
  SS_INLINE void store(float* p) const {
    _mm256_storeu_ps(p, low);
    _mm256_storeu_ps(p + 8, high);
  }
  SS_INLINE void store_half(uint16_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT));
  }
  // Lanes hold integers from -128 to 127.
  SS_INLINE void store_int8(int8_t* p) const {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(low), _mm256_cvtps_epi32(high));
    const __m256i in_order = _mm256_permute4x64_epi64(words, 0xD8);
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(in_order), _mm256_extracti128_si256(in_order, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }
};

SS_INLINE Floats operator+(Floats a, Floats b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
SS_INLINE Floats operator-(Floats a, Floats b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
SS_INLINE Floats operator*(Floats a, Floats b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
SS_INLINE Floats operator/(Floats a, Floats b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
SS_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
SS_INLINE Floats max(Floats a, Floats b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
SS_INLINE Floats min(Floats a, Floats b) {
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
SS_INLINE Floats round_to_even(Floats a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, kMode), _mm256_round_ps(a.high, kMode)};
}
SS_INLINE Floats zero_where_less(Floats value, Floats x, Floats limit) {
  return {_mm256_andnot_ps(_mm256_cmp_ps(x.low, limit.low, _CMP_LT_OQ), value.low),
          _mm256_andnot_ps(_mm256_cmp_ps(x.high, limit.high, _CMP_LT_OQ), value.high)};
}
SS_INLINE Floats power_of_two(Floats n) {
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i low = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.low), bias), 23);
  const __m256i high = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.high), bias), 23);
  return {_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)};
}
SS_INLINE float horizontal_sum(Floats a) {
  const __m256 by_8 = _mm256_add_ps(a.low, a.high);
  const __m128 by_4 = _mm_add_ps(_mm256_castps256_ps128(by_8), _mm256_extractf128_ps(by_8, 1));
  const __m128 by_2 = _mm_add_ps(by_4, _mm_movehl_ps(by_4, by_4));
  return _mm_cvtss_f32(_mm_add_ss(by_2, _mm_movehdup_ps(by_2)));
}
SS_INLINE float horizontal_max(Floats a) {
  const __m256 by_8 = _mm256_max_ps(a.low, a.high);
  const __m128 by_4 = _mm_max_ps(_mm256_castps256_ps128(by_8), _mm256_extractf128_ps(by_8, 1));
  const __m128 by_2 = _mm_max_ps(by_4, _mm_movehl_ps(by_4, by_4));
  return _mm_cvtss_f32(_mm_max_ss(by_2, _mm_movehdup_ps(by_2)));
}
SS_INLINE uint32_t largest_magnitude_bits(Floats a, Floats b) {
  const __m256i no_sign = _mm256_set1_epi32(0x7fffffff);
  const auto bits = [no_sign](__m256 v) { return _mm256_and_si256(_mm256_castps_si256(v), no_sign); };
  const __m256i by_8 = _mm256_max_epi32(_mm256_max_epi32(bits(a.low), bits(a.high)),
                                        _mm256_max_epi32(bits(b.low), bits(b.high)));
  const __m128i by_4 = _mm_max_epi32(_mm256_castsi256_si128(by_8), _mm256_extracti128_si256(by_8, 1));
  const __m128i by_2 = _mm_max_epi32(by_4, _mm_shuffle_epi32(by_4, 0x4E));
  const __m128i last = _mm_max_epi32(by_2, _mm_shuffle_epi32(by_2, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(last));
}
SS_INLINE float half_bits_to_float(uint16_t bits) { return _cvtsh_ss(bits); }
SS_INLINE uint16_t float_to_half_bits(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

struct Integers {
  __m256i low, high;

  SS_INLINE Floats to_floats() const { return {_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)}; }
};
SS_INLINE Integers operator+(Integers a, Integers b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
SS_INLINE Integers operator-(Integers a, Integers b) {
  return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)};
}
SS_INLINE Integers weighted_sum(int32_t pair, int first, int second) {
  const __m256i factors = _mm256_set1_epi32(static_cast<int>(static_cast<uint32_t>(second) << 16) | first);
  const __m256i sum = _mm256_madd_epi16(_mm256_set1_epi32(pair), factors);
  return {sum, sum};
}

// 4 columns of 16 rows, a byte each: [row][column].
struct Bytes {
  __m256i low, high;

  static SS_INLINE Bytes load(const uint8_t* p) {
    const __m256i* halves = reinterpret_cast<const __m256i*>(p);
    return {_mm256_load_si256(halves), _mm256_load_si256(halves + 1)};
  }
  SS_INLINE void store(uint8_t* p) const {
    __m256i* halves = reinterpret_cast<__m256i*>(p);
    _mm256_store_si256(halves, low);
    _mm256_store_si256(halves + 1, high);
  }
};
SS_INLINE Bytes masked(Bytes a, int mask) {
  const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
  return {_mm256_and_si256(a.low, m), _mm256_and_si256(a.high, m)};
}
// Bits of one byte move into its neighbour, so a mask follows.
SS_INLINE Bytes shifted_right(Bytes a, int bits) {
  return {_mm256_srli_epi16(a.low, bits), _mm256_srli_epi16(a.high, bits)};
}
SS_INLINE Bytes shifted_left(Bytes a, int bits) {
  return {_mm256_slli_epi16(a.low, bits), _mm256_slli_epi16(a.high, bits)};
}
SS_INLINE Bytes operator|(Bytes a, Bytes b) {
  return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
}
SS_INLINE void keep_in_register(Bytes& a) {
  keep_in_register(a.low);
  keep_in_register(a.high);
}

// The codes that one token has for 4 columns, seen by every row.
struct Quad {
  __m256i bytes;

  static SS_INLINE Quad load(const int8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return {_mm256_set1_epi32(word)};
  }
};

// Sums of (code from 0 to max_code) x (activation from -127 to 127), two neighbours at once in 16 bits. Exact
// for max_steps(max_code) steps: 8 x 2 x 15 x 127 = 30480, 4 x 2 x 31 x 127 = 31496, 2 x 2 x 63 x 127 =
// 32004.
struct UnsignedSums {
  __m256i low, high;

  static constexpr int max_steps(int max_code) { return 32767 / (2 * 127 * max_code); }

  static SS_INLINE UnsignedSums first(Bytes codes, Quad x) {
    return {_mm256_maddubs_epi16(codes.low, x.bytes), _mm256_maddubs_epi16(codes.high, x.bytes)};
  }
  SS_INLINE void add(Bytes codes, Quad x) {
    low = _mm256_add_epi16(low, _mm256_maddubs_epi16(codes.low, x.bytes));
    high = _mm256_add_epi16(high, _mm256_maddubs_epi16(codes.high, x.bytes));
  }
  SS_INLINE Integers total() const {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones)};
  }
};

// Sums of (code from -128 to 127) x (activation from -127 to 127). The multiplication wants one side
// unsigned: |w| x (x with the sign of w); a pair is at most 2 x 128 x 127 = 32512.
struct SignedSums {
  __m256i low, high;

  static constexpr int kBias = 0;
  static constexpr int max_steps(int) { return 1 << 10; }
  static SS_INLINE Bytes prepared(Bytes codes) { return codes; }

  static SS_INLINE __m256i product(__m256i codes, Quad x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x.bytes, codes));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  static SS_INLINE SignedSums first(Bytes codes, Quad x) {
    return {product(codes.low, x), product(codes.high, x)};
  }
  SS_INLINE void add(Bytes codes, Quad x) {
    low = _mm256_add_epi32(low, product(codes.low, x));
    high = _mm256_add_epi32(high, product(codes.high, x));
  }
  SS_INLINE Integers total() const { return {low, high}; }
};

template <class Sums>
SS_INLINE void keep_sums(Sums& sums) {
  keep_in_register(sums.low);
  keep_in_register(sums.high);
}

SS_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace slipstream
