// Gates on a tile of tokens that lie side by side in the lanes: no torch headers here.
//
// A tile has one row of kTokens numbers for each place of a token, so that a gate, which takes the
// places of two axes for each of all others, is a product with rows that lie apart, and no copy.
#pragma once

#include <cstdint>

#include "../common/storage.h"
#include "activation_pass.h"

namespace lora_kernels {

constexpr int64_t kTokens = 32;
// Rows of a gate that are packed side by side.
constexpr int64_t kGateRows = 8;

// Where a gate of `size` columns finds them: offsets[k] beyond each of `count` bases, in numbers.
struct GatePlaces {
  const int64_t* offsets;
  const int64_t* bases;
  int64_t size, count;
};

// The tile of tokens `rows`, zero beyond the columns of x and beyond the last row; of `places`
// rows, a multiple of kLanes. `scratch` has room for kLanes + 1 of a token's rows.
void open_tile(const Matrix& x, Range rows, int64_t cols, int64_t places, float* tile,
               float* scratch);
void open_tile(const Matrix& x, Range rows, int64_t cols, int64_t places, double* tile,
               double* scratch);

// out = tile, or out += tile, in the first `cols` columns of these rows.
void close_tile(const float* tile, int64_t places, const Matrix& out, Range rows, int64_t cols,
                bool add, float* scratch);
void close_tile(const double* tile, int64_t places, const Matrix& out, Range rows, int64_t cols,
                bool add, double* scratch);

// out = gate in, for a gate packed as [size / kGateRows][size][kGateRows].
void apply_gate(const GatePlaces& places, const float* gate, const float* in, float* out);
void apply_gate(const GatePlaces& places, const double* gate, const double* in, double* out);

// grad [size, size] += the sum over tokens and bases of g h'.
void sum_gate(const GatePlaces& places, const float* g, const float* h, float* grad);
void sum_gate(const GatePlaces& places, const double* g, const double* h, double* grad);

}  // namespace lora_kernels
