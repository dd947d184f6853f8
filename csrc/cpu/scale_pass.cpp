#include "scale_pass.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "version.h"

#define LK_LOOPS "scale_loops.h"
#include "each_version.h"

namespace lora_kernels {

void run(const Scaling<float>& p, Range rows, int64_t cols) { LK_DISPATCH(run(p, rows, cols)); }

void run(const Scaling<double>& p, Range rows, int64_t cols) { LK_DISPATCH(run(p, rows, cols)); }

void run(const Unscaling<float>& p, Range rows, Range cols) { LK_DISPATCH(run(p, rows, cols)); }

void run(const Unscaling<double>& p, Range rows, Range cols) { LK_DISPATCH(run(p, rows, cols)); }

void run(const Splitting& p, Range rows, int64_t cols) {
  if (p.x.storage == Storage::kDouble) LK_DISPATCH(split_f64(p, rows, cols));
  LK_DISPATCH(split_f32(p, rows, cols));
}

void run(const Keeping& p, Range rows, int64_t cols) {
  if (p.x.storage == Storage::kDouble) LK_DISPATCH(keep_f64(p, rows, cols));
  LK_DISPATCH(keep_f32(p, rows, cols));
}

}  // namespace lora_kernels
