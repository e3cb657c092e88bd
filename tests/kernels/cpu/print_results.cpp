// What are the bits that this instruction set computes? A hash of packed weights and of products for each
// pair of stored type and kind, from pseudo-random inputs that are the same everywhere.
//
// Compiled for two machines by test_instruction_sets_agree.py, which compares what they print.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "exports_linear.h"

using namespace slipstream;

namespace {

constexpr int kRows = 40, kCols = 512;

uint32_t random_bits() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

struct Hash {
  uint64_t value = 14695981039346656037ull;

  void add(const void* data, size_t size) {
    for (size_t i = 0; i < size; ++i) {
      value = (value ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211ull;
    }
  }
};

void put_half(uint8_t* place) {
  const uint16_t bits = static_cast<uint16_t>(0x1c00 + random_bits() % 0x800);
  std::memcpy(place, &bits, 2);
}

std::vector<uint8_t> stored_rows(int source) {
  std::vector<uint8_t> rows(source_row_bytes(source, kCols) * kRows);
  for (uint8_t& byte : rows) byte = static_cast<uint8_t>(random_bits() >> 3);
  if (source == kSourceF32) {
    for (size_t i = 0; i < rows.size(); i += 4) {
      const float x = static_cast<float>(static_cast<int>(random_bits() % 2001) - 1000) / 997.0f;
      std::memcpy(&rows[i], &x, 4);
    }
  } else if (is_float_source(source)) {
    for (size_t i = 0; i < rows.size(); i += 2) put_half(&rows[i]);
  } else {
    const bool has_minimum = native_kind(source) == kQ4Min || native_kind(source) == kQ5Min;
    for (size_t i = 0; i < rows.size(); i += source_block_bytes(source)) {
      put_half(&rows[i] + (source == kSourceQ6_K ? 208 : 0));
      if (has_minimum) put_half(&rows[i] + 2);
    }
  }
  return rows;
}

void print_products(int source, int kind) {
  const std::vector<uint8_t> rows = stored_rows(source);
  const size_t size = ss_matrix_bytes(kind, kRows, kCols);
  uint8_t* packed = static_cast<uint8_t*>(std::aligned_alloc(kAlignment, size));
  if (ss_pack(kind, source, rows.data(), kRows, kCols, packed) != kPacked) std::abort();
  Hash weights, products;
  weights.add(packed, size);
  const Matrix matrix{packed, kind, kRows, kCols, 0};
  for (int tokens : {1, 2, 3, 4, 5, 6, 7, 8, 13}) {
    std::vector<float> x(static_cast<size_t>(tokens) * kCols), y(static_cast<size_t>(tokens) * kRows);
    for (float& value : x) value = static_cast<float>(static_cast<int>(random_bits() % 2003) - 1001) / 311.0f;
    std::vector<uint8_t> scratch(ss_linear_scratch_bytes(kind, kCols, tokens));
    ss_linear(&matrix, x.data(), y.data(), tokens, nullptr, scratch.data());
    products.add(y.data(), y.size() * sizeof(float));
  }
  std::printf("%d %d %016llx %016llx\n", source, kind, static_cast<unsigned long long>(weights.value),
              static_cast<unsigned long long>(products.value));
  std::free(packed);
}

void print_functions() {
  Hash exponentials, tangents;
  for (int i = -30000; i < 30000; ++i) {
    float values[kLanes];
    exp(Floats::set(static_cast<float>(i) / 317.0f)).store(values);
    exponentials.add(values, sizeof values);
    tanh(Floats::set(static_cast<float>(i) / 3001.0f)).store(values);
    tangents.add(values, sizeof values);
  }
  std::printf("exp %016llx tanh %016llx\n", static_cast<unsigned long long>(exponentials.value),
              static_cast<unsigned long long>(tangents.value));
}

}  // namespace

int main() {
  pool().resize(2);
  const int pairs[][2] = {{kSourceF32, kF32},    {kSourceBF16, kBF16},    {kSourceF16, kF32},
                          {kSourceQ4_0, kQ4Sym}, {kSourceQ4_1, kQ4Min},   {kSourceQ4_K, kQ4Min},
                          {kSourceQ5_0, kQ5Sym}, {kSourceQ5_1, kQ5Min},   {kSourceQ5_K, kQ5Min},
                          {kSourceQ6_K, kQ6},    {kSourceQ8_0, kQ8Group}, {kSourceF32, kQ8Group},
                          {kSourceF32, kQ8Row}};
  for (const auto& pair : pairs) print_products(pair[0], pair[1]);
  print_functions();
  return 0;
}
