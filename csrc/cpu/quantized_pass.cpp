#include "quantized_pass.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>

#include "version.h"

// Vectors are passed by value below, by functions that are inlined wherever they are called.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace lora_kernels {
namespace {

constexpr float kInt8Unit = 1.0f / 127.0f;
constexpr int64_t kNestedBlock = 256;

// The values of lora_kernels/quant/codes.py.
alignas(64) constexpr float kNf4[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// Byte i of each of them.
struct Nf4Bytes {
  alignas(16) uint8_t of[4][16];
};

constexpr Nf4Bytes bytes_of_nf4() {
  Nf4Bytes out{};
  for (int code = 0; code < 16; ++code) {
    const auto bits = std::bit_cast<uint32_t>(kNf4[code]);
    for (int i = 0; i < 4; ++i) out.of[i][code] = static_cast<uint8_t>(bits >> (8 * i));
  }
  return out;
}

constexpr Nf4Bytes kNf4Bytes = bytes_of_nf4();

// Codes of a 32-bit word.
constexpr int codes_of_word(Format format) { return format == Format::kNf4 ? 8 : 4; }

// How far in its word a code is; of the two in a byte of NF4 the high half is the first.
constexpr int shift_of(Format format, int code) {
  return format == Format::kNf4 ? 4 * (code % 8 ^ 1) : 8 * (code % 4);
}

}  // namespace
}  // namespace lora_kernels

#define LK_LOOPS "quantized_loops.h"
#include "each_version.h"

namespace lora_kernels {

void decode(const QuantizedMatrix& weight, int64_t begin, int64_t end, void* out, Storage storage) {
  LK_DISPATCH(decode(weight, begin, end, out, storage));
}

void arrange(const QuantizedMatrix& weight, const float* row, float* out) {
  LK_DISPATCH(arrange(weight, row, out));
}

void dots(const QuantizedMatrix& weight, const float* x, int64_t x_stride, int64_t count,
          int64_t begin, int64_t end, float* out, int64_t out_stride) {
  LK_DISPATCH(dots(weight, x, x_stride, count, begin, end, out, out_stride));
}

}  // namespace lora_kernels
