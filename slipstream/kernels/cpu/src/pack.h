// How do rows as a checkpoint stores them become tiles?
//
// A reader turns 32 columns of one row into codes and scales (GroupCodes), whatever the source; one writer a
// width of code puts them in place. Sources are named by the numbers that GGUF files store.
// Invariant: codes are those of the checkpoint, unchanged; only floats are quantised here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "gguf_blocks.h"
#include "matrix.h"
#include "simd.h"

namespace slipstream {

enum PackStatus : int32_t {
  kPacked = 0,
  kUnknownKind = 1,
  kUnsupportedSource = 2,
  kPartialBlock = 3,
  kNotFinite = 4,  // all is packed, and a weight or a scale is NaN or infinite
};

inline bool is_finite_half(uint16_t bits) { return (bits & 0x7c00) != 0x7c00; }

// The kind that keeps the codes of a quantised source, or -1.
inline int native_kind(int source) {
  switch (source) {
    case kSourceQ4_0: return kQ4Sym;
    case kSourceQ4_1:
    case kSourceQ4_K: return kQ4Min;
    case kSourceQ5_0: return kQ5Sym;
    case kSourceQ5_1:
    case kSourceQ5_K: return kQ5Min;
    case kSourceQ6_K: return kQ6;
    case kSourceQ8_0: return kQ8Group;
    default: return -1;
  }
}

inline bool is_float_source(int source) {
  return source == kSourceF32 || source == kSourceF16 || source == kSourceBF16;
}

inline PackStatus check_pack(int kind, int source, int cols) {
  if (!is_known_kind(kind)) return kUnknownKind;
  if (is_float_source(source)) {
    if (kind == kBF16) return source == kSourceBF16 ? kPacked : kUnsupportedSource;
    return kind == kF32 || kind == kQ8Row || kind == kQ8Group ? kPacked : kUnsupportedSource;
  }
  if (native_kind(source) != kind) return kUnsupportedSource;
  return cols % source_block_cols(source) == 0 ? kPacked : kPartialBlock;
}

inline uint32_t load_word(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return word;
}

inline void store_word(uint8_t* p, uint32_t word) { std::memcpy(p, &word, 4); }

// Writes the codes of one row of a group; `out` is the group's first quad.
inline void write_codes(int kind, const GroupCodes& group, int row, uint8_t* out) {
  constexpr uint32_t kLow = 0x0f0f0f0f, kOnes = 0x01010101, kThrees = 0x03030303;
  uint32_t quads[8];
  std::memcpy(quads, group.codes, sizeof quads);
  out += row * 4;
  if (kind == kQ8Group || kind == kQ8Row) {
    for (int i = 0; i < 8; ++i) store_word(out + i * kQuadBytes, quads[i]);
    return;
  }
  for (int i = 0; i < 4; ++i) {
    store_word(out + i * kQuadBytes, (quads[2 * i] & kLow) | ((quads[2 * i + 1] & kLow) << 4));
  }
  if (kind == kQ5Sym || kind == kQ5Min) {
    uint32_t plane = 0;
    for (int i = 0; i < 8; ++i) plane |= (quads[i] >> 4 & kOnes) << i;
    store_word(out + 4 * kQuadBytes, plane);
  } else if (kind == kQ6) {
    for (int half = 0; half < 2; ++half) {
      uint32_t plane = 0;
      for (int i = 0; i < 4; ++i) plane |= (quads[4 * half + i] >> 4 & kThrees) << 2 * i;
      store_word(out + (4 + half) * kQuadBytes, plane);
    }
  }
}

inline void write_scales(int kind, const GroupCodes& group, int row, uint8_t* scales) {
  std::memcpy(scales + row * 2, &group.scale, 2);
  if (has_two_halves(kind)) std::memcpy(scales + kTileRows * 2 + row * 2, &group.second, 2);
}

inline void read_floats(int source, const uint8_t* row, int first, int count, float* out) {
  if (source == kSourceF32) {
    std::memcpy(out, row + static_cast<size_t>(first) * 4, static_cast<size_t>(count) * 4);
    return;
  }
  for (int i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, row + static_cast<size_t>(first + i) * 2, 2);
    if (source == kSourceF16) {
      out[i] = half_bits_to_float(bits);
    } else {
      const uint32_t wide = static_cast<uint32_t>(bits) << 16;
      std::memcpy(out + i, &wide, 4);
    }
  }
}

