// How does a tile of 16 rows meet a few tokens?
//
// The inner loop multiplies codes with codes in integers and applies scales once a group. Kinds differ in how
// a quad of 4 columns is unpacked (Nibbles, FiveBits, SixBits, SignedBytes) and in what a scale covers
// (Format); instruction sets differ in simd.h; the loops are the same.
//
// Invariant: integer sums are exact, and the groups of one (row, token) are added in ascending order by the
// same fused operations in every instance, so that a token's result does not depend on how many tokens are
// computed with it, on its place among them, on the thread, or on the instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "activations.h"
#include "matrix.h"
#include "simd.h"

namespace slipstream {

// One tile and its tokens; pointers stand at the first token.
struct TileJob {
  const uint8_t* codes;
  const uint8_t* scales;
  int groups;
  const int8_t* x_codes;
  const float* x_scales;
  const float* x_scaled_sums;
  const int32_t* x_sums;
  const float* x_rows;
  int row_stride;
  float* y;
  int ldy;
  bool adds;
  bool is_first;  // of those that meet this tile, so that its weights come from memory
};

// How far ahead of its use a weight is asked for: a group's time per byte times the latency of memory.
constexpr size_t kPrefetchBytes = 4096;

SS_INLINE Bytes nibbles_of(const uint8_t* codes, int quad) {
  const Bytes both = Bytes::load(codes + quad / 2 * kQuadBytes);
  return masked(quad % 2 == 0 ? both : shifted_right(both, 4), 15);
}

struct Nibbles {
  using Sums = UnsignedSums;
  static constexpr int kMaxCode = 15;
  static SS_INLINE Bytes quad(const uint8_t* codes, int quad) { return nibbles_of(codes, quad); }
};

struct FiveBits {
  using Sums = UnsignedSums;
  static constexpr int kMaxCode = 31;
  static SS_INLINE Bytes quad(const uint8_t* codes, int quad) {
    const Bytes plane = Bytes::load(codes + 4 * kQuadBytes);
    const Bytes moved = quad < 4 ? shifted_left(plane, 4 - quad) : shifted_right(plane, quad - 4);
    return nibbles_of(codes, quad) | masked(moved, 16);
  }
};

struct SixBits {
  using Sums = UnsignedSums;
  static constexpr int kMaxCode = 63;
  static SS_INLINE Bytes quad(const uint8_t* codes, int quad) {
    const Bytes plane = Bytes::load(codes + (4 + quad / 4) * kQuadBytes);
    const int bit = 2 * (quad % 4);
    const Bytes moved = bit < 4 ? shifted_left(plane, 4 - bit) : shifted_right(plane, bit - 4);
    return nibbles_of(codes, quad) | masked(moved, 48);
  }
};

struct SignedBytes {
  using Sums = SignedSums;
  static constexpr int kMaxCode = 127;
  static SS_INLINE Bytes quad(const uint8_t* codes, int quad) {
    return SignedSums::prepared(Bytes::load(codes + quad * kQuadBytes));
  }
};

// A byte a code, as `unpack_codes` leaves those of another form.
template <class Stored>
struct Unpacked {
  using Sums = typename Stored::Sums;
  static constexpr int kMaxCode = Stored::kMaxCode;
  static SS_INLINE Bytes quad(const uint8_t* codes, int quad) { return Bytes::load(codes + quad * kQuadBytes); }
};

template <Kind kKindOf, class CodesOf, size_t kCodeBytesOf = group_code_bytes(kKindOf)>
struct Format {
  using Codes = CodesOf;
  static constexpr Kind kKind = kKindOf;
  static constexpr size_t kCodeBytes = kCodeBytesOf;
  // Scales of a group: two where each covers 16 columns, none where one covers the row.
  static constexpr int kScales = kKind == kQ6 ? 2 : kKind == kQ8Row ? 0 : 1;
  static constexpr int kOffset =
      code_offset(kKind) + (kKind == kQ8Group || kKind == kQ8Row ? SignedSums::kBias : 0);
};

// Adds the products of quads kFirst .. kFirst + kCount - 1, moving to 32 bits as often as exactness wants it.
template <class Codes, int kNum, int kRun, int kFirst, int kCount>
SS_INLINE void add_quads(const uint8_t* codes, const int8_t* x, Integers (&totals)[kNum]) {
  using Sums = typename Codes::Sums;
  constexpr int kMaxSteps = Sums::max_steps(Codes::kMaxCode);
  constexpr int kSteps = kMaxSteps < kCount ? kMaxSteps : kCount;
  SS_UNROLL
  for (int start = kFirst; start < kFirst + kCount; start += kSteps) {
    Sums sums[kNum];
    SS_UNROLL
    for (int quad = start; quad < start + kSteps; ++quad) {
      Bytes w = Codes::quad(codes, quad);
      // Signed codes come with their magnitudes: pinning those too leaves too few registers.
      if (kNum > 1 && Codes::kMaxCode < 127) keep_in_register(w);
      SS_UNROLL
      for (int t = 0; t < kNum; ++t) {
        const Quad token = Quad::load(x + (quad * kRun + t) * 4);
        if (quad == start) {
          sums[t] = Sums::first(w, token);
        } else {
          sums[t].add(w, token);
        }
        if (kNum > 1) keep_sums(sums[t]);
      }
    }
    SS_UNROLL
    for (int t = 0; t < kNum; ++t) {
      totals[t] = start == kFirst ? sums[t].total() : totals[t] + sums[t].total();
    }
  }
}

// The running sums of a tile, [token][row]. Where they and the integer sums would fill more than half of the
// registers they stay in memory, on purpose: a group loads and stores them once, the integers many times.
template <int kNum>
struct Totals {
  static constexpr bool kInMemory = 4 * kNum > kRegisterVectors;
  alignas(kAlignment) float values[kNum][kLanes];
  Floats registers[kNum];

