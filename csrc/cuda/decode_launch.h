// Starts the decode kernels on a stream; no torch headers here.
#pragma once

#include <cuda_runtime_api.h>

#include "decode_index.h"

namespace lora_kernels {

enum class DecodeElement { kHalf, kBrain };

// What the kernels that were compiled can do on a card.
struct DecodeCard {
  // One launch with thread-block clusters; else two.
  bool clusters;
  int multiprocessors, shared_limit;
};

cudaError_t decode_card(int device, DecodeCard* card);

// y = the delta of `problem.rows` rows, each with its own adapter or none. Without clusters
// `problem.parts` holds part_elements(max_rank) for each projection and tile.
cudaError_t launch_decode_delta(const DecodeProblem& problem, DecodeElement element,
                                const DecodeCard& card, cudaStream_t stream);

// y = x W' + the delta + bias, for up to kLinearRows rows; needs clusters.
cudaError_t launch_decode_linear(const DecodeProblem& problem, DecodeElement element,
                                 cudaStream_t stream);

}  // namespace lora_kernels