// Codes of 32 floats for a given scale: nearest, ties to even, within +-127. Where the scale is 0 or NaN, 0.
inline void encode_signed(const float* x, float scale, uint8_t* codes) {
  std::memset(codes, 0, kGroup);
  if (!(scale > 0.0f)) return;
  const float inverse = 1.0f / scale;
  for (int i = 0; i < kGroup; ++i) {
    const float code = std::max(-127.0f, std::min(127.0f, std::nearbyint(x[i] * inverse)));
    codes[i] = static_cast<uint8_t>(static_cast<int8_t>(code));
  }
}

// NaN where one is not finite: the scale it makes shows the damage in every product. What is too small to
// have a finite inverse counts as 0.
inline float largest_magnitude(const float* x, int count, float largest = 0.0f) {
  for (int i = 0; i < count; ++i) {
    const float magnitude = std::fabs(x[i]);
    if (!std::isfinite(magnitude)) return std::numeric_limits<float>::quiet_NaN();
    // A NaN from an earlier call stays: no comparison with it is true.
    if (magnitude > largest && magnitude > 1e-34f) largest = magnitude;
  }
  return largest;
}

// One row of floats to symmetric codes of 8 bits. What packs a row returns whether all of it is finite.
inline bool pack_signed_row(int kind, int source, const uint8_t* row, int cols, int place, uint8_t* tile) {
  float x[kGroup];
  float row_scale = 0.0f;
  bool is_finite = true;
  uint8_t* scales = tile + code_bytes(kind, cols);
  if (kind == kQ8Row) {
    for (int first = 0; first < cols; first += kGroup) {
      const int count = cols - first < kGroup ? cols - first : kGroup;
      read_floats(source, row, first, count, x);
      row_scale = largest_magnitude(x, count, row_scale);
    }
    row_scale /= 127.0f;
    std::memcpy(scales + place * 4, &row_scale, 4);
  }
  for (int group = 0; group < num_groups(cols); ++group) {
    const int first = group * kGroup, count = cols - first < kGroup ? cols - first : kGroup;
    std::memset(x, 0, sizeof x);
    read_floats(source, row, first, count, x);
    GroupCodes made{};
    float scale = row_scale;
    if (kind == kQ8Group) {
      made.scale = float_to_half_bits(largest_magnitude(x, kGroup) / 127.0f);
      scale = half_bits_to_float(made.scale);
      is_finite = is_finite && is_finite_half(made.scale);
      write_scales(kind, made, place, scales + group * group_scale_bytes(kind));
    }
    encode_signed(x, scale, made.codes);
    write_codes(kind, made, place, tile + group * group_code_bytes(kind));
  }
  return is_finite && std::isfinite(row_scale);
}

// One row of floats as it is, [column][row].
inline bool pack_float_row(int kind, int source, const uint8_t* row, int cols, int place, uint8_t* tile) {
  bool is_finite = true;
  for (int column = 0; column < cols; ++column) {
    float x;
    read_floats(source, row, column, 1, &x);
    is_finite = is_finite && std::isfinite(x);
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const size_t at = static_cast<size_t>(column) * kTileRows + place;
    if (kind == kBF16) {
      // The source has this type, so nothing is cut off.
      const uint16_t upper = static_cast<uint16_t>(bits >> 16);
      std::memcpy(tile + at * 2, &upper, 2);
    } else {
      std::memcpy(tile + at * 4, &bits, 4);
    }
  }
  return is_finite;
}

inline bool pack_row(int kind, int source, const uint8_t* row, int cols, int place, uint8_t* tile) {
  if (is_float_kind(kind)) return pack_float_row(kind, source, row, cols, place, tile);
  if (is_float_source(source)) return pack_signed_row(kind, source, row, cols, place, tile);
  uint8_t* scales = tile + code_bytes(kind, cols);
  bool is_finite = true;
  GroupCodes group;
  for (int i = 0; i < num_groups(cols); ++i) {
    read_group(source, row, i, group);
    write_codes(kind, group, place, tile + i * group_code_bytes(kind));
    write_scales(kind, group, place, scales + i * group_scale_bytes(kind));
    if (!is_finite_half(group.scale)) is_finite = false;
    if (has_two_halves(kind) && !is_finite_half(group.second)) is_finite = false;
  }
  return is_finite;
}

// Packs at most 16 rows, which follow each other in `rows`, into one tile.
inline bool pack_tile(int kind, int source, const uint8_t* rows, int num_rows, int cols, uint8_t* tile) {
  const size_t stride = source_row_bytes(source, cols);
  std::memset(tile, 0, tile_bytes(kind, cols));
  bool is_finite = true;
  for (int row = 0; row < num_rows; ++row) {
    is_finite = pack_row(kind, source, rows + row * stride, cols, row, tile) && is_finite;
  }
  return is_finite;
}

}  // namespace slipstream
