#include "dropout_pass.h"

#include <cstring>
#include <type_traits>
#include <utility>

#include "../common/philox.h"
#include "../common/storage.h"
#include "version.h"

#define LK_LOOPS "dropout_loops.h"
#include "each_version.h"

namespace lora_kernels {

void fill_bytes(uint8_t* out, uint64_t seed, int64_t begin, int64_t end, uint32_t limit) {
  LK_DISPATCH(fill_bytes(out, seed, begin, end, limit));
}

void drop(float* out, const float* x, const uint8_t* keep, int64_t cols) {
  LK_DISPATCH(drop(out, x, keep, cols));
}

void drop(double* out, const double* x, const uint8_t* keep, int64_t cols) {
  LK_DISPATCH(drop(out, x, keep, cols));
}

}  // namespace lora_kernels
