// How do the weights of a linear layer lie in memory?
//
// A matrix [rows, cols] is a run of tiles of 16 rows; the last one is padded with zeros, and so are columns
// up to a multiple of 32. In a tile, codes come first and scales after them:
//   codes   For each group of 32 columns, 8 quads of 4 columns. A quad is 16 rows x 4 codes, so that one
//           vector meets 4 codes of a token. Codes of 4 bits: 64 bytes hold quads 2i (low bits) and 2i + 1
//           (high bits). Bit 4 of 5-bit codes: 64 bytes, bit i of each for quad i. Bits 4 and 5 of 6-bit
//           codes: 128 bytes, the first 64 for quads 0 to 3 and the others for 4 to 7, two bits each.
//   scales  For each group, 16 half floats; then 16 minima, or the scales of the second 16 columns.
// A weight is, by the type that GGUF names for it,
//   kQ4Sym, kQ5Sym  scale x (code - 8 or 16)             Q4_0, Q5_0
//   kQ4Min, kQ5Min  scale x code + minimum               Q4_1, Q5_1; Q4_K, Q5_K
//   kQ6             scale of 16 columns x (code - 32)    Q6_K
//   kQ8Group        scale x code                         Q8_0
//   kQ8Row          scale of the row x code              floats
//   kF32, kBF16     itself, [column][row]                floats
// The K types hold two-level scales. Their products (scale x 6- or 8-bit factor) are rounded to half floats
// here, an error of at most 2^-11 of them, where quantisation itself moves weights by 2^-5 to 2^-7 of a
// group's range.
//
// Invariant: one layout for every instruction set; every quad is 64-byte aligned, and a tile is read once,
// front to back.
// Source of the stored types: ggml's block structures, as the GGUF specification lists them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace slipstream {

enum Kind : int32_t {
  kF32 = 0,
  kBF16 = 1,
  kQ4Sym = 2,
  kQ4Min = 3,
  kQ5Sym = 4,
  kQ5Min = 5,
  kQ6 = 6,
  kQ8Group = 7,
  kQ8Row = 8,
  kNumKinds = 9,
};

// Python mirrors this record; `data` is 64-byte aligned.
struct Matrix {
  const uint8_t* data;
  int32_t kind, rows, cols, reserved;
};

constexpr int kTileRows = 16;
constexpr int kGroup = 32;
constexpr int kQuadBytes = 64;
constexpr size_t kAlignment = 64;

constexpr int num_groups(int cols) { return (cols + kGroup - 1) / kGroup; }
constexpr int num_tiles(int rows) { return (rows + kTileRows - 1) / kTileRows; }

// Bytes of codes that one group of a tile takes.
constexpr size_t group_code_bytes(int kind) {
  switch (kind) {
    case kF32: return kGroup * kTileRows * 4;
    case kBF16: return kGroup * kTileRows * 2;
    case kQ4Sym:
    case kQ4Min: return 4 * kQuadBytes;
    case kQ5Sym:
    case kQ5Min: return 5 * kQuadBytes;
    case kQ6: return 6 * kQuadBytes;
    default: return 8 * kQuadBytes;
  }
}

// Bytes of scales and minima that one group of a tile takes.
constexpr size_t group_scale_bytes(int kind) {
  switch (kind) {
    case kQ4Sym:
    case kQ5Sym:
    case kQ8Group: return kTileRows * 2;
    case kQ4Min:
    case kQ5Min:
    case kQ6: return kTileRows * 4;
    default: return 0;
  }
}

constexpr size_t code_bytes(int kind, int cols) { return num_groups(cols) * group_code_bytes(kind); }

constexpr size_t tile_bytes(int kind, int cols) {
  const size_t scales = kind == kQ8Row ? kTileRows * 4 : num_groups(cols) * group_scale_bytes(kind);
  return code_bytes(kind, cols) + (scales + kAlignment - 1) / kAlignment * kAlignment;
}

constexpr size_t matrix_bytes(int kind, int rows, int cols) {
  return num_tiles(rows) * tile_bytes(kind, cols);
}

constexpr bool is_float_kind(int kind) { return kind == kF32 || kind == kBF16; }
constexpr bool is_known_kind(int kind) { return kind >= 0 && kind < kNumKinds; }

// What is taken from a code; the codes of kQ8Group and kQ8Row are signed.
constexpr int code_offset(int kind) {
  return kind == kQ4Sym ? 8 : kind == kQ5Sym ? 16 : kind == kQ6 ? 32 : 0;
}
// The stored code of one column of a group, `codes` being the first byte of its row in the group.
inline int code_at(int kind, const uint8_t* codes, int column) {
  const int quad = column / 4, byte = column % 4;
  const auto stored = [codes, byte](int line) { return codes[line * kQuadBytes + byte]; };
  if (group_code_bytes(kind) == 8 * kQuadBytes) return static_cast<int8_t>(stored(quad));
  int code = stored(quad / 2) >> quad % 2 * 4 & 15;
  if (kind == kQ5Sym || kind == kQ5Min) code |= (stored(4) >> quad & 1) << 4;
  if (kind == kQ6) code |= (stored(4 + quad / 4) >> quad % 4 * 2 & 3) << 4;
  return code;
}

// A minimum or a second scale stands beside each scale.
constexpr bool has_two_halves(int kind) { return group_scale_bytes(kind) == kTileRows * 4; }
constexpr bool has_minima(int kind) { return kind == kQ4Min || kind == kQ5Min; }

}  // namespace slipstream
