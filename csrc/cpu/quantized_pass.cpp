#include "quantized_pass.h"

#include <algorithm>
#include <type_traits>

// Vectors are passed by value below, by functions that are inlined wherever they are called.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace lora_kernels {
namespace {

constexpr int64_t kTileRows = 4;
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

typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1)));
typedef int8_t SignedBytes __attribute__((vector_size(kLanes), aligned(1)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef float Half __attribute__((vector_size(32), aligned(4)));
typedef int32_t HalfInts __attribute__((vector_size(32), aligned(4)));
using Floats = VectorOf<float>;

LK_INLINE Floats as_floats(const Ints& bits) {
  Floats out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

LK_INLINE Ints bytes_at(const uint8_t* codes) {
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(codes), Ints);
}

// kNf4[index], eight lanes at a time: a table of sixteen is two registers of AVX2.
LK_INLINE Floats nf4_values(const Ints& index) {
  Floats out;
#if defined(__clang__)
  for (int i = 0; i < kLanes; ++i) out[i] = kNf4[index[i]];
#else
  const Half low = *reinterpret_cast<const Half*>(kNf4),
             high = *reinterpret_cast<const Half*>(kNf4 + 8);
  HalfInts halves[2];
  std::memcpy(halves, &index, sizeof(halves));
  const Half values[2] = {__builtin_shuffle(low, high, halves[0]),
                          __builtin_shuffle(low, high, halves[1])};
  std::memcpy(&out, values, sizeof(out));
#endif
  return out;
}

// first[0], second[0], first[1], second[1], ...
LK_INLINE void interleave(const Floats& first, const Floats& second, float* out) {
#if defined(__clang__)
  for (int lane = 0; lane < kLanes; ++lane) {
    out[2 * lane] = first[lane];
    out[2 * lane + 1] = second[lane];
  }
#else
  constexpr Ints kLow = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  vector(out) = __builtin_shuffle(first, second, kLow);
  vector(out + kLanes) = __builtin_shuffle(first, second, kLow + 8);
#endif
}

// A code of float8_e4m3fn a lane. The exponent is moved to float's bias, by arithmetic for
// the numbers that have none, so that a mode that flushes small floats changes nothing.
LK_INLINE Floats fp8_values(const Ints& code) {
  const Ints magnitude = code & 0x7F;
  const Floats normal = as_floats((magnitude << 20) + (120 << 23));
  const Floats tiny = (normal - 0x1p-7f) * 2.0f;
  const Floats finite = magnitude < 8 ? tiny : normal;
  Ints bits;
  std::memcpy(&bits, &finite, sizeof(bits));
  bits = magnitude == 0x7F ? Ints{} + 0x7FC00000 : bits;
  return as_floats(bits | ((code & 0x80) << 24));
}

LK_INLINE float scale_at(const QuantizedMatrix& w, int64_t block) {
  if (w.nested == nullptr) return static_cast<const float*>(w.scales)[block];
  const float value = w.nested[1 + static_cast<const uint8_t*>(w.scales)[block]];
  float product = value * w.nested[1 + 256 + block / kNestedBlock];
#if !defined(__clang__)
  product = __builtin_assoc_barrier(product);  // two roundings, as everywhere else
#endif
  return product + w.nested[0];
}

// The value of code i, unscaled.
template <Format F>
LK_INLINE float value_at(const uint8_t* codes, int64_t i) {
  if constexpr (F == Format::kNf4) {
    return kNf4[i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15];
  } else if constexpr (F == Format::kInt8) {
    return static_cast<float>(static_cast<int8_t>(codes[i]));
  } else {
    return fp8_values(Ints{} + codes[i])[0];
  }
}

// Elements that one vector step decodes, and whose first is a multiple of it.
template <Format F>
constexpr int64_t kStep = F == Format::kNf4 ? 2 * kLanes : kLanes;

template <Format F>
LK_INLINE void decode_step(const uint8_t* codes, int64_t i, float scale, float* out) {
  if constexpr (F == Format::kNf4) {
    const Ints pair = bytes_at(codes + i / 2);
    interleave(nf4_values(pair >> 4) * scale, nf4_values(pair & 15) * scale, out);
  } else if constexpr (F == Format::kInt8) {
    const auto bytes = *reinterpret_cast<const SignedBytes*>(codes + i);
    vector(out) = __builtin_convertvector(bytes, Floats) * scale;
  } else {
    vector(out) = fp8_values(bytes_at(codes + i)) * scale;
  }
}

// Elements [begin, end), all of one block.
template <Format F>
LK_INLINE void decode_block(const uint8_t* codes, int64_t begin, int64_t end, float scale,
                            float* out) {
  int64_t i = begin;
  if constexpr (F == Format::kNf4) {
    const int64_t start = std::min(end, (begin + kStep<F> - 1) / kStep<F> * kStep<F>);
    for (; i < start; ++i) out[i - begin] = value_at<F>(codes, i) * scale;
  }
  for (; i + kStep<F> <= end; i += kStep<F>) decode_step<F>(codes, i, scale, out + i - begin);
  for (; i < end; ++i) out[i - begin] = value_at<F>(codes, i) * scale;
}

template <Format F>
LK_INLINE void decode_block(const uint8_t* codes, int64_t begin, int64_t end, float scale,
                            double* out) {
  for (int64_t i = begin; i < end; ++i) {
    out[i - begin] = static_cast<double>(value_at<F>(codes, i)) * scale;
  }
}

template <Format F, typename Math>
LK_INLINE void decode_range(const QuantizedMatrix& w, int64_t begin, int64_t end, Math* out) {
  for (int64_t i = begin, stop; i < end; i = stop) {
    const int64_t block = i / w.block;
    stop = std::min(end, (block + 1) * w.block);
    const float scale = scale_at(w, block) * (F == Format::kInt8 ? kInt8Unit : 1.0f);
    decode_block<F>(w.codes, i, stop, scale, out + i - begin);
  }
}

// Calls run with the format as a constant.
template <typename Run>
LK_INLINE void with_format(Format format, Run run) {
  if (format == Format::kNf4) return run(std::integral_constant<Format, Format::kNf4>{});
  if (format == Format::kInt8) return run(std::integral_constant<Format, Format::kInt8>{});
  return run(std::integral_constant<Format, Format::kFp8>{});
}

LK_SIMD void decode_f32(const QuantizedMatrix& w, int64_t begin, int64_t end, void* out,
                        Storage storage) {
  with_format(w.format, [&](auto format) LK_LAMBDA {
    float chunk[kDecoded];
    for (int64_t i = begin; i < end; i += kDecoded) {
      const int64_t count = std::min(kDecoded, end - i);
      decode_range<decltype(format)::value>(w, i, i + count, chunk);
      if (storage == Storage::kBFloat16) {
        for (int64_t j = 0; j < count; ++j)
          narrow(static_cast<Brain*>(out) + i - begin + j, chunk[j]);
      } else if (storage == Storage::kHalf) {
        for (int64_t j = 0; j < count; ++j) {
          narrow(static_cast<_Float16*>(out) + i - begin + j, chunk[j]);
        }
      } else {
        std::memcpy(static_cast<float*>(out) + i - begin, chunk, count * sizeof(float));
      }
    }
  });
}

void decode_f64(const QuantizedMatrix& w, int64_t begin, int64_t end, double* out) {
  with_format(w.format, [&](auto format) LK_LAMBDA {
    decode_range<decltype(format)::value>(w, begin, end, out);
  });
}

// lanes[i][j] += x_i * w_j, lane by lane.
template <int R, int P>
LK_INLINE void dot_span(const float* x, int64_t x_stride, const float (*w)[kDecoded], int64_t width,
                        Floats (*lanes)[kTileRows]) {
  Floats sums[R][P];
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < P; ++j) sums[i][j] = lanes[i][j];
  }
  for (int64_t k = 0; k < width; k += kLanes) {
    Floats columns[P];
    for (int j = 0; j < P; ++j) columns[j] = vector(w[j] + k);
    for (int i = 0; i < R; ++i) {
      const Floats row = vector(x + i * x_stride + k);
      for (int j = 0; j < P; ++j) sums[i][j] += row * columns[j];
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < P; ++j) lanes[i][j] = sums[i][j];
  }
}

