// How does one vector type cover AVX2, AVX-512 and NEON? 16 lanes, in as many registers as they take.
//
// Invariant: an operation does to a lane what it does to it on every other instruction set, and sums over
// lanes follow one fixed tree (i with i + 8, then 4, 2, 1), so that results are the same to the bit on all of
// them. A file per instruction set holds the registers; what is composed of those operations stands here:
//   Floats        16 floats: arithmetic, conversions, rounding, sums and maxima over lanes
//   Integers      16 sums of 32 bits
//   Bytes, Quad   the codes of a weight tile and of a token; UnsignedSums and SignedSums multiply them
// kTokens is the most tokens that meet a tile at once, kRegisterVectors how many Floats the registers hold.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef SS_INLINE
#define SS_INLINE inline __attribute__((always_inline))
#endif
// Loops over the few accumulators of a tile: unrolled, or they would live in memory.
#if defined(__clang__)
#define SS_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SS_UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#elif defined(__aarch64__)
#include "simd_neon.h"
#else
#error "The CPU kernels need AVX2 with FMA and F16C, AVX-512 VNNI, or 64-bit Arm"
#endif

namespace slipstream {

constexpr int kLanes = 16;

// e^x to about 2 units in the last place: 0 below -87.33, 2.4e38 above 88.37, NaN for NaN.
// e^x = 2^n e^r with |r| <= ln 2 / 2; ln 2 in two parts keeps r exact, and the Taylor terms up to r^7 / 7!
// leave an error of 7e-9.
SS_INLINE Floats exp(Floats x) {
  const Floats lowest = Floats::set(-87.33f);
  // Operands in this order: where x is NaN, x86 returns the second one.
  const Floats bounded = min(Floats::set(88.37f), max(lowest, x));
  const Floats n = round_to_even(bounded * Floats::set(1.44269504f));
  Floats r = fma(n, Floats::set(-0.693359375f), bounded);
  r = fma(n, Floats::set(2.12194440e-4f), r);
  Floats sum = Floats::set(1.0f / 5040.0f);
  sum = fma(sum, r, Floats::set(1.0f / 720.0f));
  sum = fma(sum, r, Floats::set(1.0f / 120.0f));
  sum = fma(sum, r, Floats::set(1.0f / 24.0f));
  sum = fma(sum, r, Floats::set(1.0f / 6.0f));
  sum = fma(sum, r, Floats::set(0.5f));
  sum = fma(sum, r, Floats::set(1.0f));
  sum = fma(sum, r, Floats::set(1.0f));
  return zero_where_less(sum * power_of_two(n), x, lowest);
}

// tanh(x) = 1 - 2 / (e^2x + 1), to 1.2e-7 absolute; near 0 that is not a relative bound.
SS_INLINE Floats tanh(Floats x) {
  const Floats one = Floats::set(1.0f);
  return one - Floats::set(2.0f) / (exp(x + x) + one);
}

}  // namespace slipstream
