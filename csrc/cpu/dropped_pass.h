// Products with what dropout took from x, for a small p: as sparse as p, where a second dense
// product would cost as much as the first. float32 only; no torch headers here.
#pragma once

#include <cstdint>

#include "activation_pass.h"

namespace lora_kernels {

// Columns of x whose dropped elements are listed together.
constexpr int64_t kChunk = 128;
// Output columns that one task of subtract() works on, and rows of x.
constexpr int64_t kPanel = 64;
constexpr int64_t kTaskRows = 512;
// Length of the pieces in which replace() takes its dot products.
constexpr int64_t kPiece = 512;

// The dropped elements of x [rows, cols], by row and by chunk of columns within the row: those of
// the chunk c of row m are starts[m * chunks + c] to starts[m * chunks + c + 1].
struct DroppedList {
  int64_t chunks;
  const int64_t* starts;
  const uint8_t* columns;  // within their chunk
  const float* values;     // of x; null where they are not wanted
};

// How many elements each chunk of each row lost, into counts[m * chunks + c].
void count_dropped(const uint8_t* keep, int64_t keep_stride, int64_t cols, Range rows,
                   int64_t* counts);

// Fills the columns and, for an x that is not null, the values.
void list_dropped(const uint8_t* keep, int64_t keep_stride, const float* x, int64_t x_stride,
                  int64_t cols, Range rows, const int64_t* starts, uint8_t* columns, float* values);

// out[m, n] -= sum over the dropped k of row m of x[m, k] w[n, k], for n in one panel.
struct Subtraction {
  DroppedList list;
  const float* w;
  int64_t w_stride, cols;
  float* out;
  int64_t out_stride;
};

void subtract(const Subtraction& pass, Range rows, Range panel);

// dx[m, k] = sum_n dy[m, n] w[n, k] for the dropped k of row m in one chunk; `tile` has room for
// kChunk * kPiece numbers.
struct Replacement {
  DroppedList list;
  const float* dy;
  int64_t dy_stride;
  const float* w;
  int64_t w_stride, out, cols;
  float* dx;
  int64_t dx_stride;
};

void replace(const Replacement& pass, Range rows, int64_t chunk, float* tile);

}  // namespace lora_kernels
