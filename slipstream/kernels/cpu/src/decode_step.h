// How does a step in which every row runs one token go from row tables to tokens in one call?
//
// Look up each row's last token, run all blocks, norm, head, and, where every row is greedy, choose and append
// the next token. What the step needs to know (positions, slots, pages) it reads from the row tables itself.
// Invariant: each part is the function that other steps use, so a row's bits are those of any other step.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "block.h"
#include "linear.h"
#include "pool.h"

namespace slipstream {

// A decoder around its blocks; mirrored in Python.
struct Decoder {
  const Block* const* blocks;
  int64_t num_blocks;
  Matrix embedding, head;
  const float *norm, *norm_bias, *head_bias;
  float embedding_scale, norm_eps;
  int32_t is_layer_norm, reserved;
};

// What an engine keeps of its rows; mirrored in Python. Strides count elements.
struct RowTables {
  int32_t* tokens;             // [rows][token_stride]
  int64_t* lengths;            // [rows]
  const int32_t* block_table;  // [groups][rows][row_stride]
  int64_t token_stride, group_stride, row_stride;
  int64_t block_tokens, num_groups;
};

// One step; mirrored in Python. `starts` bound the positions from above; a row's length decides.
struct DecodeStep {
  const Decoder* decoder;
  const RowTables* tables;
  GroupStep* groups;  // with their pages; the rest is filled in here
  const int64_t *rows, *starts;
  int64_t num_rows, max_seq_len;
  float* logits;   // [num_rows][vocabulary]
  int64_t* drawn;  // [2][num_rows]: tokens, statuses; null where others choose
};

enum DrawStatus : int64_t { kDrawn = 0, kBadLogits = 1, kAllMasked = 2 };

// The greatest logit of one thread's part of a row: its index, or -1 for NaN.
struct Leader {
  int64_t index;
  float value;
};

struct DecodeScratch {
  int64_t *positions, *query_start, *ids, *slots;
  int32_t* table;
  float* x;
  float* normed;
  Leader* leaders;  // [threads][num_rows]
  uint8_t* head;
  Activations activations;
  uint8_t* blocks;
  int64_t table_stride;
};

inline size_t lay_out_decode(const Decoder& decoder, int64_t rows, int64_t max_seq_len, int64_t block_tokens,
                             int64_t groups, int threads, uint8_t* memory, DecodeScratch* scratch) {
  Carver carver(memory);
  DecodeScratch made{};
  const Block& block = *decoder.blocks[0];
  made.table_stride = (max_seq_len + block_tokens - 1) / block_tokens;
  made.positions = carver.take_array<int64_t>(rows);
  made.query_start = carver.take_array<int64_t>(rows + 1);
  made.ids = carver.take_array<int64_t>(rows);
  made.slots = carver.take_array<int64_t>(groups * rows);
  made.table = carver.take_array<int32_t>(groups * rows * made.table_stride);
  made.x = carver.take_array<float>(rows * block.hidden);
  made.normed = carver.take_array<float>(static_cast<int64_t>(threads) * block.hidden);
  made.leaders = carver.take_array<Leader>(threads * rows);
  const bool is_float = is_float_kind(decoder.head.kind);
  made.head = carver.take(Activations::bytes(static_cast<int>(rows), block.hidden, is_float, !is_float));
  if (memory != nullptr) {
    made.activations =
        Activations::carve(made.head, static_cast<int>(rows), block.hidden, is_float, !is_float);
  }
  made.blocks = carver.take(lay_out(block, rows, max_seq_len, threads, nullptr, nullptr));
  if (scratch != nullptr) *scratch = made;
  return carver.used();
}

// Reads positions, tokens, slots and pages of the step's rows.
inline void describe_rows(const DecodeStep& step, const DecodeScratch& scratch) {
  const RowTables& tables = *step.tables;
  scratch.query_start[0] = 0;
  for (int64_t i = 0; i < step.num_rows; ++i) {
    const int64_t row = step.rows[i];
    const int64_t position = std::min(step.starts[i], tables.lengths[row] - 1);
    scratch.positions[i] = position;
    scratch.query_start[i + 1] = i + 1;
    scratch.ids[i] = tables.tokens[row * tables.token_stride + position];
    for (int64_t g = 0; g < tables.num_groups; ++g) {
      const int32_t* from = tables.block_table + g * tables.group_stride + row * tables.row_stride;
      int32_t* to = scratch.table + (g * step.num_rows + i) * scratch.table_stride;
      const int64_t blocks = position / tables.block_tokens + 1;
      std::memcpy(to, from, sizeof(int32_t) * blocks);
      scratch.slots[g * step.num_rows + i] = to[blocks - 1] * tables.block_tokens + position % tables.block_tokens;
    }
  }
  for (int64_t g = 0; g < tables.num_groups; ++g) {
    step.groups[g].slots = scratch.slots + g * step.num_rows;
    step.groups[g].block_table = scratch.table + g * step.num_rows * scratch.table_stride;
    step.groups[g].table_stride = scratch.table_stride;
  }
}

inline void final_norm(const Decoder& decoder, const float* x, int hidden, float* y) {
  if (decoder.is_layer_norm) {
    layer_norm(x, decoder.norm, decoder.norm_bias, decoder.norm_eps, hidden, y);
  } else {
    rms_norm(x, decoder.norm, decoder.norm_eps, hidden, y);
  }
}

// This thread's logits of every row, and the greatest among them.
inline void score_share(const DecodeStep& step, const DecodeScratch& scratch, int thread, int threads) {
  const Matrix& head = step.decoder->head;
  const int tokens = static_cast<int>(step.num_rows);
  linear_share(head, scratch.activations, tokens, step.decoder->head_bias, step.logits, thread, threads);
  if (step.drawn == nullptr) return;
  const Share mine = Share::of(num_tiles(head.rows), thread, threads);
  const int first = mine.begin * kTileRows, last = std::min(mine.end * kTileRows, head.rows);
  for (int i = 0; i < tokens; ++i) {
    const float* row = step.logits + static_cast<int64_t>(i) * head.rows;
    const int64_t found = first < last ? argmax(row + first, last - first) : -2;
    scratch.leaders[thread * step.num_rows + i] =
        found < 0 ? Leader{found, -INFINITY} : Leader{first + found, row[first + found]};
  }
}

// Chooses each row's token from the threads' leaders, and appends it.
inline void choose(const DecodeStep& step, const DecodeScratch& scratch, int threads) {
  const RowTables& tables = *step.tables;
  for (int64_t i = 0; i < step.num_rows; ++i) {
    Leader best{-2, -INFINITY};
    bool has_nan = false;
    for (int thread = 0; thread < threads; ++thread) {
      const Leader& leader = scratch.leaders[thread * step.num_rows + i];
      has_nan = has_nan || leader.index == -1;
      if (leader.index >= 0 && (best.index < 0 || leader.value > best.value)) best = leader;
    }
    const bool is_bad = has_nan || best.value == INFINITY;
    const int64_t status = is_bad ? kBadLogits : best.value == -INFINITY ? kAllMasked : kDrawn;
    const int64_t token = status == kDrawn ? best.index : 0;
    step.drawn[i] = token;
    step.drawn[step.num_rows + i] = status;
    int64_t& length = tables.lengths[step.rows[i]];
    tables.tokens[step.rows[i] * tables.token_stride + length] = static_cast<int32_t>(token);
    ++length;
  }
}

inline void decode(const DecodeStep& step, uint8_t* memory) {
  const Decoder& decoder = *step.decoder;
  const int hidden = decoder.blocks[0]->hidden, tokens = static_cast<int>(step.num_rows);
  DecodeScratch scratch;
  lay_out_decode(decoder, step.num_rows, step.max_seq_len, step.tables->block_tokens, step.tables->num_groups,
                 pool().size(), memory, &scratch);
  describe_rows(step, scratch);
  const Step blocks_step{step.num_rows, step.num_rows,   scratch.positions, scratch.query_start,
                         step.groups,   step.max_seq_len};
  Workspace ws;
  lay_out(*decoder.blocks[0], step.num_rows, step.max_seq_len, pool().size(), scratch.blocks, &ws);
  pool().run([&](int thread, int threads) {
    embedding_share(decoder.embedding, scratch.ids, tokens, decoder.embedding_scale, scratch.x, thread, threads);
    pool().barrier();
    for (int64_t i = 0; i < decoder.num_blocks; ++i) {
      BlockRun(*decoder.blocks[i], blocks_step, ws, scratch.x, thread, threads).run(i == 0);
    }
    pool().barrier();
    const Share mine = Share::of(tokens, thread, threads);
    for (int token = mine.begin; token < mine.end; ++token) {
      float* normed = scratch.normed + static_cast<int64_t>(thread) * hidden;
      final_norm(decoder, scratch.x + static_cast<int64_t>(token) * hidden, hidden, normed);
      scratch.activations.quantize(normed, token);
    }
    pool().barrier();
    score_share(step, scratch, thread, threads);
    pool().barrier();
    if (thread == 0 && step.drawn != nullptr) choose(step, scratch, threads);
  });
}

}  // namespace slipstream