// The lanes in a tree.
LK_INLINE float total(const Floats& sums) {
  Floats lanes = sums;
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

template <Format F, int P>
LK_INLINE void dots_tile(const QuantizedMatrix& w, const float* x, int64_t x_stride, int64_t count,
                         int64_t n, float* out, int64_t out_stride) {
  Floats lanes[kMostRows][kTileRows] = {};
  alignas(64) float decoded[P][kDecoded];
  for (int64_t k = 0; k < w.cols; k += kDecoded) {
    const int64_t width = std::min(kDecoded, w.cols - k);
    const int64_t padded = (width + kLanes - 1) / kLanes * kLanes;
    for (int j = 0; j < P; ++j) {
      const int64_t first = (n + j) * w.cols + k;
      decode_range<F>(w, first, first + width, decoded[j]);
      std::fill(decoded[j] + width, decoded[j] + padded, 0.0f);
    }
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
      dot_span<4, P>(x + i * x_stride + k, x_stride, decoded, padded, lanes + i);
    }
    for (; i < count; ++i) {
      dot_span<1, P>(x + i * x_stride + k, x_stride, decoded, padded, lanes + i);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int j = 0; j < P; ++j) out[i * out_stride + n + j] = total(lanes[i][j]);
  }
}

LK_SIMD void dots_f32(const QuantizedMatrix& w, const float* x, int64_t x_stride, int64_t count,
                      int64_t begin, int64_t end, float* out, int64_t out_stride) {
  with_format(w.format, [&](auto format) LK_LAMBDA {
    constexpr Format F = decltype(format)::value;
    int64_t n = begin;
    for (; n + kTileRows <= end; n += kTileRows) {
      dots_tile<F, kTileRows>(w, x, x_stride, count, n, out, out_stride);
    }
    for (; n < end; ++n) dots_tile<F, 1>(w, x, x_stride, count, n, out, out_stride);
  });
}

}  // namespace

void decode(const QuantizedMatrix& weight, int64_t begin, int64_t end, void* out, Storage storage) {
  if (storage == Storage::kDouble) {
    decode_f64(weight, begin, end, static_cast<double*>(out));
  } else {
    decode_f32(weight, begin, end, out, storage);
  }
}

void dots(const QuantizedMatrix& weight, const float* x, int64_t x_stride, int64_t count,
          int64_t begin, int64_t end, float* out, int64_t out_stride) {
  dots_f32(weight, x, x_stride, count, begin, end, out, out_stride);
}

}  // namespace lora_kernels
