// What does a decoder block compute, in one call? Norm, q, k and v, rotary, cache, attention, output, norm,
// MLP, with the options in which families differ. Its reference is the block composed of small ops.
//
// Phases follow one another with a barrier between them. With one token every thread keeps its own copy of the
// hidden state and of its int8 form, which saves barriers; with more, a thread owns some of the tokens.
// Invariant: no phase mixes tokens but attention, whose result does not depend on the cut; so a token's bits do
// not depend on its neighbours, on the number of threads or on the chunking of a prompt.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "activations.h"
#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "matmul.h"
#include "matrix.h"
#include "pool.h"
#include "vec8.h"

namespace slipstream {

// Constants of one layer; mirrored in Python. A pointer to what a family does not have is null.
struct Block {
  int32_t hidden, heads, kv_heads, head_dim, intermediate;
  int32_t group;        // of the cache
  int32_t window;       // 0: none
  int32_t activation;
  int32_t is_gated, is_parallel, is_layer_norm, is_interleaved;
  float norm_eps, scale, softcap, reserved;
  int64_t place_offset;  // elements from a page's start to this layer's K
  Matrix q, k, v, output, gate, up, down;
  const float *q_bias, *k_bias, *v_bias, *output_bias, *gate_bias, *up_bias, *down_bias;
  const float *input_norm, *input_norm_bias, *q_norm, *k_norm;
  const float *post_attention_norm, *mlp_norm, *post_mlp_norm;
  const float* rotary_table;  // [positions][2][head_dim]: cosines, signed sines
};

// One cache group in one step; mirrored in Python.
struct GroupStep {
  KvPages pages;
  const int64_t* slots;        // [tokens] page * block_tokens + offset
  const int32_t* block_table;  // [rows][table_stride] pages
  int64_t table_stride;
};

// One step; mirrored in Python.
struct Step {
  int64_t tokens, rows;
  const int64_t* positions;    // [tokens]
  const int64_t* query_start;  // [rows + 1]
  const GroupStep* groups;
  int64_t max_seq_len;         // bound of the rows' lengths
};

// Cuts memory into pieces, each on a cache line of its own.
class Carver {
 public:
  explicit Carver(uint8_t* memory) : start_(memory), at_(memory) {}
  uint8_t* take(size_t bytes) {
    uint8_t* piece = at_;
    at_ += (bytes + 63) / 64 * 64;
    return piece;
  }
  template <class T>
  T* take_array(size_t count) {
    return reinterpret_cast<T*>(take(count * sizeof(T)));
  }
  size_t used() const { return static_cast<size_t>(at_ - start_); }

