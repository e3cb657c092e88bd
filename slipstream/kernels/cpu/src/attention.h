// How does a query attend to keys and values in pages, at any context length?
//
// The context is cut into chunks of kChunk positions, counted from position 0. A chunk gives a query its
// highest score, the sum of its weights and the weighted sum of values; chunks are folded in order. Which
// thread computed a chunk, and beside which other queries, changes no bit of the result: every dot product,
// sum and fold has one fixed order.
// Source: Rabe and Staats, Self-attention Does Not Need O(n^2) Memory, arXiv 2112.05682; Dao, FlashAttention-2,
// arXiv 2307.08691, section 3.1. Departure: partial results of a fixed size, so that the split over threads
// (Flash-Decoding) cannot be seen in the result.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "vec8.h"

namespace slipstream {

constexpr int kChunk = 64;
// Queries of one unit: heads that share a kv head times tokens of a row.
constexpr int kMaxQueries = 32;
// From so many queries on, a chunk's keys and values are converted to float once instead of per query.
constexpr int kConvertFrom = 6;
// What all queries share at a time, of first-level caches of 32 KiB.
constexpr int kCachedBytes = 16384;

// One layer of one group's pages. Strides count elements; `element_bytes` is 2 (fp16) or 4 (fp32).
struct KvPages {
  uint8_t* base;
  int64_t page_stride;
  int64_t value_offset;
  int64_t token_stride;
  int32_t block_tokens;
  int32_t element_bytes;
  int32_t head_dim;
  int32_t reserved;

  template <class T>
  T* key(int64_t page, int64_t offset, int head) const {
    return reinterpret_cast<T*>(base) + page * page_stride + offset * token_stride +
           static_cast<int64_t>(head) * head_dim;
  }
};

// State of one query: highest score so far, sum of weights; its weighted values are kept beside it.
struct Mass {
  float highest;
  float sum;
};

// Room for one thread's unit.
struct AttentionScratch {
  float scores[kMaxQueries][kChunk];
  float* keys;    // [kChunk][head_dim], converted
  float* values;  // [kChunk][head_dim], converted
  float* parts;   // [kMaxQueries][head_dim], of the chunk at hand
  float* states;  // [kMaxQueries][head_dim], folded so far

