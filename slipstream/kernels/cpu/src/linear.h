// How is a whole matrix multiplied, looked up in, or searched for its greatest column?
//
// Each function is the part of one thread of a body that all threads of the pool run. Work is split by tiles
// of weights, so that every weight is read by one thread; a tile stays in its cache while all tokens pass.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "activations.h"
#include "matmul.h"
#include "matrix.h"
#include "pool.h"
#include "simd.h"

namespace slipstream {

// The half-open share of `count` things that `thread` of `threads` takes.
struct Share {
  int begin, end;

  static Share of(int count, int thread, int threads) {
    const int64_t wide = count;
    return {static_cast<int>(wide * thread / threads), static_cast<int>(wide * (thread + 1) / threads)};
  }
};

// Quantises this thread's groups of every token. With one token the groups are split too.
inline void quantize_share(const float* x, int tokens, const Activations& out, int thread, int threads) {
  if (tokens >= threads) {
    const Share mine = Share::of(tokens, thread, threads);
    for (int t = mine.begin; t < mine.end; ++t) out.quantize(x + static_cast<size_t>(t) * out.cols, t);
    return;
  }
  const Share mine = Share::of(tokens * out.groups, thread, threads);
  for (int i = mine.begin; i < mine.end; ++i) {
    const int token = i / out.groups, group = i % out.groups, first = group * kGroup;
    const float* from = x + static_cast<size_t>(token) * out.cols + first;
    if (first + kGroup <= out.cols) {
      out.quantize_group(from, token, group);
      continue;
    }
    float rest[kGroup] = {};
    std::memcpy(rest, from, (out.cols - first) * sizeof(float));
    out.quantize_group(rest, token, group);
  }
}

// Writes at most 16 results of a token where they belong.
inline void store_rows(const float* tile, int count, const float* bias, float* y) {
  for (int row = 0; row < count; ++row) y[row] = bias == nullptr ? tile[row] : tile[row] + bias[row];
}

// y [tokens, rows] = x times this thread's rows, plus `bias` [rows] unless it is null.
inline void linear_share(const Matrix& matrix, const Activations& x, int tokens, const float* bias, float* y,
                         int thread, int threads) {
  const Share mine = Share::of(num_tiles(matrix.rows), thread, threads);
  alignas(kAlignment) float results[kTokens * kTileRows];
  for (int tile = mine.begin; tile < mine.end; ++tile) {
    const int first_row = tile * kTileRows;
    const int count = matrix.rows - first_row < kTileRows ? matrix.rows - first_row : kTileRows;
    const Tile weights = open_tile(matrix, tile, tokens);
    const bool is_direct = count == kTileRows && bias == nullptr;
    for (int token = 0; token < tokens; token += kTokens) {
      const int num_tokens = tokens - token < kTokens ? tokens - token : kTokens;
      float* out = y + static_cast<size_t>(token) * matrix.rows + first_row;
      if (is_direct) {
        matmul_tile<false>(weights, x, token, num_tokens, out, matrix.rows);
        continue;
      }
      matmul_tile<false>(weights, x, token, num_tokens, results, kTileRows);
      for (int t = 0; t < num_tokens; ++t) {
        store_rows(results + t * kTileRows, count, bias == nullptr ? nullptr : bias + first_row,
                   out + static_cast<size_t>(t) * matrix.rows);
      }
    }
  }
}

inline size_t linear_scratch_bytes(int kind, int cols, int tokens) {
  return Activations::bytes(tokens, cols, is_float_kind(kind), !is_float_kind(kind));
}

inline void linear(const Matrix& matrix, const float* x, float* y, int tokens, const float* bias,
                   void* scratch) {
  const bool is_float = is_float_kind(matrix.kind);
  const Activations carried = Activations::carve(scratch, tokens, matrix.cols, is_float, !is_float);
  Pool& threads_of_process = pool();
  threads_of_process.run([&](int thread, int threads) {
    quantize_share(x, tokens, carried, thread, threads);
    threads_of_process.barrier();
    linear_share(matrix, carried, tokens, bias, y, thread, threads);
  });
}

// One group of a row back in floats: scale x code + minimum. Both products are exact, so only the sum rounds.
inline void dequantize_group(const Matrix& matrix, const uint8_t* tile, int place, int group, float* out) {
  const int kind = matrix.kind;
  const uint8_t* codes = tile + group * group_code_bytes(kind) + place * 4;
  const uint8_t* scales = tile + code_bytes(kind, matrix.cols);
  const auto half_at = [&](int index) {
    uint16_t bits;
    std::memcpy(&bits, scales + group * group_scale_bytes(kind) + (index * kTileRows + place) * 2, 2);
    return half_bits_to_float(bits);
  };
  float scale[2], minimum = 0.0f;
  if (kind == kQ8Row) {
    std::memcpy(scale, scales + place * 4, 4);
    scale[1] = scale[0];
  } else {
    scale[0] = half_at(0);
    scale[1] = kind == kQ6 ? half_at(1) : scale[0];
    minimum = has_minima(kind) ? half_at(1) : 0.0f;
  }
  for (int column = 0; column < kGroup; ++column) {
    const int code = code_at(kind, codes, column) - code_offset(kind);
    out[column] = scale[column / 16] * static_cast<float>(code) + minimum;
  }
}

// Writes row `row` as `cols` floats.
inline void dequantize_row(const Matrix& matrix, int row, float* out) {
  const int kind = matrix.kind, place = row % kTileRows;
  const uint8_t* tile = matrix.data + row / kTileRows * tile_bytes(kind, matrix.cols);
  if (is_float_kind(kind)) {
    const size_t size = kind == kF32 ? 4 : 2;
    for (int column = 0; column < matrix.cols; ++column) {
      // The upper half of a float is a bfloat16.
      uint32_t bits = 0;
      std::memcpy(reinterpret_cast<uint8_t*>(&bits) + 4 - size,
                  tile + (column * size_t{kTileRows} + place) * size, size);
      std::memcpy(out + column, &bits, 4);
    }
    return;
  }
  const int whole = matrix.cols / kGroup;
  for (int group = 0; group < whole; ++group)
    dequantize_group(matrix, tile, place, group, out + group * kGroup);
  if (whole * kGroup == matrix.cols) return;
  float rest[kGroup];
  dequantize_group(matrix, tile, place, whole, rest);
  std::memcpy(out + whole * kGroup, rest, (matrix.cols - whole * kGroup) * sizeof(float));
}

// Writes this thread's tokens of `scale` x rows `ids`.
inline void embedding_share(const Matrix& matrix, const int64_t* ids, int tokens, float scale, float* out,
                            int thread, int threads) {
  const Share mine = Share::of(tokens, thread, threads);
  for (int token = mine.begin; token < mine.end; ++token) {
    float* row = out + static_cast<size_t>(token) * matrix.cols;
    dequantize_row(matrix, static_cast<int>(ids[token]), row);
    if (scale == 1.0f) continue;
    for (int column = 0; column < matrix.cols; ++column) row[column] *= scale;
  }
}

// The lowest index of the greatest of `count` floats, or -1 where one is NaN.
inline int64_t argmax(const float* x, int count) {
  const int whole = count / kLanes * kLanes;
  float best = -std::numeric_limits<float>::infinity();
  bool has_nan = false;
  if (whole > 0) {
    Floats most = Floats::load(x), sum = Floats::set(0.0f);
    const Floats zero = Floats::set(0.0f);
    for (int i = 0; i < whole; i += kLanes) {
      const Floats v = Floats::load(x + i);
      most = max(most, v);
      // min and max lose a NaN; a product with 0 keeps it, and turns an infinity into one.
      sum = fma(v, zero, sum);
    }
    best = horizontal_max(most);
    has_nan = std::isnan(horizontal_sum(sum));
  }
  for (int i = whole; i < count; ++i) {
    has_nan = has_nan || std::isnan(x[i]);
    best = x[i] > best ? x[i] : best;
  }
  // Rare: an infinity or a NaN is there, so look at each.
  if (has_nan) {
    best = -std::numeric_limits<float>::infinity();
    for (int i = 0; i < count; ++i) {
      if (std::isnan(x[i])) return -1;
      best = x[i] > best ? x[i] : best;
    }
  }
  int found = 0;
  while (found < count && x[found] != best) ++found;
  return found < count ? found : -1;
}

}  // namespace slipstream
