// What DoRA does to activations element by element, one pass each: no torch headers here.
#pragma once

#include <cstdint>

#include "../common/storage.h"
#include "activation_pass.h"

namespace lora_kernels {

struct Keep {
  const uint8_t* bits;
  int64_t stride;
  double scale;
};

// y = z * scale + bias, by column, or y += that; a null bias is zero. y may be z.
template <typename Math>
struct Scaling {
  Matrix z;
  const Math* scale;
  const Math* bias;
  Matrix y;
  bool accumulate = false;
};

// scaled = dy * factor, and sums[k] = sum_m dy[m, k] z[m, k]; either may be null.
template <typename Math>
struct Unscaling {
  Matrix dy;
  const Math* factor;
  Matrix scaled;
  Matrix z;
  Math* sums;
};

// dropped = keep * scale * x and rest = x - dropped.
struct Splitting {
  Matrix x;
  Keep keep;
  Matrix dropped, rest;
};

// sum += keep * x.
struct Keeping {
  Matrix x;
  Keep keep;
  Matrix sum;
};

void run(const Scaling<float>& pass, Range rows, int64_t cols);
void run(const Scaling<double>& pass, Range rows, int64_t cols);
void run(const Unscaling<float>& pass, Range rows, Range cols);
void run(const Unscaling<double>& pass, Range rows, Range cols);
void run(const Splitting& pass, Range rows, int64_t cols);
void run(const Keeping& pass, Range rows, int64_t cols);

}  // namespace lora_kernels