 private:
  uint8_t* start_;
  uint8_t* at_;
};

// What threads share while a block runs, and what each has of its own.
struct Workspace {
  struct Own {
    float* x;                     // one token's hidden state, where tokens == 1
    float* row;                   // a row of floats of the widest kind
    Activations normed, attended; // one token's, where tokens == 1
    AttentionScratch* attention;
  };
  Activations normed, attended, mixed;
  float* qkv;       // [tokens][(heads + 2 kv_heads) * head_dim]
  float* context;   // [tokens][heads * head_dim]
  float* delta;     // [tokens][hidden], what attention adds
  float* change;    // [tokens][hidden], what the MLP adds
  float* parts;     // [chunks][heads][head_dim + 2], where tokens == 1
  std::atomic<int64_t>* next_unit;
  Own* own;
};

inline int head_floats(const Block& block) { return block.head_dim + 2; }

// Which forms of activations the matrices that read them need.
struct Forms {
  bool rows = false, codes = false;
  void add(const Matrix& w) {
    if (w.data == nullptr) return;
    (w.kind == kF32 || w.kind == kBF16 ? rows : codes) = true;
  }
};

// Lays a workspace out; with memory null it only measures.
inline size_t lay_out(const Block& block, int64_t tokens, int64_t max_seq_len, int threads, uint8_t* memory,
                      Workspace* workspace) {
  Carver carver(memory);
  Workspace ws{};
  const int64_t query_width = static_cast<int64_t>(block.heads) * block.head_dim;
  const int64_t qkv_width = query_width + 2LL * block.kv_heads * block.head_dim;
  Forms normed, attended, mixed;
  for (const Matrix* w : {&block.q, &block.k, &block.v, &block.gate, &block.up}) normed.add(*w);
  attended.add(block.output);
  mixed.add(block.down);
  const auto activations = [&](int64_t count, int64_t cols, Forms forms) {
    const int rows = static_cast<int>(count), width = static_cast<int>(cols);
    uint8_t* piece = carver.take(Activations::bytes(rows, width, forms.rows, forms.codes));
    return memory == nullptr ? Activations{} : Activations::carve(piece, rows, width, forms.rows, forms.codes);
  };
  ws.normed = activations(tokens, block.hidden, normed);
  ws.attended = activations(tokens, query_width, attended);
  ws.mixed = activations(tokens, block.intermediate, mixed);
  ws.qkv = carver.take_array<float>(tokens * qkv_width);
  ws.context = carver.take_array<float>(tokens * query_width);
  ws.delta = carver.take_array<float>(tokens * block.hidden);
  ws.change = carver.take_array<float>(tokens * block.hidden);
  const int64_t chunks = tokens == 1 ? (max_seq_len + kChunk - 1) / kChunk : 0;
  ws.parts = carver.take_array<float>(chunks * block.heads * head_floats(block));
  ws.next_unit = carver.take_array<std::atomic<int64_t>>(1);
  ws.own = carver.take_array<Workspace::Own>(threads);
  const int64_t widest = std::max<int64_t>({block.hidden, query_width, block.head_dim});
  for (int thread = 0; thread < threads; ++thread) {
    Workspace::Own own{};
    own.x = carver.take_array<float>(block.hidden);
    own.row = carver.take_array<float>(widest);
    own.normed = activations(1, block.hidden, normed);
    own.attended = activations(1, query_width, attended);
    uint8_t* attention = carver.take(AttentionScratch::bytes(block.head_dim));
    if (memory != nullptr) {
      own.attention = AttentionScratch::carve(attention, block.head_dim);
      ws.own[thread] = own;
    }
  }
  if (workspace != nullptr) *workspace = ws;
  return carver.used();
}

// Bytes of activations that should stay in a core's second-level cache while weights stream past them.
constexpr int64_t kActivationBytes = 192 << 10;

// Calls sink(first_row, num_rows, first_token, num_tokens, y) for every tile of a product; y is
// [num_tokens][16], bias added.
template <class Sink>
inline void multiply(const Matrix& w, const float* bias, int64_t first_tile, int64_t last_tile,
                     const Activations& a, int64_t tokens, Sink&& sink) {
  const int64_t run = std::max<int64_t>(kActivationBytes / w.cols / kTokens, 1) * kTokens;
  alignas(64) float y[kTokens * 16];
  for (int64_t begin = 0; begin < tokens; begin += run) {
    const int64_t end = std::min(begin + run, tokens);
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      const Tile weights = open_tile(w, static_cast<int>(tile), end - begin);
      const int row = static_cast<int>(tile * 16);
      const int num_rows = std::min(16, w.rows - row);
      for (int64_t token = begin; token < end; token += kTokens) {
        const int count = static_cast<int>(std::min<int64_t>(kTokens, end - token));
        matmul_tile<false>(weights, a, static_cast<int>(token), count, y, 16);
        if (bias != nullptr) {
          for (int t = 0; t < count; ++t) {
            for (int r = 0; r < num_rows; ++r) y[t * 16 + r] += bias[row + r];
          }
        }
        sink(row, num_rows, token, count, y);
      }
    }
  }
}

// One run of one block by one of `threads` threads.
class BlockRun {
 public:
  BlockRun(const Block& block, const Step& step, Workspace& ws, float* x, int thread, int threads)
      : block_(block), step_(step), ws_(ws), own_(ws.own[thread]), x_(x), thread_(thread), threads_(threads),
        tokens_(step.tokens), is_single_(step.tokens == 1), mine_(Share::of(static_cast<int>(step.tokens), thread, threads)) {}

  // In a stack, blocks after the first find a lone token's hidden state where the one before left it.
  void run(bool is_first = true) {
    if (is_single_ && is_first) std::memcpy(own_.x, x_, sizeof(float) * block_.hidden);
    begin();
    project_qkv();
    meet();
    place_qkv();
    meet();
    attend();
    meet();
    quantize_context();
    project(block_.output, block_.output_bias, is_single_ ? own_.attended : ws_.attended, ws_.delta);
    if (!block_.is_parallel) {
      meet();
      add_and_norm(ws_.delta, block_.post_attention_norm, block_.mlp_norm);
    }
    mix();
    meet();
    project(block_.down, block_.down_bias, ws_.mixed, ws_.change);
    meet();
    finish();
  }