  static size_t bytes(int head_dim) {
    const size_t floats = static_cast<size_t>(head_dim) * 2 * (kChunk + kMaxQueries);
    return (sizeof(AttentionScratch) + 63) / 64 * 64 + floats * sizeof(float);
  }
  static AttentionScratch* carve(uint8_t* memory, int head_dim) {
    AttentionScratch* scratch = reinterpret_cast<AttentionScratch*>(memory);
    float* floats = reinterpret_cast<float*>(memory + (sizeof(AttentionScratch) + 63) / 64 * 64);
    scratch->keys = floats;
    scratch->values = floats + kChunk * head_dim;
    scratch->parts = floats + 2 * kChunk * head_dim;
    scratch->states = scratch->parts + kMaxQueries * head_dim;
    return scratch;
  }
};

// One query: where it lies, where its result goes, and the positions [low, high) it sees.
struct Query {
  const float* q;
  float* out;
  int64_t low;
  int64_t high;
};

// Scores of 1 query over 8 keys, or 2 over 4: eight dot products, one a lane.
template <int kQueries, class T>
SS_INLINE Vec8 dots(const Query* queries, const T* const* keys, int head_dim) {
  constexpr int kKeys = 8 / kQueries;
  Vec8 sums[8];
  for (int i = 0; i < 8; ++i) sums[i] = vec8(0.0f);
  for (int d = 0; d < head_dim; d += 8) {
    Vec8 key[kKeys];
    for (int p = 0; p < kKeys; ++p) key[p] = load8(keys[p] + d);
    for (int n = 0; n < kQueries; ++n) {
      const Vec8 q = load8(queries[n].q + d);
      for (int p = 0; p < kKeys; ++p) sums[n * kKeys + p] = fma8(q, key[p], sums[n * kKeys + p]);
    }
  }
  return sums8(sums);
}

// Fills scores[n][p] of the positions [begin, end) of a chunk, both multiples of 8.
template <class T>
inline void score_keys(const Query* queries, int num_queries, const T* const* keys, int begin, int end,
                       int head_dim, float (*scores)[kChunk]) {
  int n = 0;
  for (; n + 2 <= num_queries; n += 2) {
    for (int p = begin; p < end; p += 4) {
      alignas(32) float eight[8];
      store8(eight, dots<2>(queries + n, keys + p, head_dim));
      std::memcpy(&scores[n][p], eight, 16);
      std::memcpy(&scores[n + 1][p], eight + 4, 16);
    }
  }
  for (; n < num_queries; ++n) {
    for (int p = begin; p < end; p += 8) store8(&scores[n][p], dots<1>(queries + n, keys + p, head_dim));
  }
}

// Fills scores[n][p] of the chunk's first `count` positions; keys past `count` repeat the last one. All queries
// meet a few keys before the next few: those stay in the first-level cache, whatever the head's size.
template <class T>
inline void score_chunk(const Query* queries, int num_queries, const T* const* keys, int count, int head_dim,
                        float (*scores)[kChunk]) {
  const int key_bytes = head_dim * static_cast<int>(sizeof(T));
  const int at_once = std::max(kCachedBytes / key_bytes / 8 * 8, 8);
  for (int begin = 0; begin < count; begin += at_once) {
    const int end = std::min(begin + at_once, (count + 7) / 8 * 8);
    score_keys(queries, num_queries, keys, begin, end, head_dim, scores);
  }
}

// Turns a query's scores into weights relative to their highest; 0 outside [low, high).
inline Mass weigh(float* scores, int low, int high, float softcap) {
  if (softcap != 0.0f) {
    const Vec8 cap = vec8(softcap), inverse = vec8(1.0f / softcap);
    for (int p = 0; p < kChunk; p += 8) store8(scores + p, cap * tanh8(load8(scores + p) * inverse));
  }
  // -1e30 stands for minus infinity: its exponential is set to 0 below, whatever exp8 makes of it.
  for (int p = 0; p < low; ++p) scores[p] = -1e30f;
  for (int p = high; p < kChunk; ++p) scores[p] = -1e30f;
  Vec8 highest = load8(scores);
  for (int p = 8; p < kChunk; p += 8) highest = max8(highest, load8(scores + p));
  const float top = highest8(highest);
  const Vec8 base = vec8(top);
  for (int p = 0; p < kChunk; p += 8) store8(scores + p, exp8(load8(scores + p) - base));
  for (int p = 0; p < low; ++p) scores[p] = 0.0f;
  for (int p = high; p < kChunk; ++p) scores[p] = 0.0f;
  Vec8 sum = load8(scores);
  for (int p = 8; p < kChunk; p += 8) sum = sum + load8(scores + p);
  return {top, sum8(sum)};
}

// Weighted sums of the values [from, to) for kQueries queries, kVectors x 8 elements of the head from `d` on.
template <int kQueries, int kVectors, class T>
SS_INLINE void gather_values(const float (*weights)[kChunk], const T* const* values, int from, int to, int d,
                             float* const* out) {
  Vec8 sums[kQueries][kVectors];
  for (int n = 0; n < kQueries; ++n) {
    for (int i = 0; i < kVectors; ++i) sums[n][i] = vec8(0.0f);
  }
  for (int p = from; p < to; ++p) {
    Vec8 value[kVectors];
    for (int i = 0; i < kVectors; ++i) value[i] = load8(values[p] + d + 8 * i);
    for (int n = 0; n < kQueries; ++n) {
      const Vec8 weight = vec8(weights[n][p]);
      for (int i = 0; i < kVectors; ++i) sums[n][i] = fma8(weight, value[i], sums[n][i]);
    }
  }
  for (int n = 0; n < kQueries; ++n) {
    for (int i = 0; i < kVectors; ++i) store8(out[n] + d + 8 * i, sums[n][i]);
  }
}

// All queries meet the same columns of the values before the next columns: see score_chunk.
template <int kVectors, class T>
inline void gather_columns(const float (*weights)[kChunk], int num_queries, const T* const* values, int from,
                           int to, int d, float* const* outs) {
  int n = 0;
  for (; n + 2 <= num_queries; n += 2) {
    gather_values<2, kVectors>(weights + n, values, from, to, d, outs + n);
  }
  for (; n < num_queries; ++n) gather_values<1, kVectors>(weights + n, values, from, to, d, outs + n);
}

template <class T>
inline void gather_chunk(const float (*weights)[kChunk], int num_queries, const T* const* values, int from,
                         int to, int head_dim, float* const* outs) {
  int d = 0;
  if (num_queries == 1) {
    for (; d + 64 <= head_dim; d += 64) gather_values<1, 8>(weights, values, from, to, d, outs);
  }
  for (; d + 32 <= head_dim; d += 32) gather_columns<4>(weights, num_queries, values, from, to, d, outs);
  for (; d < head_dim; d += 8) gather_columns<1>(weights, num_queries, values, from, to, d, outs);
}

// Adds a later chunk's part to a query's state: both are brought to the same highest score first.
inline void fold(Mass& state, float* state_out, Mass part, const float* part_out, int head_dim) {
  const float top = std::max(state.highest, part.highest);
  alignas(32) float scale[8];
  const float differences[8] = {state.highest - top, part.highest - top, 0, 0, 0, 0, 0, 0};
  store8(scale, exp8(load8(differences)));
  const Vec8 a = vec8(scale[0]), b = vec8(scale[1]);
  for (int d = 0; d < head_dim; d += 8) {
    store8(state_out + d, fma8(load8(part_out + d), b, load8(state_out + d) * a));
  }
  state.sum = std::fma(part.sum, scale[1], state.sum * scale[0]);
  state.highest = top;
}

// Finds the rows of K and V of a chunk's first `count` positions.
template <class T>
inline void find_rows(const KvPages& pages, const int32_t* table, int kv_head, int64_t start, int count,
                      const T** keys, const T** values) {
  const int64_t block = pages.block_tokens;
  int64_t page = start / block, offset = start % block;
  for (int p = 0; p < count; ++p) {
    const T* key = pages.key<T>(table[page], offset, kv_head);
    keys[p] = key;
    values[p] = key + pages.value_offset;
    if (++offset == block) {
      offset = 0;
      ++page;
    }
  }
}

template <class T>
inline void convert_rows(const T* const* rows, int from, int to, int head_dim, float* out, const float** found) {
  for (int p = from; p < to; ++p) {
    float* row = out + static_cast<size_t>(p) * head_dim;
    for (int d = 0; d < head_dim; d += 8) store8(row + d, load8(rows[p] + d));
    found[p] = row;
  }
}

// Computes one chunk for queries of one kv head. `masses[n]` and `outs[n]` receive query n's part where it
// sees anything of the chunk; `masses[n].sum` is 0 otherwise.
template <class T>
inline void attend_rows(const Query* queries, int num_queries, int64_t start, int from, int to,
                        const T* const* keys, const T* const* values, int head_dim, float softcap,
                        AttentionScratch& scratch, Mass* masses, float* const* outs) {
  // Rows before `from` and from `to` on may be stale or absent: a neighbour is scored in their place, and masked.
  const T* safe_keys[kChunk];
  for (int p = 0; p < kChunk; ++p) safe_keys[p] = keys[std::min(std::max(p, from), to - 1)];
  score_chunk(queries, num_queries, safe_keys, to, head_dim, scratch.scores);
  for (int n = 0; n < num_queries; ++n) {
    const int low = static_cast<int>(std::min<int64_t>(std::max<int64_t>(queries[n].low - start, 0), kChunk));
    const int high = static_cast<int>(std::min<int64_t>(std::max<int64_t>(queries[n].high - start, 0), kChunk));
    if (low >= high) {
      masses[n] = {-1e30f, 0.0f};
      std::memset(scratch.scores[n], 0, sizeof scratch.scores[n]);
    } else {
      masses[n] = weigh(scratch.scores[n], low, high, softcap);
    }
  }
  gather_chunk(scratch.scores, num_queries, values, from, to, head_dim, outs);
}

// One chunk from pages of type T, converted to float first where enough queries share the conversion.
template <class T>
inline void attend_chunk(const KvPages& pages, const int32_t* table, int kv_head, const Query* queries,
                         int num_queries, int64_t start, int64_t low, int64_t high, float softcap,
                         AttentionScratch& scratch, Mass* masses, float* const* outs) {
  const int from = static_cast<int>(std::max<int64_t>(low - start, 0));
  const int to = static_cast<int>(std::min<int64_t>(high - start, kChunk));
  const T* keys[kChunk];
  const T* values[kChunk];
  find_rows(pages, table, kv_head, start, to, keys, values);
  if (sizeof(T) == sizeof(float) || num_queries < kConvertFrom) {
    attend_rows(queries, num_queries, start, from, to, keys, values, pages.head_dim, softcap, scratch, masses,
                outs);
    return;
  }
  const float* float_keys[kChunk];
  const float* float_values[kChunk];
  convert_rows(keys, from, to, pages.head_dim, scratch.keys, float_keys);
  convert_rows(values, from, to, pages.head_dim, scratch.values, float_values);
  attend_rows(queries, num_queries, start, from, to, float_keys, float_values, pages.head_dim, softcap, scratch,
              masses, outs);
}

// Runs queries of one row and kv head over all the chunks they see, and writes their results.
template <class T>
inline void attend_unit(const KvPages& pages, const int32_t* table, int kv_head, const Query* queries,
                        int num_queries, float softcap, AttentionScratch& scratch) {
  const int head_dim = pages.head_dim;
  int64_t low = queries[0].low, high = queries[0].high;
  for (int n = 1; n < num_queries; ++n) {
    low = std::min(low, queries[n].low);
    high = std::max(high, queries[n].high);
  }
  Mass states[kMaxQueries], masses[kMaxQueries];
  float* outs[kMaxQueries];
  for (int n = 0; n < num_queries; ++n) {
    states[n] = {-1e30f, 0.0f};
    outs[n] = scratch.parts + static_cast<size_t>(n) * head_dim;
  }
  for (int64_t start = low / kChunk * kChunk; start < high; start += kChunk) {
    attend_chunk<T>(pages, table, kv_head, queries, num_queries, start, low, high, softcap, scratch, masses, outs);
    for (int n = 0; n < num_queries; ++n) {
      if (masses[n].sum == 0.0f) continue;
      float* state_out = scratch.states + static_cast<size_t>(n) * head_dim;
      if (states[n].sum == 0.0f) {
        states[n] = masses[n];
        std::memcpy(state_out, outs[n], sizeof(float) * head_dim);
      } else {
        fold(states[n], state_out, masses[n], outs[n], head_dim);
      }
    }
  }
  for (int n = 0; n < num_queries; ++n) {
    const Vec8 inverse = vec8(1.0f / states[n].sum);
    const float* state_out = scratch.states + static_cast<size_t>(n) * head_dim;
    for (int d = 0; d < head_dim; d += 8) store8(queries[n].out + d, load8(state_out + d) * inverse);
  }
}

}  // namespace slipstream
