// The CUDA backend's ops on CPU tensors: their C++ as it is, with launches that run the simulation.
#include <torch/library.h>

#include "../../../csrc/cuda/decode_card.h"
#include "../../../csrc/cuda/multi_lora_linear.h"

extern "C" void simulate(const lora_kernels::DecodeProblem* problem, int brain);

namespace {

bool clusters = true;
int launches = 0;

cudaError_t run(const lora_kernels::DecodeProblem& problem, lora_kernels::DecodeElement element) {
  ++launches;
  simulate(&problem, element == lora_kernels::DecodeElement::kBrain ? 1 : 0);
  return 0;
}

}  // namespace

// What the next calls find: a card with clusters, or one without. Counts the launches from here on.
extern "C" void use_card(int with_clusters) {
  clusters = with_clusters != 0;
  launches = 0;
}
extern "C" int launches_since() { return launches; }

namespace lora_kernels {

namespace cuda {

DecodeCard card_of(int) { return {clusters, 16, 227 * 1024}; }

}  // namespace cuda

cudaError_t launch_decode_delta(const DecodeProblem& problem, DecodeElement element,
                                const DecodeCard& card, cudaStream_t) {
  launches += card.clusters ? 0 : 1;
  return run(problem, element);
}

cudaError_t launch_decode_linear(const DecodeProblem& problem, DecodeElement element,
                                 cudaStream_t) {
  return run(problem, element);
}

}  // namespace lora_kernels

TORCH_LIBRARY_IMPL(lora_kernels, CPU, library) {
  library.impl("cuda_multi_lora_linear", lora_kernels::cuda::multi_lora_linear);
  library.impl("cuda_multi_lora_linear_add", lora_kernels::cuda::multi_lora_linear_add);
  library.impl("cuda_multi_lora_linear_fused", lora_kernels::cuda::multi_lora_linear_fused);
}