  // Attention alone, for q, k and v that are turned already; the context goes to ws.context.
  void run_attention(const float* q, const float* k, const float* v) {
    if (thread_ == 0) ws_.next_unit->store(0, std::memory_order_relaxed);
    take_qkv(q, k, v);
    meet();
    attend();
    if (!is_single_) return;
    meet();
    if (thread_ == 0) fold_parts(ws_.context);
  }

 private:
  void meet() { pool().barrier(); }

  float* x_of(int64_t token) { return is_single_ ? own_.x : x_ + token * block_.hidden; }
  Activations& normed() { return is_single_ ? own_.normed : ws_.normed; }

  // Tokens this thread norms: all of them (one, its own copy) or its share.
  int64_t first_token() const { return is_single_ ? 0 : mine_.begin; }
  int64_t last_token() const { return is_single_ ? 1 : mine_.end; }

  void norm(const float* x, const float* weight, float* y) const {
    if (block_.is_layer_norm) {
      layer_norm(x, weight, block_.input_norm_bias, block_.norm_eps, block_.hidden, y);
    } else {
      rms_norm(x, weight, block_.norm_eps, block_.hidden, y);
    }
  }

  void begin() {
    for (int64_t token = first_token(); token < last_token(); ++token) {
      norm(x_of(token), block_.input_norm, own_.row);
      normed().quantize(own_.row, static_cast<int>(token));
    }
    if (thread_ == 0) ws_.next_unit->store(0, std::memory_order_relaxed);
    if (!is_single_) meet();
  }

  void project_qkv() {
    const Matrix* matrices[3] = {&block_.q, &block_.k, &block_.v};
    const float* biases[3] = {block_.q_bias, block_.k_bias, block_.v_bias};
    const int64_t width = qkv_width();
    const Share share = Share::of(num_tiles(block_.q.rows) + num_tiles(block_.k.rows) + num_tiles(block_.v.rows), thread_, threads_);
    int64_t base = 0, offset = 0;
    for (int i = 0; i < 3; ++i) {
      const int64_t tiles = num_tiles(matrices[i]->rows);
      const int64_t first = std::min(std::max<int64_t>(share.begin - base, 0), tiles);
      const int64_t last = std::min(std::max<int64_t>(share.end - base, 0), tiles);
      multiply(*matrices[i], biases[i], first, last, normed(), tokens_,
               [&](int row, int rows, int64_t token, int count, const float* y) {
                 for (int t = 0; t < count; ++t) {
                   std::memcpy(ws_.qkv + (token + t) * width + offset + row, y + t * 16, sizeof(float) * rows);
                 }
               });
      base += tiles;
      offset += matrices[i]->rows;
    }
  }

  int64_t query_width() const { return static_cast<int64_t>(block_.heads) * block_.head_dim; }
  int64_t qkv_width() const { return query_width() + 2LL * block_.kv_heads * block_.head_dim; }

  // Norms and turns the heads of q and k, scales q, and stores k and v in their slots.
  void place_qkv() {
    const int heads = block_.heads + 2 * block_.kv_heads;
    const Share share = Share::of(static_cast<int>(tokens_ * heads), thread_, threads_);
    for (int64_t unit = share.begin; unit < share.end; ++unit) {
      const int64_t token = unit / heads;
      const int head = static_cast<int>(unit % heads);
      float* values = ws_.qkv + token * qkv_width() + static_cast<int64_t>(head) * block_.head_dim;
      const int kv_head = head - block_.heads;
      if (kv_head < block_.kv_heads) turn(values, token, kv_head < 0);
      if (kv_head >= 0) store(values, token, kv_head % block_.kv_heads, kv_head >= block_.kv_heads);
    }
  }

