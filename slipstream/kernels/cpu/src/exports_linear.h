// What does Python call of the matrix kernels? C functions over pointers and sizes.
//
// A caller passes contiguous memory of the sizes named here; ids and kinds are checked, sizes are not.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "gguf_blocks.h"
#include "linear.h"
#include "matrix.h"
#include "pack.h"
#include "pool.h"

#ifndef SS_EXPORT
#ifdef _WIN32
#define SS_EXPORT extern "C" __declspec(dllexport)
#else
#define SS_EXPORT extern "C" __attribute__((visibility("default")))
#endif
#endif

// Bytes of a packed matrix, or of a run of whole tiles; 0 for an unknown kind.
SS_EXPORT size_t ss_matrix_bytes(int32_t kind, int32_t rows, int32_t cols) {
  return slipstream::is_known_kind(kind) ? slipstream::matrix_bytes(kind, rows, cols) : 0;
}

// Packs `num_rows` rows of `source` (slipstream::Source), padded to whole tiles, into ss_matrix_bytes at
// `out`. Returns slipstream::PackStatus.
SS_EXPORT int32_t ss_pack(int32_t kind, int32_t source, const void* rows, int32_t num_rows, int32_t cols,
                          void* out) {
  using namespace slipstream;
  const PackStatus status = check_pack(kind, source, cols);
  if (status != kPacked) return status;
  const uint8_t* from = static_cast<const uint8_t*>(rows);
  const size_t stride = source_row_bytes(source, cols), step = tile_bytes(kind, cols);
  std::atomic<bool> is_finite{true};
  pool().run([&](int thread, int threads) {
    const Share mine = Share::of(num_tiles(num_rows), thread, threads);
    for (int tile = mine.begin; tile < mine.end; ++tile) {
      const int first = tile * kTileRows;
      const int count = num_rows - first < kTileRows ? num_rows - first : kTileRows;
      uint8_t* tile_out = static_cast<uint8_t*>(out) + tile * step;
      if (!pack_tile(kind, source, from + first * stride, count, cols, tile_out)) is_finite = false;
    }
  });
  return is_finite ? kPacked : kNotFinite;
}

SS_EXPORT size_t ss_linear_scratch_bytes(int32_t kind, int32_t cols, int32_t tokens) {
  return slipstream::linear_scratch_bytes(kind, cols, tokens);
}

// y [tokens, rows] = x [tokens, cols] times the matrix's rows, plus `bias` [rows] unless it is null.
SS_EXPORT void ss_linear(const slipstream::Matrix* matrix, const float* x, float* y, int32_t tokens,
                         const float* bias, void* scratch) {
  if (tokens > 0) slipstream::linear(*matrix, x, y, tokens, bias, scratch);
}

// out [tokens, cols] = `scale` x rows `ids`. Returns 0, or 1 where an id is no row, with nothing written.
SS_EXPORT int32_t ss_embedding(const slipstream::Matrix* matrix, const int64_t* ids, int32_t tokens,
                               float scale, float* out) {
  for (int32_t i = 0; i < tokens; ++i) {
    if (ids[i] < 0 || ids[i] >= matrix->rows) return 1;
  }
  slipstream::pool().run([&](int thread, int threads) {
    slipstream::embedding_share(*matrix, ids, tokens, scale, out, thread, threads);
  });
  return 0;
}

// out [rows] = the lowest index of the greatest of each row of x [rows, cols], or -1 where one is NaN.
SS_EXPORT void ss_argmax(const float* x, int32_t rows, int32_t cols, int64_t* out) {
  slipstream::pool().run([&](int thread, int threads) {
    const slipstream::Share mine = slipstream::Share::of(rows, thread, threads);
    for (int row = mine.begin; row < mine.end; ++row) {
      out[row] = slipstream::argmax(x + static_cast<size_t>(row) * cols, cols);
    }
  });
}
