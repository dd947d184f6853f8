#include "gate_pass.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "version.h"

#define LK_LOOPS "gate_loops.h"
#include "each_version.h"

namespace lora_kernels {

void open_tile(const Matrix& x, Range rows, int64_t cols, int64_t places, float* tile,
               float* scratch) {
  LK_DISPATCH(open_tile(x, rows, cols, places, tile, scratch));
}

void open_tile(const Matrix& x, Range rows, int64_t cols, int64_t places, double* tile,
               double* scratch) {
  LK_DISPATCH(open_tile(x, rows, cols, places, tile, scratch));
}

void close_tile(const float* tile, int64_t places, const Matrix& out, Range rows, int64_t cols,
                bool add, float* scratch) {
  LK_DISPATCH(close_tile(tile, places, out, rows, cols, add, scratch));
}

void close_tile(const double* tile, int64_t places, const Matrix& out, Range rows, int64_t cols,
                bool add, double* scratch) {
  LK_DISPATCH(close_tile(tile, places, out, rows, cols, add, scratch));
}

void apply_gate(const GatePlaces& places, const float* gate, const float* in, float* out) {
  LK_DISPATCH(apply_gate(places, gate, in, out));
}

void apply_gate(const GatePlaces& places, const double* gate, const double* in, double* out) {
  LK_DISPATCH(apply_gate(places, gate, in, out));
}

void sum_gate(const GatePlaces& places, const float* g, const float* h, float* grad) {
  LK_DISPATCH(sum_gate(places, g, h, grad));
}

void sum_gate(const GatePlaces& places, const double* g, const double* h, double* grad) {
  LK_DISPATCH(sum_gate(places, g, h, grad));
}

}  // namespace lora_kernels
