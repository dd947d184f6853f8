// Philox4x32-7 (Salmon et al., SC'11): the mask byte of a counter, eight columns a call.
// The scheme is described in lora_kernels/reference/dropout.py; all backends must agree with it.
#pragma once

#include <cstdint>

namespace lora_kernels {

// The multipliers, what a key grows by from round to round, and how many rounds there are.
constexpr uint32_t kPhiloxLow = 0xD2511F53u, kPhiloxHigh = 0xCD9E8D57u;
constexpr uint32_t kPhiloxStep0 = 0x9E3779B9u, kPhiloxStep1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 7;

inline uint32_t rotate16(uint32_t word) { return (word << 16) | (word >> 16); }

inline uint8_t keep_byte(uint64_t seed, uint64_t counter, uint32_t threshold) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t low = static_cast<uint64_t>(c0) * kPhiloxLow;
    const uint64_t high = static_cast<uint64_t>(c2) * kPhiloxHigh;
    c0 = static_cast<uint32_t>(high >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(high);
    c2 = static_cast<uint32_t>(low >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(low);
    k0 += kPhiloxStep0;
    k1 += kPhiloxStep1;
  }
  const uint32_t bits = static_cast<uint32_t>(c0 >= threshold) |
                        static_cast<uint32_t>(rotate16(c0) >= threshold) << 1 |
                        static_cast<uint32_t>(c1 >= threshold) << 2 |
                        static_cast<uint32_t>(rotate16(c1) >= threshold) << 3 |
                        static_cast<uint32_t>(c2 >= threshold) << 4 |
                        static_cast<uint32_t>(rotate16(c2) >= threshold) << 5 |
                        static_cast<uint32_t>(c3 >= threshold) << 6 |
                        static_cast<uint32_t>(rotate16(c3) >= threshold) << 7;
  return static_cast<uint8_t>(bits);
}

}  // namespace lora_kernels