  void take_qkv(const float* q, const float* k, const float* v) {
    const int64_t kv_width = static_cast<int64_t>(block_.kv_heads) * block_.head_dim;
    for (int64_t token = mine_.begin; token < mine_.end; ++token) {
      float* row = ws_.qkv + token * qkv_width();
      std::memcpy(row, q + token * query_width(), sizeof(float) * query_width());
      for (int head = 0; head < block_.heads; ++head) scale_query(row + head * block_.head_dim);
      for (int head = 0; head < block_.kv_heads; ++head) {
        store(k + token * kv_width + head * block_.head_dim, token, head, false);
        store(v + token * kv_width + head * block_.head_dim, token, head, true);
      }
    }
  }

  void scale_query(float* head) const {
    const Vec8 scale = vec8(block_.scale);
    for (int d = 0; d < block_.head_dim; d += 8) store8(head + d, load8(head + d) * scale);
  }

  void turn(float* head, int64_t token, bool is_query) const {
    const float* weight = is_query ? block_.q_norm : block_.k_norm;
    const int size = block_.head_dim;
    if (weight != nullptr) rms_norm(head, weight, block_.norm_eps, size, head);
    rotate(head, block_.rotary_table + step_.positions[token] * 2 * size, size, block_.is_interleaved != 0);
    if (is_query) scale_query(head);
  }

  void store(const float* head, int64_t token, int kv_head, bool is_value) const {
    const GroupStep& group = step_.groups[block_.group];
    const int64_t slot = group.slots[token], block = group.pages.block_tokens;
    if (group.pages.element_bytes == 2) {
      store_as<uint16_t>(group, head, slot / block, slot % block, kv_head, is_value);
    } else {
      store_as<float>(group, head, slot / block, slot % block, kv_head, is_value);
    }
  }

  template <class T>
  void store_as(const GroupStep& group, const float* head, int64_t page, int64_t offset, int kv_head,
                bool is_value) const {
    T* slot = pages_of_layer(group).key<T>(page, offset, kv_head) + (is_value ? group.pages.value_offset : 0);
    for (int d = 0; d < block_.head_dim; d += 8) store8(slot + d, load8(head + d));
  }

  KvPages pages_of_layer(const GroupStep& group) const {
    KvPages pages = group.pages;
    pages.base += block_.place_offset * pages.element_bytes;
    return pages;
  }

  void attend() {
    const GroupStep& group = step_.groups[block_.group];
    if (group.pages.element_bytes == 2) {
      attend_as<uint16_t>(group);
    } else {
      attend_as<float>(group);
    }
  }

  template <class T>
  void attend_as(const GroupStep& group) {
    if (is_single_) {
      attend_single<T>(group);
    } else {
      attend_many<T>(group);
    }
  }

  int group_heads() const { return block_.heads / block_.kv_heads; }

  Query query_of(int64_t token, int head) const {
    const int64_t position = step_.positions[token];
    const int64_t low = block_.window == 0 ? 0 : std::max<int64_t>(position + 1 - block_.window, 0);
    const float* q = ws_.qkv + token * qkv_width() + static_cast<int64_t>(head) * block_.head_dim;
    float* out = ws_.context + token * query_width() + static_cast<int64_t>(head) * block_.head_dim;
    return {q, out, low, position + 1};
  }

  // One token: the chunks of its context are shared out, and folded by everybody after the barrier.
  template <class T>
  void attend_single(const GroupStep& group) {
    const KvPages pages = pages_of_layer(group);
    const Query seen = query_of(0, 0);
    const int64_t first = seen.low / kChunk, last = (seen.high + kChunk - 1) / kChunk;
    const int runs = (group_heads() + kMaxQueries - 1) / kMaxQueries;
    const Share share = Share::of(static_cast<int>((last - first) * block_.kv_heads * runs), thread_, threads_);
    for (int64_t unit = share.begin; unit < share.end; ++unit) {
      const int64_t chunk = first + unit / (block_.kv_heads * runs);
      const int kv_head = static_cast<int>(unit % (block_.kv_heads * runs)) / runs;
      const int begin = static_cast<int>(unit % runs) * kMaxQueries;
      const int count = std::min(group_heads() - begin, kMaxQueries);
      Query queries[kMaxQueries];
      float* outs[kMaxQueries];
      Mass masses[kMaxQueries];
      for (int n = 0; n < count; ++n) {
        const int head = kv_head * group_heads() + begin + n;
        queries[n] = query_of(0, head);
        outs[n] = part_of(chunk - first, head) + 2;
      }
      attend_chunk<T>(pages, group.block_table, kv_head, queries, count, chunk * kChunk, seen.low, seen.high,
                      block_.softcap, *own_.attention, masses, outs);
      for (int n = 0; n < count; ++n) std::memcpy(outs[n] - 2, &masses[n], sizeof(Mass));
    }
  }

