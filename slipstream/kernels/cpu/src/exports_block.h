// C functions over block.h and pool.h. They return 0, or -1 for arguments that no kernel serves.
#pragma once

#include "block.h"
#include "decode_step.h"

#ifndef SS_EXPORT
#ifdef _WIN32
#define SS_EXPORT extern "C" __declspec(dllexport)
#else
#define SS_EXPORT extern "C" __attribute__((visibility("default")))
#endif
#endif

namespace slipstream {

inline bool is_served(const Block& block) {
  return block.head_dim > 0 && block.head_dim % 8 == 0 && block.kv_heads > 0 &&
         block.heads % block.kv_heads == 0;
}

}  // namespace slipstream

SS_EXPORT void ss_set_threads(int32_t threads) { slipstream::pool().resize(threads < 1 ? 1 : threads); }

SS_EXPORT int32_t ss_num_threads() { return slipstream::pool().size(); }

// Bytes of scratch that a call with this many tokens needs, for the threads there are now.
SS_EXPORT int64_t ss_block_scratch_bytes(const slipstream::Block* block, int64_t tokens, int64_t max_seq_len) {
  return static_cast<int64_t>(
      slipstream::lay_out(*block, tokens, max_seq_len, slipstream::pool().size(), nullptr, nullptr));
}

// Replaces x [tokens][hidden] by the output of `num_blocks` blocks, run one after another. They have the same
// sizes and need the same forms of activations. `scratch` is aligned to 64 bytes.
SS_EXPORT int32_t ss_decoder_blocks(const slipstream::Block* const* blocks, int32_t num_blocks,
                                    const slipstream::Step* step, float* x, uint8_t* scratch) {
  using namespace slipstream;
  for (int32_t i = 0; i < num_blocks; ++i) {
    if (!is_served(*blocks[i])) return -1;
  }
  Workspace ws;
  lay_out(*blocks[0], step->tokens, step->max_seq_len, pool().size(), scratch, &ws);
  pool().run([&](int thread, int threads) {
    for (int32_t i = 0; i < num_blocks; ++i) {
      BlockRun(*blocks[i], *step, ws, x, thread, threads).run(i == 0);
    }
  });
  return 0;
}

// Stores k and v and attends, for q, k and v that are turned already: q [tokens][heads][head_dim], k and v
// [tokens][kv_heads][head_dim], out like q. Only the block's attention fields are read.
SS_EXPORT int32_t ss_attention(const slipstream::Block* block, const slipstream::Step* step, const float* q,
                               const float* k, const float* v, float* out, uint8_t* scratch) {
  using namespace slipstream;
  if (!is_served(*block)) return -1;
  Workspace ws;
  lay_out(*block, step->tokens, step->max_seq_len, pool().size(), scratch, &ws);
  ws.context = out;
  pool().run([&](int thread, int threads) {
    BlockRun(*block, *step, ws, nullptr, thread, threads).run_attention(q, k, v);
  });
  return 0;
}

// y [rows][cols] = x normed: by root mean square, or, with a bias, by mean and variance. y may be x.
SS_EXPORT void ss_norm(const float* x, const float* weight, const float* bias, float eps, int64_t rows,
                       int64_t cols, float* y) {
  using namespace slipstream;
  pool().run([&](int thread, int threads) {
    const Share mine = Share::of(static_cast<int>(rows), thread, threads);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      const float* from = x + row * cols;
      if (bias != nullptr) {
        layer_norm(from, weight, bias, eps, static_cast<int>(cols), y + row * cols);
      } else {
        rms_norm(from, weight, eps, static_cast<int>(cols), y + row * cols);
      }
    }
  });
}

SS_EXPORT int64_t ss_decode_scratch_bytes(const slipstream::DecodeStep* step) {
  using namespace slipstream;
  return static_cast<int64_t>(lay_out_decode(*step->decoder, step->num_rows, step->max_seq_len,
                                             step->tables->block_tokens, step->tables->num_groups,
                                             pool().size(), nullptr, nullptr));
}

// Runs a step in which every row runs one token. Returns 0, or -1 for blocks that no kernel serves.
SS_EXPORT int32_t ss_decode(const slipstream::DecodeStep* step, uint8_t* scratch) {
  using namespace slipstream;
  for (int64_t i = 0; i < step->decoder->num_blocks; ++i) {
    if (!is_served(*step->decoder->blocks[i])) return -1;
  }
  decode(*step, scratch);
  return 0;
}

// Bytes of the records that Python mirrors, in the order they are declared there; 0 past the last.
SS_EXPORT int64_t ss_record_bytes(int32_t record) {
  using namespace slipstream;
  constexpr int64_t kBytes[] = {sizeof(Matrix), sizeof(KvPages), sizeof(GroupStep), sizeof(Step),
                                sizeof(Block),  sizeof(Decoder), sizeof(RowTables), sizeof(DecodeStep)};
  constexpr int32_t kCount = sizeof(kBytes) / sizeof(kBytes[0]);
  return record >= 0 && record < kCount ? kBytes[record] : 0;
}
