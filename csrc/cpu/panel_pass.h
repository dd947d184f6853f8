// A sum of matrix products in one set of registers: no torch headers here.
//
// out = bias + L1 R1 + L2 R2 + ... costs one product of the depths together: a branch of rank r
// joins the base's product as r more columns of x and rows of W', and is no pass over y of its own.
#pragma once

#include <cstdint>

#include "activation_pass.h"

namespace lora_kernels {

// A factor's depth is cut into equal parts of at most kPartDepth, and parts that follow one another
// are one chain of additions up to kChainDepth: not much longer than in the vendors' GEMMs, so that
// it rounds as theirs do.
constexpr int64_t kPartDepth = 256, kChainDepth = 320;

// A tile of `out` that is summed in registers: as large as the version in use has room for.
struct PanelShape {
  int64_t rows, cols;
  int64_t at_once;  // panels of columns

  // Elements of the memory that multiply_panels() works in.
  int64_t scratch() const { return kChainDepth * cols * at_once; }
};

PanelShape panel_shape();

constexpr int64_t panels_of(int64_t size, int64_t each) { return (size + each - 1) / each; }

// One product: `left` in panels by pack_rows, `right` [depth, cols] or, transposed, [cols, depth].
struct PanelTerm {
  const float* left;
  const float* right;
  int64_t right_stride;
  bool transposed;
  int64_t depth;
};

struct PanelProduct {
  const PanelTerm* terms;
  int64_t count;
  int64_t rows, cols;
  float* out;
  int64_t out_stride;
  const float* bias;  // or nullptr
  bool add;           // to what `out` holds; there is no bias then
};

// packed[part of the depth][panel][k][row of the panel] of a matrix [rows, depth], with zeros for
// rows that are not there.
void pack_rows(const float* matrix, int64_t stride, int64_t rows, int64_t depth, Range panels,
               float* packed);

// The tiles of these panels of rows and of columns; `scratch` has panel_shape().scratch()
// elements.
void multiply_panels(const PanelProduct& product, Range row_panels, Range col_panels,
                     float* scratch);

}  // namespace lora_kernels
