// The passes of Flora's step over a gradient and its weight, rows by rows: no torch headers here.
#pragma once

#include <cstdint>

namespace lora_kernels {

// Rows of a matrix that lie `cols` numbers apart.
struct FloraRows {
  const float* gradient;
  float* weight;
  int64_t rows, cols;
};

// row_sums[i] = sum over j of g^2, col_sums[j] += sum over i of g^2; returns the sum of w^2.
double flora_sums(const FloraRows& part, float* row_sums, float* col_sums);

// The sum of (r_i g_ij c_j)^2.
double flora_size(const FloraRows& part, const float* by_row, const float* by_col);

// w = keep w - r_i g_ij c_j.
void flora_move(const FloraRows& part, const float* by_row, const float* by_col, float keep);

}  // namespace lora_kernels