  SS_INLINE void clear() {
    SS_UNROLL
    for (int t = 0; t < kNum; ++t) put(t, Floats::set(0.0f));
  }
  SS_INLINE Floats get(int t) const { return kInMemory ? Floats::load(values[t]) : registers[t]; }
  SS_INLINE void put(int t, Floats x) {
    if (kInMemory) {
      x.store(values[t]);
    } else {
      registers[t] = x;
    }
  }
  // The compiler may carry nothing of `values` across this in registers.
  SS_INLINE void settle() {
    if (kInMemory) asm volatile("" : "+m"(values));
  }
};

template <int kNum>
SS_INLINE void finish(const TileJob& job, Totals<kNum>& totals) {
  SS_UNROLL
  for (int t = 0; t < kNum; ++t) {
    float* y = job.y + static_cast<size_t>(t) * job.ldy;
    const Floats total = totals.get(t);
    (job.adds ? total + Floats::load(y) : total).store(y);
  }
}

// Adds one scale's worth of sums to the totals: quads kFirst .. kFirst + kCount - 1 of a group.
template <class Format, int kNum, int kRun, int kFirst, int kCount>
SS_INLINE void add_scaled(const TileJob& job, const uint8_t* codes, const uint16_t* scale, int group,
                          Totals<kNum>& totals) {
  Integers sums[kNum];
  const int8_t* x_codes = job.x_codes + group * 8 * kRun * 4;
  add_quads<typename Format::Codes, kNum, kRun, kFirst, kCount>(codes, x_codes, sums);
  const Floats weight_scale = Format::kScales == 0 ? Floats::set(1.0f) : Floats::load_half(scale);
  const Floats minimum = has_minima(Format::kKind) ? Floats::load_half(scale + kTileRows) : weight_scale;
  constexpr int kOffset = Format::kOffset;
  // Or they would be loaded before the integer sums, and moved to the stack while those are made. Signed codes
  // leave the compiler no register to do so.
  if (Format::Codes::kMaxCode < 127) totals.settle();
  SS_UNROLL
  for (int t = 0; t < kNum; ++t) {
    if constexpr (kOffset != 0) {
      const int32_t both = job.x_sums[group * kRun + t];
      sums[t] = sums[t] - weighted_sum(both, kFirst == 0 ? kOffset : 0, kFirst + kCount == 8 ? kOffset : 0);
    }
    Floats total = totals.get(t);
    if constexpr (has_minima(Format::kKind)) {
      total = fma(minimum, Floats::set(job.x_scaled_sums[group * kRun + t]), total);
    }
    const Floats token_scale = Floats::set(job.x_scales[group * kRun + t]);
    const Floats both_scales = Format::kScales == 0 ? token_scale : weight_scale * token_scale;
    totals.put(t, fma(sums[t].to_floats(), both_scales, total));
  }
}

template <class Format, int kNum, int kRun>
__attribute__((noinline)) void quantized_tile(const TileJob& job) {
  constexpr size_t kCodeStep = Format::kCodeBytes;
  constexpr size_t kScaleStep = group_scale_bytes(Format::kKind);
  const uint8_t* codes = job.codes;
  const uint16_t* scale = reinterpret_cast<const uint16_t*>(job.scales);
  // Tiles follow each other, codes then scales: what is fetched ahead runs through them as through one stream.
  const uint8_t* ahead = job.codes + kPrefetchBytes;
  Totals<kNum> totals;
  totals.clear();
  for (int group = 0; group < job.groups; ++group, codes += kCodeStep, scale += kScaleStep / 2) {
    if (kRun == 1 || job.is_first) {
      SS_UNROLL
      for (size_t line = 0; line < kCodeStep + kScaleStep; line += 64) prefetch(ahead + line);
      ahead += kCodeStep + kScaleStep;
    }
    if constexpr (Format::kScales == 2) {
      add_scaled<Format, kNum, kRun, 0, 4>(job, codes, scale, group, totals);
      totals.settle();
      add_scaled<Format, kNum, kRun, 4, 4>(job, codes, scale + kTileRows, group, totals);
    } else {
      add_scaled<Format, kNum, kRun, 0, 8>(job, codes, scale, group, totals);
    }
    totals.settle();
  }
  if constexpr (Format::kKind == kQ8Row) {
    const Floats row_scale = Floats::load(reinterpret_cast<const float*>(job.scales));
    SS_UNROLL
    for (int t = 0; t < kNum; ++t) totals.put(t, totals.get(t) * row_scale);
  }
  finish<kNum>(job, totals);
}

template <Kind kKind>
SS_INLINE Floats float_column(const uint8_t* column) {
  if constexpr (kKind == kF32) {
    return Floats::load(reinterpret_cast<const float*>(column));
  } else {
    return Floats::load_bfloat(reinterpret_cast<const uint16_t*>(column));
  }
}

// A group has a sum of its own, so that the error grows with 32 + the number of groups, not with all columns.
template <Kind kKind, int kNum>
__attribute__((noinline)) void float_tile(const TileJob& job) {
  constexpr size_t kColumnBytes = group_code_bytes(kKind) / kGroup;
  const uint8_t* column = job.codes;
  Totals<kNum> totals;
  totals.clear();
  for (int group = 0; group < job.groups; ++group) {
    const float* x = job.x_rows + group * kGroup;
    Floats sums[kNum];
    SS_UNROLL
    for (int t = 0; t < kNum; ++t) sums[t] = Floats::set(0.0f);
    for (int k = 0; k < kGroup; ++k, column += kColumnBytes) {
      const Floats w = float_column<kKind>(column);
      if (job.is_first) prefetch(column + kPrefetchBytes);
      SS_UNROLL
      for (int t = 0; t < kNum; ++t) {
        sums[t] = fma(w, Floats::set(x[static_cast<size_t>(t) * job.row_stride + k]), sums[t]);
      }
    }
    SS_UNROLL
    for (int t = 0; t < kNum; ++t) totals.put(t, totals.get(t) + sums[t]);
    totals.settle();
  }
  finish<kNum>(job, totals);
}

using TileFunction = void (*)(const TileJob&);

// The instance for `num_tokens` of an interleaved run; index 0 is the one for a lone token.
template <class Format>
struct QuantizedTiles {
  template <int kNum>
  static TileFunction at(int num_tokens) {
    if constexpr (kNum == 0) {
      return quantized_tile<Format, 1, 1>;
    } else {
      return num_tokens == kNum ? quantized_tile<Format, kNum, kTokens> : at<kNum - 1>(num_tokens);
    }
  }
};

template <Kind kKind>
struct FloatTiles {
  template <int kNum>
  static TileFunction at(int num_tokens) {
    if constexpr (kNum <= 1) {
      return float_tile<kKind, 1>;
    } else {
      return num_tokens == kNum ? float_tile<kKind, kNum> : at<kNum - 1>(num_tokens);
    }
  }
};

template <class Format>
TileFunction quantized_function(int num_tokens, bool is_unpacked) {
  using UnpackedFormat = slipstream::Format<Format::kKind, Unpacked<typename Format::Codes>, 8 * kQuadBytes>;
  if constexpr (Format::kCodeBytes < 8 * kQuadBytes) {
    if (is_unpacked) return QuantizedTiles<UnpackedFormat>::template at<kTokens>(num_tokens);
  }
  return QuantizedTiles<Format>::template at<kTokens>(num_tokens);
}

inline TileFunction tile_function(int kind, int num_tokens, bool is_unpacked) {
  switch (kind) {
    case kF32: return FloatTiles<kF32>::at<kTokens>(num_tokens);
    case kBF16: return FloatTiles<kBF16>::at<kTokens>(num_tokens);
    case kQ4Sym: return quantized_function<Format<kQ4Sym, Nibbles>>(num_tokens, is_unpacked);
    case kQ4Min: return quantized_function<Format<kQ4Min, Nibbles>>(num_tokens, is_unpacked);
    case kQ5Sym: return quantized_function<Format<kQ5Sym, FiveBits>>(num_tokens, is_unpacked);
    case kQ5Min: return quantized_function<Format<kQ5Min, FiveBits>>(num_tokens, is_unpacked);
    case kQ6: return quantized_function<Format<kQ6, SixBits>>(num_tokens, is_unpacked);
    case kQ8Group: return quantized_function<Format<kQ8Group, SignedBytes>>(num_tokens, is_unpacked);
    default: return quantized_function<Format<kQ8Row, SignedBytes>>(num_tokens, is_unpacked);
  }
}

template <class Codes, size_t kCodeBytes>
inline void unpack_codes(const uint8_t* codes, int groups, uint8_t* out) {
  for (int group = 0; group < groups; ++group, codes += kCodeBytes) {
    SS_UNROLL
    for (int quad = 0; quad < 8; ++quad, out += kQuadBytes) Codes::quad(codes, quad).store(out);
  }
}

// From so many tokens on, taking a tile's codes apart once costs less than doing so for every run of them.
constexpr int kUnpackFrom = 2 * kTokens + 1;

// A tile of a matrix, and its codes of a byte each where `unpacked` is not null.
struct Tile {
  const Matrix& matrix;
  int index;
  const uint8_t* unpacked = nullptr;
};

// This thread's room for unpacked tiles; what it held is lost when a larger one is asked for.
class UnpackRoom {
 public:
  uint8_t* take(size_t bytes) {
    if (bytes + kAlignment > size_) {
      size_ = bytes + kAlignment;
      memory_.reset(new uint8_t[size_]);
    }
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory_.get());
    return reinterpret_cast<uint8_t*>((start + kAlignment - 1) / kAlignment * kAlignment);
  }

