// What a card can do, asked once a card.
#pragma once

#include "decode_launch.h"

namespace lora_kernels::cuda {

DecodeCard card_of(int device);

}  // namespace lora_kernels::cuda
