// How does a GGUF tensor store 32 columns of a row?
//
// Each quantised type is a run of blocks of 32 or 256 columns: half-float scales, and integers split over low
// and high bits. A reader gives the codes of one group of 32 as bytes in column order, with the scale of the
// group (two where each covers 16 columns) and its minimum, as half floats.
// Source: the block structures of ggml (ggml-common.h), as named in the GGUF specification's list of types.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "matrix.h"
#include "simd.h"

namespace slipstream {

// The numbers that GGUF files store.
enum Source : int32_t {
  kSourceF32 = 0,
  kSourceF16 = 1,
  kSourceQ4_0 = 2,
  kSourceQ4_1 = 3,
  kSourceQ5_0 = 6,
  kSourceQ5_1 = 7,
  kSourceQ8_0 = 8,
  kSourceQ4_K = 12,
  kSourceQ5_K = 13,
  kSourceQ6_K = 14,
  kSourceBF16 = 30,
};

struct GroupCodes {
  uint8_t codes[kGroup];
  uint16_t scale;
  uint16_t second;  // minimum, or the scale of columns 16 to 31
};

constexpr int kSuperBlock = 256;

inline int source_block_cols(int source) {
  switch (source) {
    case kSourceF32:
    case kSourceF16:
    case kSourceBF16: return 1;
    case kSourceQ4_K:
    case kSourceQ5_K:
    case kSourceQ6_K: return kSuperBlock;
    default: return kGroup;
  }
}

inline size_t source_block_bytes(int source) {
  switch (source) {
    case kSourceF32: return 4;
    case kSourceF16:
    case kSourceBF16: return 2;
    case kSourceQ4_0: return 2 + 16;
    case kSourceQ4_1: return 4 + 16;
    case kSourceQ5_0: return 2 + 4 + 16;
    case kSourceQ5_1: return 4 + 4 + 16;
    case kSourceQ8_0: return 2 + 32;
    case kSourceQ4_K: return 4 + 12 + 128;
    case kSourceQ5_K: return 4 + 12 + 32 + 128;
    default: return 128 + 64 + 16 + 2;
  }
}

inline size_t source_row_bytes(int source, int cols) {
  return cols / source_block_cols(source) * source_block_bytes(source);
}

// 16 bytes hold columns 0 to 15 in their low halves and 16 to 31 in their high ones.
inline void split_nibbles(const uint8_t* packed, uint8_t* codes) {
  for (int i = 0; i < 16; ++i) {
    codes[i] = packed[i] & 15;
    codes[i + 16] = packed[i] >> 4;
  }
}

// Bit i of a 32-bit word is bit 4 of column i.
inline void add_fifth_bits(const uint8_t* packed, uint8_t* codes) {
  for (int i = 0; i < kGroup; ++i) codes[i] |= (packed[i / 8] >> i % 8 & 1) << 4;
}

// Q4_0, Q4_1, Q5_0, Q5_1: scale, minimum where there is one, fifth bits where there are any, nibbles.
inline void read_simple_group(int source, const uint8_t* block, GroupCodes& group) {
  std::memcpy(&group.scale, block, 2);
  block += 2;
  group.second = 0;
  if (source == kSourceQ4_1 || source == kSourceQ5_1) {
    std::memcpy(&group.second, block, 2);
    block += 2;
  }
  const bool has_fifth_bits = source == kSourceQ5_0 || source == kSourceQ5_1;
  split_nibbles(block + (has_fifth_bits ? 4 : 0), group.codes);
  if (has_fifth_bits) add_fifth_bits(block, group.codes);
}

// Q4_K, Q5_K: the 6-bit factors of 8 scales and 8 minima in 12 bytes. The first four of each are the low 6
// bits of bytes 0 to 3 and 4 to 7; of the others, the low 4 bits are in bytes 8 to 11, the high 2 on top of
// the first.
inline void read_factors(const uint8_t* packed, int index, int& scale, int& minimum) {
  if (index < 4) {
    scale = packed[index] & 63;
    minimum = packed[index + 4] & 63;
  } else {
    scale = (packed[index + 4] & 15) | (packed[index - 4] >> 6 << 4);
    minimum = (packed[index + 4] >> 4) | (packed[index] >> 6 << 4);
  }
}

inline float read_half(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return half_bits_to_float(bits);
}

// Q4_K, Q5_K: groups 2i and 2i + 1 share 32 bytes, in their low and high halves; bit i of 32 bytes is the
// fifth bit of group i.
inline void read_k_group(int source, const uint8_t* block, int index, GroupCodes& group) {
  int scale, minimum;
  read_factors(block + 4, index, scale, minimum);
  group.scale = float_to_half_bits(read_half(block) * static_cast<float>(scale));
  group.second = float_to_half_bits(-(read_half(block + 2) * static_cast<float>(minimum)));
  const bool has_fifth_bits = source == kSourceQ5_K;
  const uint8_t* nibbles = block + 16 + (has_fifth_bits ? 32 : 0) + index / 2 * 32;
  const int shift = index % 2 * 4;
  for (int i = 0; i < kGroup; ++i) group.codes[i] = nibbles[i] >> shift & 15;
  if (!has_fifth_bits) return;
  for (int i = 0; i < kGroup; ++i) group.codes[i] |= (block[16 + i] >> index & 1) << 4;
}

// Q6_K: 128 low nibbles, 64 bytes of two high bits, 16 signed factors, the scale. Each half of 128 columns
// has 64 bytes of nibbles (groups 0 and 1 low, 2 and 3 high) and 32 bytes of high bits, two a group.
inline void read_q6_k_group(const uint8_t* block, int index, GroupCodes& group) {
  const int half = index / 4, quarter = index % 4;
  const uint8_t* nibbles = block + half * 64 + quarter % 2 * 32;
  const uint8_t* tops = block + 128 + half * 32;
  const int8_t* factors = reinterpret_cast<const int8_t*>(block + 192) + index * 2;
  const float scale = read_half(block + 208);
  group.scale = float_to_half_bits(scale * static_cast<float>(factors[0]));
  group.second = float_to_half_bits(scale * static_cast<float>(factors[1]));
  const int shift = quarter / 2 * 4;
  for (int i = 0; i < kGroup; ++i) {
    group.codes[i] = (nibbles[i] >> shift & 15) | (tops[i] >> 2 * quarter & 3) << 4;
  }
}

// Reads group `index` of a row.
inline void read_group(int source, const uint8_t* row, int index, GroupCodes& group) {
  const int groups_per_block = source_block_cols(source) / kGroup;
  const uint8_t* block = row + index / groups_per_block * source_block_bytes(source);
  switch (source) {
    case kSourceQ4_K:
    case kSourceQ5_K: return read_k_group(source, block, index % groups_per_block, group);
    case kSourceQ6_K: return read_q6_k_group(block, index % groups_per_block, group);
    case kSourceQ8_0:
      std::memcpy(&group.scale, block, 2);
      std::memcpy(group.codes, block + 2, kGroup);
      return;
    default: return read_simple_group(source, block, group);
  }
}

}  // namespace slipstream
