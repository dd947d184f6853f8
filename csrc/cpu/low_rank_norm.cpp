// Row norms of W + s B A: one pass over W, the update in a strip on the stack (branch.h).
#include "low_rank_norm.h"

#include "branch.h"

namespace lora_kernels {

at::Tensor low_rank_norm(const at::Tensor& weight, const at::Tensor& lora_a,
                         const at::Tensor& lora_b, double scaling) {
  return row_norms(weight, lora_a, lora_b, scaling);
}

}  // namespace lora_kernels
