// Built where there is nvcc and a torch with CUDA; registration.cpp of the folder above has the
// rest.
#include <torch/library.h>

#include "multi_lora_linear.h"

TORCH_LIBRARY_IMPL(lora_kernels, CUDA, library) {
  library.impl("cuda_multi_lora_linear", lora_kernels::cuda::multi_lora_linear);
  library.impl("cuda_multi_lora_linear_add", lora_kernels::cuda::multi_lora_linear_add);
  library.impl("cuda_multi_lora_linear_fused", lora_kernels::cuda::multi_lora_linear_fused);
}
