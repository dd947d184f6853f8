// The products of a batch whose rows belong to different adapters: no torch headers here.
//
// A page is one rank row of an adapter's A, or one column of its B. Every sum has one order that
// depends on its own row and adapter alone, so a row comes out the same whoever else is in the
// batch.
#pragma once

#include <cstdint>

#include "../common/storage.h"

namespace lora_kernels {

// Rows and pages that are worked on together.
constexpr int kTile = 4;

// Pages [*, cols] of one storage type; `index` holds those of one adapter.
struct Pages {
  const void* data;
  Storage storage;
  int64_t stride, cols;
  const int32_t* index;
};

// The rows of one adapter: slot i of them is rows[slots[i]].
template <typename Math>
struct Rows {
  const Math* data;
  int64_t stride;
  const int32_t* slots;
  int64_t count;
  // A row serves this many slots.
  int64_t slots_per_row;
};

// out[slot, r] = rows[slot] . page[r], for r in [first, last).
void dots(const Rows<float>& rows, const Pages& pages, int64_t first, int64_t last, float* out,
          int64_t out_stride);
void dots(const Rows<double>& rows, const Pages& pages, int64_t first, int64_t last, double* out,
          int64_t out_stride);

// Columns of a matrix that one task works on.
struct Columns {
  int64_t begin, end;
};

// out[slot, columns] = sum over r < rank of vectors[slot, r] page[r, columns].
template <typename Math>
struct Mix {
  const Math* vectors;
  int64_t vector_stride, rank;
  Math* out;
  int64_t out_stride;
};

void mix(const Rows<float>& slots, const Pages& pages, const Mix<float>& mix, Columns columns);
void mix(const Rows<double>& slots, const Pages& pages, const Mix<double>& mix, Columns columns);

// A matrix of any storage type whose columns have unit stride.
struct Target {
  void* data;
  Storage storage;
  int64_t stride;
};

// to[slot / slots_per_row, columns] += what mix() gives, summed first and added once. Here mix.out
// is memory for kTile rows of `columns`, and its stride is not used.
void mix_add(const Rows<float>& slots, const Pages& pages, const Mix<float>& mix, Columns columns,
             const Target& to);
void mix_add(const Rows<double>& slots, const Pages& pages, const Mix<double>& mix, Columns columns,
             const Target& to);

// out[page[r], columns] = sum over slots of vectors[slot, r] rows[slot, columns], for r in
// [first, last).
void outer_pages(const Rows<float>& rows, const int32_t* index, int64_t first, int64_t last,
                 const Mix<float>& mix, Columns columns);
void outer_pages(const Rows<double>& rows, const int32_t* index, int64_t first, int64_t last,
                 const Mix<double>& mix, Columns columns);

// out[r * width + n] = from[n * stride + r], for r in [0, rank) and n in [0, width).
void turn(const void* from, Storage storage, int64_t stride, int64_t rank, int64_t width,
          float* out);
void turn(const void* from, Storage storage, int64_t stride, int64_t rank, int64_t width,
          double* out);

}  // namespace lora_kernels