 private:
  std::unique_ptr<uint8_t[]> memory_;
  size_t size_ = 0;
};

// The tile for this many tokens; `place` tells apart the tiles that are in use at once.
constexpr int kTilesAtOnce = 4;
inline Tile open_tile(const Matrix& matrix, int index, int64_t tokens, int place = 0) {
  thread_local UnpackRoom rooms[kTilesAtOnce];
  if (tokens < kUnpackFrom || is_float_kind(matrix.kind) || group_code_bytes(matrix.kind) == 8 * kQuadBytes) {
    return {matrix, index};
  }
  const int groups = num_groups(matrix.cols);
  const uint8_t* codes = matrix.data + index * tile_bytes(matrix.kind, matrix.cols);
  uint8_t* out = rooms[place].take(static_cast<size_t>(groups) * 8 * kQuadBytes);
  switch (group_code_bytes(matrix.kind) / kQuadBytes) {
    case 4: unpack_codes<Nibbles, 4 * kQuadBytes>(codes, groups, out); break;
    case 5: unpack_codes<FiveBits, 5 * kQuadBytes>(codes, groups, out); break;
    default: unpack_codes<SixBits, 6 * kQuadBytes>(codes, groups, out);
  }
  return {matrix, index, out};
}

// y[t][0..15] = or += the 16 rows of `tile` times tokens first_token .. first_token + num_tokens - 1.
// `first_token` is a multiple of kTokens, `num_tokens` at most kTokens, `ldy` the floats from token to token.
// `x` holds codes, or rows where the matrix is of a float kind.
template <bool kAdd>
inline void matmul_tile(const Tile& tile, const Activations& x, int first_token, int num_tokens, float* y,
                        int ldy) {
  const Matrix& matrix = tile.matrix;
  const uint8_t* codes = matrix.data + tile.index * tile_bytes(matrix.kind, matrix.cols);
  const bool is_unpacked = tile.unpacked != nullptr;
  TileJob job{};
  job.codes = is_unpacked ? tile.unpacked : codes;
  job.scales = codes + code_bytes(matrix.kind, matrix.cols);
  job.groups = x.groups;
  job.y = y;
  job.ldy = ldy;
  job.adds = kAdd;
  job.is_first = first_token == 0 && !is_unpacked;
  if (is_float_kind(matrix.kind)) {
    job.x_rows = x.rows + static_cast<size_t>(first_token) * x.padded_cols();
    job.row_stride = x.padded_cols();
  } else {
    const size_t first_group = static_cast<size_t>(first_token) * x.groups;
    job.x_codes = x.codes + first_group * kGroup;
    job.x_scales = x.scales + first_group;
    job.x_scaled_sums = x.scaled_sums + first_group;
    job.x_sums = x.sums + first_group;
  }
  tile_function(matrix.kind, x.run == 1 ? 0 : num_tokens, is_unpacked)(job);
}

}  // namespace slipstream
