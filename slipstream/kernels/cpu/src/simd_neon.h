// What do 16 lanes look like on 64-bit Arm? Four registers of 128 bits, of which there are 32.
//
// The interface is that of simd.h; lane i of every type is row i of a weight tile. With the dot-product
// extension one instruction multiplies 16 signed bytes with 16 others and adds them by fours into 32 bits;
// without it products are added in two steps.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace slipstream {

constexpr int kTokens = 4;
constexpr int kRegisterVectors = 8;

struct Floats {
  float32x4_t part[4];

  static SS_INLINE Floats set(float x) {
    const float32x4_t v = vdupq_n_f32(x);
    return {{v, v, v, v}};
  }
  static SS_INLINE Floats load(const float* p) {
    return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
  }
  static SS_INLINE Floats load_half(const uint16_t* p) {
    const float16x8_t low = vreinterpretq_f16_u16(vld1q_u16(p)),
                      high = vreinterpretq_f16_u16(vld1q_u16(p + 8));
    return {{vcvt_f32_f16(vget_low_f16(low)), vcvt_f32_f16(vget_high_f16(low)),
             vcvt_f32_f16(vget_low_f16(high)), vcvt_f32_f16(vget_high_f16(high))}};
  }
  static SS_INLINE Floats load_bfloat(const uint16_t* p) {
    Floats made;
    SS_UNROLL
    for (int i = 0; i < 4; ++i) made.part[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
    return made;
  }
  SS_INLINE void store(float* p) const {
    SS_UNROLL
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, part[i]);
  }
  SS_INLINE void store_half(uint16_t* p) const {
    SS_UNROLL
    for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(part[i])));
  }
  // Lanes hold integers from -128 to 127.
  SS_INLINE void store_int8(int8_t* p) const {
    const auto words = [this](int i) {
      return vcombine_s16(vmovn_s32(vcvtnq_s32_f32(part[i])), vmovn_s32(vcvtnq_s32_f32(part[i + 1])));
    };
    vst1q_s8(p, vcombine_s8(vmovn_s16(words(0)), vmovn_s16(words(2))));
  }
};

