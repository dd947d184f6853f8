// What the branch does to an activation, in one pass over it: no torch headers here.
#pragma once

#include <cstdint>

#include "../common/simd.h"
#include "../common/storage.h"

namespace lora_kernels {

struct Range {
  int64_t begin, end;
};

// x[rows, cols] with its rows `stride` apart; keep == nullptr where nothing is dropped.
struct Activation {
  const void* data;
  Storage storage;
  int64_t stride;
  const uint8_t* keep;
  int64_t keep_stride;
  double scale;
};

// Columns of x that are worked on at a time: their rows of a factor and a gradient stay in L1.
constexpr int64_t kStrip = 256;

// The rank is padded with zeros to whole vectors, so that no loop over it has a tail.
constexpr int64_t padded_rank(int64_t rank) { return (rank + kLanes - 1) / kLanes * kLanes; }

// shrunk[m, :] += sum_k x[m, k] factor[k, :], where there is a factor [cols, rank];
// outer[k, :] += sum_m x[m, k] vectors[m, :], where there are vectors [rows, rank].
template <typename Math>
struct Products {
  int64_t rank;
  const Math* factor;
  Math* shrunk;
  const Math* vectors;
  Math* outer;
};

void accumulate(const Activation& x, Range rows, Range cols, const Products<float>& products);
void accumulate(const Activation& x, Range rows, Range cols, const Products<double>& products);

// out[k, m] = in[m, k] for m in [0, rows) and k in `cols`.
void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride, int64_t rows,
               Range cols);
void transpose(const double* in, int64_t in_stride, double* out, int64_t out_stride, int64_t rows,
               Range cols);

// out[m, k] = keep[m, k] * scale * sum_r vectors[m, r] factor[r, k], out [rows, cols] contiguous;
// keep == nullptr where nothing is dropped, and with `add` the sum goes to what out holds.
template <typename Math>
struct Expansion {
  int64_t rank;
  const Math* vectors;
  int64_t vector_stride;
  const Math* factor;
  int64_t factor_stride;
  int64_t cols;
  void* out;
  Storage storage;
  const uint8_t* keep;
  int64_t keep_stride;
  Math scale;
  bool add;
};

// out[n] = |w[n, :] + sum_r vectors[n, r] factor[r, :]|, the sum of a strip in Math and of strips
// in double; `expansion` has no out and no keep.
template <typename Math>
struct Norms {
  Activation w;
  Expansion<Math> expansion;
  Math* out;
};

void norms(const Norms<float>& norms, Range rows);
void norms(const Norms<double>& norms, Range rows);

void expand(const Expansion<float>& expansion, Range rows);
void expand(const Expansion<double>& expansion, Range rows);

}  // namespace lora_kernels