  float* part_of(int64_t chunk, int head) const {
    return ws_.parts + (chunk * block_.heads + head) * head_floats(block_);
  }

  // Folds the chunks of a lone token into its context, in this thread's own row.
  void fold_parts(float* context) const {
    const Query seen = query_of(0, 0);
    const int64_t chunks = (seen.high + kChunk - 1) / kChunk - seen.low / kChunk;
    for (int head = 0; head < block_.heads; ++head) {
      float* out = context + static_cast<int64_t>(head) * block_.head_dim;
      Mass state;
      std::memcpy(&state, part_of(0, head), sizeof state);
      std::memcpy(out, part_of(0, head) + 2, sizeof(float) * block_.head_dim);
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        Mass part;
        std::memcpy(&part, part_of(chunk, head), sizeof part);
        fold(state, out, part, part_of(chunk, head) + 2, block_.head_dim);
      }
      const Vec8 inverse = vec8(1.0f / state.sum);
      for (int d = 0; d < block_.head_dim; d += 8) store8(out + d, load8(out + d) * inverse);
    }
  }

  // Many tokens: units of (row, kv head, run of tokens), taken as threads come free.
  template <class T>
  void attend_many(const GroupStep& group) {
    const KvPages pages = pages_of_layer(group);
    const int heads = group_heads();
    const int heads_at_once = std::min(heads, kMaxQueries);
    const int64_t tokens_at_once = std::max(kMaxQueries / heads, 1);
    int64_t unit = 0, next = ws_.next_unit->fetch_add(1, std::memory_order_relaxed);
    for (int64_t row = 0; row < step_.rows; ++row) {
      const int64_t begin = step_.query_start[row], end = step_.query_start[row + 1];
      const int32_t* table = group.block_table + row * group.table_stride;
      for (int kv_head = 0; kv_head < block_.kv_heads; ++kv_head) {
        for (int64_t token = begin; token < end; token += tokens_at_once, ++unit) {
          if (unit != next) continue;
          next = ws_.next_unit->fetch_add(1, std::memory_order_relaxed);
          const int64_t last = std::min(token + tokens_at_once, end);
          for (int first = 0; first < heads; first += heads_at_once) {
            Query queries[kMaxQueries];
            int count = 0;
            for (int64_t t = token; t < last; ++t) {
              for (int n = first; n < std::min(first + heads_at_once, heads); ++n) {
                queries[count++] = query_of(t, kv_head * heads + n);
              }
            }
            attend_unit<T>(pages, table, kv_head, queries, count, block_.softcap, *own_.attention);
          }
        }
      }
    }
  }

  void quantize_context() {
    if (is_single_) {
      fold_parts(own_.row);
      own_.attended.quantize(own_.row, 0);
      return;
    }
    for (int64_t token = mine_.begin; token < mine_.end; ++token) {
      ws_.attended.quantize(ws_.context + token * query_width(), static_cast<int>(token));
    }
    meet();
  }

  // y = W a for this thread's tiles; y is [tokens][hidden].
  void project(const Matrix& w, const float* bias, const Activations& a, float* y_all) {
    const Share share = Share::of(num_tiles(w.rows), thread_, threads_);
    const int64_t width = block_.hidden;
    multiply(w, bias, share.begin, share.end, a, tokens_,
             [&](int row, int rows, int64_t token, int count, const float* y) {
               for (int t = 0; t < count; ++t) {
                 std::memcpy(y_all + (token + t) * width + row, y + t * 16, sizeof(float) * rows);
               }
             });
  }

  // x += delta (normed where the family does so), then the int8 form of norm(x) for the MLP.
  void add_and_norm(const float* delta, const float* post_norm, const float* next_norm) {
    for (int64_t token = first_token(); token < last_token(); ++token) {
      add(token, delta, post_norm);
      norm(x_of(token), next_norm, own_.row);
      normed().quantize(own_.row, static_cast<int>(token));
    }
    if (!is_single_) meet();
  }

  void add(int64_t token, const float* delta, const float* post_norm) {
    const float* row = delta + token * block_.hidden;
    if (post_norm != nullptr) {
      rms_norm(row, post_norm, block_.norm_eps, block_.hidden, own_.row);
      row = own_.row;
    }
    add_rows(x_of(token), row, block_.hidden);
  }

  // Up (and gate), activation, and the int8 form of the result, 32 outputs at a time.
  void mix() {
    const int64_t groups = (block_.intermediate + 31) / 32;
    const Share share = Share::of(static_cast<int>(groups), thread_, threads_);
    const Activations& a = normed();
    const int64_t run = std::max<int64_t>(kActivationBytes / block_.hidden / kTokens, 1) * kTokens;
    for (int64_t begin = 0; begin < tokens_; begin += run) {
      const int64_t end = std::min(begin + run, tokens_);
      for (int64_t group = share.begin; group < share.end; ++group) mix_group(group, a, begin, end);
    }
  }

  // The two tiles of up, and of gate, that make a group.
  void mix_group(int64_t group, const Activations& a, int64_t begin, int64_t end) {
    const int first = static_cast<int>(group * 2), tiles = num_tiles(block_.up.rows);
    const int second = first + 1 < tiles ? first + 1 : first;
    const Matrix& gate = block_.is_gated ? block_.gate : block_.up;
    const int64_t gate_tokens = block_.is_gated ? end - begin : 0;
    const Tile up_tiles[2] = {open_tile(block_.up, first, end - begin, 0),
                              open_tile(block_.up, second, end - begin, 1)};
    const Tile gate_tiles[2] = {open_tile(gate, first, gate_tokens, 2), open_tile(gate, second, gate_tokens, 3)};
    for (int64_t token = begin; token < end; token += kTokens) {
      const int count = static_cast<int>(std::min<int64_t>(kTokens, end - token));
      mix_tokens(group, first + 1 < tiles ? 2 : 1, up_tiles, gate_tiles, a, token, count);
    }
  }

  void mix_tokens(int64_t group, int tiles, const Tile* up_tiles, const Tile* gate_tiles, const Activations& a,
                  int64_t token, int count) {
    alignas(64) float gate[kTokens * 32], up[kTokens * 32];
    for (int half = 0; half < 2; ++half) {
      if (half >= tiles) {
        for (int t = 0; t < count; ++t) std::memset(up + t * 32 + 16, 0, 64);
        for (int t = 0; t < count; ++t) std::memset(gate + t * 32 + 16, 0, 64);
        continue;
      }
      multiply_tile(up_tiles[half], block_.up_bias, a, token, count, up + half * 16);
      if (block_.is_gated) multiply_tile(gate_tiles[half], block_.gate_bias, a, token, count, gate + half * 16);
    }
    for (int t = 0; t < count; ++t) {
      float* out = up + t * 32;
      for (int i = 0; i < 32; i += 8) {
        const Vec8 value = load8(out + i);
        const Vec8 mixed = block_.is_gated ? activate(load8(gate + t * 32 + i), block_.activation) * value
                                           : activate(value, block_.activation);
        store8(out + i, mixed);
      }
      ws_.mixed.quantize_group(out, static_cast<int>(token) + t, static_cast<int>(group));
    }
  }

  void multiply_tile(const Tile& tile, const float* bias, const Activations& a, int64_t token, int count,
                     float* y) const {
    matmul_tile<false>(tile, a, static_cast<int>(token), count, y, 32);
    if (bias == nullptr) return;
    const int row = tile.index * 16;
    for (int t = 0; t < count; ++t) {
      for (int r = 0; r < std::min(16, tile.matrix.rows - row); ++r) y[t * 32 + r] += bias[row + r];
    }
  }

  void finish() {
    for (int64_t token = first_token(); token < last_token(); ++token) {
      if (block_.is_parallel) add_rows(x_of(token), ws_.delta + token * block_.hidden, block_.hidden);
      add(token, ws_.change, block_.post_mlp_norm);
    }
    if (is_single_ && thread_ == 0) std::memcpy(x_, own_.x, sizeof(float) * block_.hidden);
  }

  const Block& block_;
  const Step& step_;
  Workspace& ws_;
  Workspace::Own& own_;
  float* x_;
  int thread_, threads_;
  int64_t tokens_;
  bool is_single_;
  Share mine_;
};

}  // namespace slipstream
