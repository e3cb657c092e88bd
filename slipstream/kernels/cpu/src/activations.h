// In what form do a step's activations meet the weights?
//
// Each token's row is cut into groups of 32; a group is its largest magnitude / 127 (the scale) times codes
// from -127 to 127, rounded to nearest even. Also kept: scale x sum of the codes, which a minimum is
// multiplied with, and the sums of both halves, from which the offset of a code is taken. Weights in floating
// point need the rows themselves, which can be carried beside or instead of the codes.
// With several tokens, the codes of kTokens of them are interleaved, [column / 4][token][4], because a tile's
// inner loop reads them in that order; their scales are [group][token] likewise.
//
// Invariant: a token's numbers depend on its own row alone. A group that is not finite gets a NaN scale, so
// that the damage shows in every result of that token and in no other's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "matrix.h"
#include "simd.h"

namespace slipstream {

struct Activations {
  int cols, groups;
  int run;  // tokens interleaved: kTokens, or 1 where there is one token
  int8_t* codes;
  float* scales;
  float* scaled_sums;
  int32_t* sums;  // two of 16 bits: of the first 16 columns (low half) and of the others
  float* rows;    // [token][padded columns]

  int padded_cols() const { return groups * kGroup; }

  static size_t bytes(int tokens, int cols, bool needs_rows = false, bool needs_codes = true) {
    const size_t groups = num_groups(cols);
    const size_t padded_tokens = tokens == 1 ? 1 : (tokens + kTokens - 1) / kTokens * kTokens;
    size_t total = kAlignment;  // whatever the alignment of the memory
    const size_t count = padded_tokens * groups;
    if (needs_codes) total += aligned(count * kGroup) + 3 * aligned(count * 4);
    if (needs_rows) total += aligned(count * kGroup * 4);
    return total;
  }

  // Lays the record out in `memory`, which has bytes() of the same arguments and is not cleared.
  static Activations carve(void* memory, int tokens, int cols, bool needs_rows = false,
                           bool needs_codes = true) {
    Activations made{};
    made.cols = cols;
    made.groups = num_groups(cols);
    made.run = tokens == 1 ? 1 : kTokens;
    const size_t padded_tokens = tokens == 1 ? 1 : (tokens + kTokens - 1) / kTokens * kTokens;
    const size_t count = padded_tokens * made.groups;
    uint8_t* next = reinterpret_cast<uint8_t*>(aligned(reinterpret_cast<uintptr_t>(memory)));
    if (needs_codes) {
      made.codes = take<int8_t>(next, count * kGroup);
      made.scales = take<float>(next, count);
      made.scaled_sums = take<float>(next, count);
      made.sums = take<int32_t>(next, count);
    }
    if (needs_rows) made.rows = take<float>(next, count * kGroup);
    return made;
  }

  // Takes the whole row of `token`: `x` has `cols` floats.
  SS_INLINE void quantize(const float* x, int token) const {
    const int whole = cols / kGroup;
    for (int group = 0; group < whole; ++group) quantize_group(x + group * kGroup, token, group);
    if (whole == groups) return;
    float rest[kGroup] = {};
    std::memcpy(rest, x + whole * kGroup, (cols - whole * kGroup) * sizeof(float));
    quantize_group(rest, token, whole);
  }

  // Takes the 32 floats of one group; beyond `cols` they must be 0.
  SS_INLINE void quantize_group(const float* x, int token, int group) const {
    if (rows != nullptr) {
      std::memcpy(rows + static_cast<size_t>(token) * padded_cols() + group * kGroup, x,
                  kGroup * sizeof(float));
    }
    if (codes != nullptr) encode(x, token, group);
  }

 private:
  static constexpr size_t aligned(size_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

  template <class T>
  static T* take(uint8_t*& next, size_t count) {
    T* taken = reinterpret_cast<T*>(next);
    next += aligned(count * sizeof(T));
    return taken;
  }

  SS_INLINE void encode(const float* x, int token, int group) const {
    // 127 / x is finite from here up, and smaller groups are zero for any purpose.
    constexpr float kSmallest = 1e-36f;
    constexpr uint32_t kInfinityBits = 0x7f800000;
    const Floats first = Floats::load(x), second = Floats::load(x + kLanes);
    // As integers, magnitudes are ordered like their values, and NaN lies above infinity.
    const uint32_t bits = largest_magnitude_bits(first, second);
    const int start = token / run * run, place = token % run;
    const size_t at = static_cast<size_t>(start) * groups + group * run + place;
    int8_t* out = codes + static_cast<size_t>(start) * padded_cols() + (group * 8 * run + place) * 4;
    float largest;
    std::memcpy(&largest, &bits, 4);
    if (bits >= kInfinityBits || largest < kSmallest) {
      const bool is_finite = bits < kInfinityBits;
      scales[at] = scaled_sums[at] = is_finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
      sums[at] = 0;
      for (int quad = 0; quad < 8; ++quad) std::memset(out + quad * run * 4, 0, 4);
      return;
    }
    const Floats inverse = Floats::set(127.0f / largest);
    const Floats first_codes = round_to_even(first * inverse), second_codes = round_to_even(second * inverse);
    alignas(32) int8_t packed[kGroup];
    first_codes.store_int8(packed);
    second_codes.store_int8(packed + kLanes);
    for (int quad = 0; quad < 8; ++quad) std::memcpy(out + quad * run * 4, packed + quad * 4, 4);
    // Sums of 16 integers below 2048 are exact in any order.
    const int first_sum = static_cast<int>(horizontal_sum(first_codes));
    const int second_sum = static_cast<int>(horizontal_sum(second_codes));
    scales[at] = largest * (1.0f / 127.0f);
    scaled_sums[at] = scales[at] * static_cast<float>(first_sum + second_sum);
    sums[at] = static_cast<int32_t>((static_cast<uint32_t>(second_sum) << 16) | (first_sum & 0xffff));
  }
};

}  // namespace slipstream
