// Which way an op goes, by the class of its shape: the table is lora_kernels/_cpu_ways.py's, which
// says what the ways and the classes are. The orders here are those of its WAYS, OPS and bands.
#pragma once

#include <ATen/ATen.h>

namespace lora_kernels {

enum class Way : uint8_t { kPanels, kVendor, kTorch };

enum class Op : uint8_t {
  kLinear,
  kLinearBackward,
  kLinearDropped,
  kLinearDroppedBackward,
  kGroup,
  kGroupBackward,
  kGroupDropped,
  kGroupDroppedBackward,
  kDora,
  kDoraBackward,
  kQuantized,
  kCount
};

constexpr int kBands = 3, kSizes = 3, kClasses = 27;
constexpr int kBounds = kSizes * (kBands - 1), kWays = static_cast<int>(Op::kCount) * kClasses;

// Rows of x, elements of the weight, and rank.
struct Shape {
  int64_t rows, weight, rank;
};

// The bands' upper bounds, and a way for each class of each op.
void set_ways(const int64_t (&bounds)[kBounds], const uint8_t (&ways)[kWays]);

// Of an op whose tensors are of `dtype`: panels are for float32.
Way way_of(Op op, at::ScalarType dtype, const Shape& shape);

}  // namespace lora_kernels
