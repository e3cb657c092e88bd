// What happens to a row between its products: residual adds, norms, rotary positions, activation functions.
//
// Invariant: each row is computed by itself, its sums in one fixed order.
#pragma once

#include <cmath>
#include <cstdint>

#include "vec8.h"

namespace slipstream {

enum Activation : int32_t { kSilu = 0, kGeluTanh = 1, kGelu = 2, kRelu = 3 };

inline void add_rows(float* x, const float* y, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) store8(x + i, load8(x + i) + load8(y + i));
  for (; i < count; ++i) x[i] += y[i];
}

// y = x / sqrt(mean(x^2) + eps) * weight; y may be x.
inline void rms_norm(const float* x, const float* weight, float eps, int count, float* y) {
  Vec8 first = vec8(0.0f), second = vec8(0.0f);
  int i = 0;
  for (; i + 16 <= count; i += 16) {
    const Vec8 a = load8(x + i), b = load8(x + i + 8);
    first = fma8(a, a, first);
    second = fma8(b, b, second);
  }
  float total = sum8(first + second);
  for (; i < count; ++i) total = std::fma(x[i], x[i], total);
  const float factor = 1.0f / std::sqrt(total / static_cast<float>(count) + eps);
  const Vec8 factors = vec8(factor);
  for (i = 0; i + 8 <= count; i += 8) store8(y + i, load8(x + i) * factors * load8(weight + i));
  for (; i < count; ++i) y[i] = x[i] * factor * weight[i];
}

inline void layer_norm(const float* x, const float* weight, const float* bias, float eps, int count, float* y) {
  float mean = 0.0f, variance = 0.0f;
  for (int i = 0; i < count; ++i) mean += x[i];
  mean /= static_cast<float>(count);
  for (int i = 0; i < count; ++i) variance = std::fma(x[i] - mean, x[i] - mean, variance);
  const float factor = 1.0f / std::sqrt(variance / static_cast<float>(count) + eps);
  for (int i = 0; i < count; ++i) y[i] = (x[i] - mean) * factor * weight[i] + bias[i];
}

// erf after Abramowitz and Stegun, 7.1.26: an absolute error of at most 1.5e-7.
SS_INLINE Vec8 erf8(Vec8 x) {
  const Vec8 one = vec8(1.0f), zero = vec8(0.0f);
  const Vec8 magnitude = max8(x, zero - x);
  const Vec8 t = one / fma8(vec8(0.3275911f), magnitude, one);
  Vec8 p = vec8(1.061405429f);
  p = fma8(p, t, vec8(-1.453152027f));
  p = fma8(p, t, vec8(1.421413741f));
  p = fma8(p, t, vec8(-0.284496736f));
  p = fma8(p, t, vec8(0.254829592f));
  const Vec8 positive = one - p * t * exp8(zero - magnitude * magnitude);
  // The sign of x: 1 or -1 for all but the tiniest x, where erf is about 0 anyway.
  const Vec8 sign = x / max8(magnitude, vec8(1e-30f));
  return positive * sign;
}

SS_INLINE Vec8 activate(Vec8 x, int32_t activation) {
  const Vec8 one = vec8(1.0f), half = vec8(0.5f);
  switch (activation) {
    case kSilu:
      return x / (one + exp8(vec8(0.0f) - x));
    case kGeluTanh: {
      const Vec8 inner = vec8(0.7978845608f) * fma8(vec8(0.044715f) * x * x, x, x);
      return half * x * (one + tanh8(inner));
    }
    case kGelu:
      return half * x * (one + erf8(x * vec8(0.7071067812f)));
    default:
      return max8(x, vec8(0.0f));
  }
}

// Turns one head by its position; `table` holds cosines, then signed sines.
inline void rotate(float* head, const float* table, int head_dim, bool is_interleaved) {
  const float *cosines = table, *sines = table + head_dim;
  if (is_interleaved) {
    for (int i = 0; i < head_dim; i += 2) {
      const float a = head[i], b = head[i + 1];
      head[i] = std::fma(b, sines[i], a * cosines[i]);
      head[i + 1] = std::fma(a, sines[i + 1], b * cosines[i + 1]);
    }
    return;
  }
  const int half = head_dim / 2;
  int i = 0;
  for (; i + 8 <= half; i += 8) {
    const Vec8 a = load8(head + i), b = load8(head + i + half);
    store8(head + i, fma8(b, load8(sines + i), a * load8(cosines + i)));
    store8(head + i + half, fma8(a, load8(sines + i + half), b * load8(cosines + i + half)));
  }
  for (; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = std::fma(b, sines[i], a * cosines[i]);
    head[i + half] = std::fma(a, sines[i + half], b * cosines[i + half]);
  }
}

}  // namespace slipstream