// One operation on all four parts.
template <class Operation>
SS_INLINE Floats each(Operation operation) {
  return {{operation(0), operation(1), operation(2), operation(3)}};
}
SS_INLINE Floats operator+(Floats a, Floats b) {
  return each([&](int i) { return vaddq_f32(a.part[i], b.part[i]); });
}
SS_INLINE Floats operator-(Floats a, Floats b) {
  return each([&](int i) { return vsubq_f32(a.part[i], b.part[i]); });
}
SS_INLINE Floats operator*(Floats a, Floats b) {
  return each([&](int i) { return vmulq_f32(a.part[i], b.part[i]); });
}
SS_INLINE Floats operator/(Floats a, Floats b) {
  return each([&](int i) { return vdivq_f32(a.part[i], b.part[i]); });
}
SS_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return each([&](int i) { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); });
}
SS_INLINE Floats max(Floats a, Floats b) {
  return each([&](int i) { return vmaxq_f32(a.part[i], b.part[i]); });
}
SS_INLINE Floats min(Floats a, Floats b) {
  return each([&](int i) { return vminq_f32(a.part[i], b.part[i]); });
}
SS_INLINE Floats round_to_even(Floats a) {
  return each([&](int i) { return vrndnq_f32(a.part[i]); });
}
SS_INLINE Floats zero_where_less(Floats value, Floats x, Floats limit) {
  return each([&](int i) {
    const uint32x4_t is_less = vcltq_f32(x.part[i], limit.part[i]);
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value.part[i]), is_less));
  });
}
SS_INLINE Floats power_of_two(Floats n) {
  return each([&](int i) {
    const int32x4_t biased = vaddq_s32(vcvtnq_s32_f32(n.part[i]), vdupq_n_s32(127));
    return vreinterpretq_f32_s32(vshlq_n_s32(biased, 23));
  });
}
SS_INLINE float horizontal_sum(Floats a) {
  const float32x4_t by_4 = vaddq_f32(vaddq_f32(a.part[0], a.part[2]), vaddq_f32(a.part[1], a.part[3]));
  const float32x2_t by_2 = vadd_f32(vget_low_f32(by_4), vget_high_f32(by_4));
  return vget_lane_f32(by_2, 0) + vget_lane_f32(by_2, 1);
}
SS_INLINE float horizontal_max(Floats a) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.part[0], a.part[2]), vmaxq_f32(a.part[1], a.part[3])));
}
SS_INLINE uint32_t largest_magnitude_bits(Floats a, Floats b) {
  uint32x4_t most = vdupq_n_u32(0);
  SS_UNROLL
  for (int i = 0; i < 4; ++i) {
    most = vmaxq_u32(most, vreinterpretq_u32_f32(vabsq_f32(a.part[i])));
    most = vmaxq_u32(most, vreinterpretq_u32_f32(vabsq_f32(b.part[i])));
  }
  return vmaxvq_u32(most);
}
SS_INLINE float half_bits_to_float(uint16_t bits) {
  __fp16 half;
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}
SS_INLINE uint16_t float_to_half_bits(float x) {
  const __fp16 half = static_cast<__fp16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

struct Integers {
  int32x4_t part[4];

  SS_INLINE Floats to_floats() const {
    return each([this](int i) { return vcvtq_f32_s32(part[i]); });
  }
};
SS_INLINE Integers operator+(Integers a, Integers b) {
  SS_UNROLL
  for (int i = 0; i < 4; ++i) a.part[i] = vaddq_s32(a.part[i], b.part[i]);
  return a;
}
SS_INLINE Integers operator-(Integers a, Integers b) {
  SS_UNROLL
  for (int i = 0; i < 4; ++i) a.part[i] = vsubq_s32(a.part[i], b.part[i]);
  return a;
}
SS_INLINE Integers weighted_sum(int32_t pair, int first, int second) {
  const int32x4_t sum = vdupq_n_s32(static_cast<int16_t>(pair) * first + (pair >> 16) * second);
  return {{sum, sum, sum, sum}};
}

// 4 columns of 16 rows, a byte each: [row][column].
struct Bytes {
  uint8x16_t part[4];

  static SS_INLINE Bytes load(const uint8_t* p) {
    return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
  }
  SS_INLINE void store(uint8_t* p) const {
    SS_UNROLL
    for (int i = 0; i < 4; ++i) vst1q_u8(p + 16 * i, part[i]);
  }
};
SS_INLINE Bytes masked(Bytes a, int mask) {
  SS_UNROLL
  for (int i = 0; i < 4; ++i) a.part[i] = vandq_u8(a.part[i], vdupq_n_u8(static_cast<uint8_t>(mask)));
  return a;
}
SS_INLINE Bytes shifted_left(Bytes a, int bits) {
  SS_UNROLL
  for (int i = 0; i < 4; ++i) a.part[i] = vshlq_u8(a.part[i], vdupq_n_s8(static_cast<int8_t>(bits)));
  return a;
}
SS_INLINE Bytes shifted_right(Bytes a, int bits) { return shifted_left(a, -bits); }
SS_INLINE Bytes operator|(Bytes a, Bytes b) {
  SS_UNROLL
  for (int i = 0; i < 4; ++i) a.part[i] = vorrq_u8(a.part[i], b.part[i]);
  return a;
}

// The codes that one token has for 4 columns, seen by every row.
struct Quad {
  int8x16_t bytes;

  static SS_INLINE Quad load(const int8_t* p) {
    return {vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const int32_t*>(p)))};
  }
};

SS_INLINE int32x4_t add_dot(int32x4_t sum, int8x16_t a, int8x16_t b) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sum, a, b);
#else
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}

// Sums of (code from -128 to 127) x (activation from -127 to 127); unsigned codes here are at most 63.
struct SignedSums {
  int32x4_t part[4];

  static constexpr int kBias = 0;
  static constexpr int max_steps(int) { return 1 << 10; }
  static SS_INLINE Bytes prepared(Bytes codes) { return codes; }

  static SS_INLINE SignedSums first(Bytes codes, Quad x) {
    const int32x4_t zero = vdupq_n_s32(0);
    SignedSums made{{zero, zero, zero, zero}};
    made.add(codes, x);
    return made;
  }
  SS_INLINE void add(Bytes codes, Quad x) {
    SS_UNROLL
    for (int i = 0; i < 4; ++i) part[i] = add_dot(part[i], vreinterpretq_s8_u8(codes.part[i]), x.bytes);
  }
  SS_INLINE Integers total() const { return {{part[0], part[1], part[2], part[3]}}; }
};
using UnsignedSums = SignedSums;

// GCC 12 would load the activations of many quads ahead and move sums to the stack to make room for them.
SS_INLINE void keep_in_register(Bytes& a) {
  asm volatile("" : "+w"(a.part[0]), "+w"(a.part[1]), "+w"(a.part[2]), "+w"(a.part[3]));
}
SS_INLINE void keep_sums(SignedSums& a) {
  asm volatile("" : "+w"(a.part[0]), "+w"(a.part[1]), "+w"(a.part[2]), "+w"(a.part[3]));
}

SS_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace slipstream
