#include "decode_card.h"

#include <c10/cuda/CUDAException.h>

#include <map>
#include <mutex>

namespace lora_kernels::cuda {

DecodeCard card_of(int device) {
  static std::mutex mutex;
  static std::map<int, DecodeCard> cards;
  const std::lock_guard lock(mutex);
  const auto [place, is_new] = cards.try_emplace(device);
  if (is_new) C10_CUDA_CHECK(decode_card(device, &place->second));
  return place->second;
}

}  // namespace lora_kernels::cuda
