// Loops over a quantised weight on plain pointers: decoding it, and multiplying while decoding.
//
// Element i of W, counted row by row, is value(code i) * scale(i / block).
#pragma once

#include <cstdint>

#include "../common/storage.h"

namespace lora_kernels {

enum class Format { kNf4, kInt8, kFp8 };

struct QuantizedMatrix {
  const uint8_t* codes;  // two a byte for kNf4, the first in the high half
  const void* scales;    // float, or one byte each where `nested` is there
  const float* nested;   // an offset, 256 values of the scales' codes, a scale for each 256 of them
  Format format;
  int64_t rows, cols, block;
};

// The most rows of x that `dots` takes.
constexpr int64_t kMostRows = 16;
// Columns that `dots` decodes at a time: four rows of them and of x stay in L1.
constexpr int64_t kDecoded = 512;

// Elements [begin, end) of W into out.
void decode(const QuantizedMatrix& weight, int64_t begin, int64_t end, void* out, Storage storage);

// A row of x with its columns in the order in which `dots` multiplies them by this weight's.
void arrange(const QuantizedMatrix& weight, const float* row, float* out);

// out[i][n] = x_i . W_n for `count` rows of x and the rows [begin, end) of W, whose codes are read
// once. The rows of x are arranged, and have zeros up to a multiple of kLanes columns.
void dots(const QuantizedMatrix& weight, const float* x, int64_t x_stride, int64_t count,
          int64_t begin, int64_t end, float* out, int64_t out_stride);

}  // namespace lora_kernels
