// The decode kernels: multi-adapter deltas of small batches, alone or with the base product.
#include "cta.cuh"
#include "decode_launch.h"
#include "decode_loops.h"

namespace lora_kernels {
namespace {

// Thread blocks that a multiprocessor should hold: enough copies are then under way.
constexpr int kBlocksEach = 3;

extern __shared__ __align__(128) char shared_memory[];

template <typename Element, int Rows>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    decode_cluster_kernel(const __grid_constant__ DecodeProblem p) {
#if __CUDA_ARCH__ >= 900
  ClusterCta<Element> cta(p, shared_memory);
  Decode<Rows, ClusterCta<Element>>(cta, p).run();
#endif
}

template <typename Element>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    decode_shrink_kernel(const __grid_constant__ DecodeProblem p) {
  PlainCta<Element> cta(p, shared_memory);
  Decode<kTileRows, PlainCta<Element>>(cta, p).run_shrink();
}

template <typename Element>
__global__ void __launch_bounds__(kThreads, kBlocksEach)
    decode_expand_kernel(const __grid_constant__ DecodeProblem p) {
  PlainCta<Element> cta(p, shared_memory);
  Decode<kTileRows, PlainCta<Element>>(cta, p).run_expand();
}

using Kernel = void (*)(DecodeProblem);

cudaError_t launch(Kernel kernel, const DecodeProblem& problem, int rows, int parts, int cluster,
                   cudaStream_t stream) {
  const int bytes = shared_layout(problem, rows).bytes;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kCluster, parts, problem.projections);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, problem);
}

template <typename Element>
cudaError_t launch_delta(const DecodeProblem& problem, const DecodeCard& card,
                         cudaStream_t stream) {
  const int tiles = problem.tile_count;
  if (card.clusters) {
    return launch(decode_cluster_kernel<Element, kTileRows>, problem, kTileRows, tiles, kCluster,
                  stream);
  }
  const cudaError_t error =
      launch(decode_shrink_kernel<Element>, problem, kTileRows, tiles, 1, stream);
  if (error != cudaSuccess) return error;
  return launch(decode_expand_kernel<Element>, problem, kTileRows, tiles, 1, stream);
}

}  // namespace

cudaError_t decode_card(int device, DecodeCard* card) {
  cudaFuncAttributes compiled;
  cudaError_t error = cudaFuncGetAttributes(&compiled, decode_cluster_kernel<Half, kTileRows>);
  if (error != cudaSuccess) return error;
  // Of code for an older card the cluster kernels are empty, wherever it runs.
  card->clusters = compiled.ptxVersion >= 90;
  error = cudaDeviceGetAttribute(&card->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(&card->shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                device);
}

cudaError_t launch_decode_delta(const DecodeProblem& problem, DecodeElement element,
                                const DecodeCard& card, cudaStream_t stream) {
  return element == DecodeElement::kBrain ? launch_delta<Brain16>(problem, card, stream)
                                          : launch_delta<Half>(problem, card, stream);
}

cudaError_t launch_decode_linear(const DecodeProblem& problem, DecodeElement element,
                                 cudaStream_t stream) {
  int widest = 0;
  for (int i = 0; i < problem.projections; ++i) {
    const int cols = problem.projection[i].out_cols;
    widest = cols > widest ? cols : widest;
  }
  const Kernel kernel = element == DecodeElement::kBrain
                            ? decode_cluster_kernel<Brain16, kLinearRows>
                            : decode_cluster_kernel<Half, kLinearRows>;
  return launch(kernel, problem, kLinearRows, ceil_div(widest, problem.cluster_cols), kCluster,
                stream);
}

}  // namespace lora_kernels
