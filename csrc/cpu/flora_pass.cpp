#include "flora_pass.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../common/storage.h"
#include "activation_pass.h"
#include "version.h"

#define LK_LOOPS "flora_loops.h"
#include "each_version.h"

namespace lora_kernels {

double flora_sums(const FloraRows& part, float* row_sums, float* col_sums) {
  LK_DISPATCH(flora_sums(part, row_sums, col_sums));
}

double flora_size(const FloraRows& part, const float* by_row, const float* by_col) {
  LK_DISPATCH(flora_size(part, by_row, by_col));
}

void flora_move(const FloraRows& part, const float* by_row, const float* by_col, float keep) {
  LK_DISPATCH(flora_move(part, by_row, by_col, keep));
}

}  // namespace lora_kernels
