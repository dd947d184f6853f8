#include "activation_pass.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "version.h"

#define LK_LOOPS "activation_loops.h"
#include "each_version.h"

namespace lora_kernels {

void accumulate(const Activation& x, Range rows, Range cols, const Products<float>& products) {
  LK_DISPATCH(accumulate(x, rows, cols, products));
}

void accumulate(const Activation& x, Range rows, Range cols, const Products<double>& products) {
  LK_DISPATCH(accumulate(x, rows, cols, products));
}

void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride, int64_t rows,
               Range cols) {
  LK_DISPATCH(transpose(in, in_stride, out, out_stride, rows, cols));
}

void transpose(const double* in, int64_t in_stride, double* out, int64_t out_stride, int64_t rows,
               Range cols) {
  LK_DISPATCH(transpose(in, in_stride, out, out_stride, rows, cols));
}

void norms(const Norms<float>& n, Range rows) { LK_DISPATCH(norms(n, rows)); }

void norms(const Norms<double>& n, Range rows) { LK_DISPATCH(norms(n, rows)); }

void expand(const Expansion<float>& expansion, Range rows) { LK_DISPATCH(expand(expansion, rows)); }

void expand(const Expansion<double>& expansion, Range rows) {
  LK_DISPATCH(expand(expansion, rows));
}

}  // namespace lora_kernels
