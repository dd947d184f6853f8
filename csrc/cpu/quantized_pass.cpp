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

typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef float Half __attribute__((vector_size(32), aligned(4)));
typedef int32_t HalfInts __attribute__((vector_size(32), aligned(4)));
using Floats = VectorOf<float>;

LK_INLINE Floats as_floats(const Ints& bits) {
  Floats out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

// out = kNf4[index] * scale, eight lanes at a time: a table of sixteen is two registers of AVX2.
LK_INLINE void store_nf4(const Ints& index, const Floats& scale, float* out) {
#if defined(__clang__)
  for (int i = 0; i < kLanes; ++i) out[i] = kNf4[index[i]] * scale[i];
#else
  const Half low = *reinterpret_cast<const Half*>(kNf4),
             high = *reinterpret_cast<const Half*>(kNf4 + 8);
  HalfInts indices[2];
  Half scales[2];
  std::memcpy(indices, &index, sizeof(indices));
  std::memcpy(scales, &scale, sizeof(scales));
  for (int i = 0; i < 2; ++i) {
    // Stored as it is: a whole vector put together from halves would wait for both in memory.
    *reinterpret_cast<Half*>(out + 8 * i) = __builtin_shuffle(low, high, indices[i]) * scales[i];
  }
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

// Codes of a 32-bit word. A vector of words gives as many vectors of codes by a permutation and
// shifts; bytes that are spread over lanes would cost more, since gcc does that one by one.
template <Format F>
constexpr int64_t kPerWord = F == Format::kNf4 ? 8 : 4;
template <Format F>
constexpr int64_t kChunk = kPerWord<F> * kLanes;

// For each lane its word, among those of one vector of codes.
template <Format F>
LK_INLINE Ints words_of_lanes() {
  if constexpr (F == Format::kNf4) return Ints{0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  return Ints{0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
}

// How far in its word a lane's code is; of the two in a byte of NF4 the high half is the first.
template <Format F>
LK_INLINE Ints shifts_of_lanes() {
  if constexpr (F == Format::kNf4) {
    return Ints{4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24};
  }
  return Ints{0, 8, 16, 24, 0, 8, 16, 24, 0, 8, 16, 24, 0, 8, 16, 24};
}

LK_INLINE Ints permuted(const Ints& words, const Ints& places) {
#if defined(__clang__)
  Ints out;
  for (int i = 0; i < kLanes; ++i) out[i] = words[places[i]];
  return out;
#else
  return __builtin_shuffle(words, places);
#endif
}

// The v-th vector of a chunk, times its scale.
template <Format F>
LK_INLINE void store_values(const Ints& words, int v, const Floats& scale, float* out) {
  const Ints word =
      permuted(words, words_of_lanes<F>() + v * static_cast<int>(kLanes / kPerWord<F>));
  if constexpr (F == Format::kNf4) {
    store_nf4((word >> shifts_of_lanes<F>()) & 15, scale, out);
  } else if constexpr (F == Format::kInt8) {
    const Ints code = (word << (24 - shifts_of_lanes<F>())) >> 24;
    vector(out) = __builtin_convertvector(code, Floats) * scale;
  } else {
    vector(out) = fp8_values((word >> shifts_of_lanes<F>()) & 0xFF) * scale;
  }
}

// Whether a chunk is of one block or of two, a half each.
template <Format F>
LK_INLINE bool has_chunks(const QuantizedMatrix& w) {
  return w.block % (kChunk<F> / 2) == 0;
}

// The chunk of elements from i on.
template <Format F>
LK_INLINE void decode_chunk(const QuantizedMatrix& w, int64_t i, float* out) {
  constexpr float kUnit = F == Format::kInt8 ? kInt8Unit : 1.0f;
  const int64_t block = i / w.block, next = (i + kChunk<F> / 2) / w.block;
  const Floats first = Floats{} + scale_at(w, block) * kUnit;
  const Floats second = next == block ? first : Floats{} + scale_at(w, next) * kUnit;
  constexpr int64_t kPerByte = F == Format::kNf4 ? 2 : 1;
  // The same place of the rows that are decoded together next.
  __builtin_prefetch(w.codes + (i + kTileRows * w.cols) / kPerByte);
  Ints words;
  std::memcpy(&words, w.codes + i / kPerByte, sizeof(words));
  for (int v = 0; v < kPerWord<F>; ++v) {
    store_values<F>(words, v, 2 * v < kPerWord<F> ? first : second, out + v * kLanes);
  }
}

template <Format F, typename Math>
LK_INLINE void decode_one_by_one(const QuantizedMatrix& w, int64_t begin, int64_t end, Math* out) {
  constexpr float kUnit = F == Format::kInt8 ? kInt8Unit : 1.0f;
  for (int64_t i = begin, stop; i < end; i = stop) {
    const int64_t block = i / w.block;
    stop = std::min(end, (block + 1) * w.block);
    const float scale = scale_at(w, block) * kUnit;
    for (int64_t j = i; j < stop; ++j) {
      out[j - begin] = static_cast<Math>(value_at<F>(w.codes, j)) * scale;
    }
  }
}

// Elements [begin, end).
template <Format F>
LK_INLINE void decode_range(const QuantizedMatrix& w, int64_t begin, int64_t end, float* out) {
  const int64_t start = std::min(end, (begin + kChunk<F> - 1) / kChunk<F> * kChunk<F>);
  const int64_t chunks = has_chunks<F>(w) ? (end - start) / kChunk<F> : 0;
  const int64_t stop = start + chunks * kChunk<F>;
  decode_one_by_one<F>(w, begin, start, out);
  for (int64_t i = start; i < stop; i += kChunk<F>) decode_chunk<F>(w, i, out + i - begin);
  decode_one_by_one<F>(w, stop, end, out + stop - begin);
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
    decode_one_by_one<decltype(format)::value>(w, begin, end, out);
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
