// The loops of quantized_pass.h, for each version.

namespace lora_kernels {
namespace LK_VERSION {
namespace {

using Floats = VectorOf<float>;
using Ints = VectorOf<LaneBits<float>>;
typedef int32_t PlainInts __attribute__((vector_size(LK_REGISTER_BYTES), aligned(4)));
constexpr int kOne = kWidth<float>;

// Rows of W that are decoded together, and rows of x that they are multiplied with at a time.
constexpr int64_t kRowsAtOnce = 4;
constexpr int kTall = kManyRegisters ? 4 : 2;

LK_INLINE Floats as_floats(const Ints& bits) {
  Floats out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

#if defined(__clang__)
LK_INLINE Ints permuted(const Ints& from, const Ints& places) {
  Ints out;
  for (int i = 0; i < kOne; ++i) out[i] = from[places[i]];
  return out;
}
#else
LK_INLINE Ints permuted(const Ints& from, const Ints& places) {
  return __builtin_shuffle(from, places);
}
#endif

// kNf4[index] a lane: a table of sixteen is one register of AVX-512, and too many for short ones.
LK_INLINE Floats nf4_values(const Ints& index) {
#if !defined(__clang__)
  if constexpr (kOne == 16) return __builtin_shuffle(vector(kNf4), index);
#endif
  Floats out;
  for (int i = 0; i < kOne; ++i) out[i] = kNf4[index[i]];
  return out;
}

// The same of the four bits from `shifts` on of each word.
LK_INLINE Floats nf4_values_at(const Ints& word, const Ints& shifts) {
#if LK_REGISTER_BYTES == 32
  // The permutation reads three bits of an index, and the blend the sign, which the fourth becomes:
  // nothing has to be masked or compared.
  const auto index = reinterpret_cast<__m256i>(word >> shifts);
  const auto low = _mm256_permutevar8x32_ps(_mm256_load_ps(kNf4), index);
  const auto high = _mm256_permutevar8x32_ps(_mm256_load_ps(kNf4 + kOne), index);
  return with_bits<float>(
      _mm256_blendv_ps(low, high, reinterpret_cast<__m256>(word << (28 - shifts))));
#else
  return nf4_values((word >> shifts) & 15);
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

// A chunk is a vector of words. It gives as many vectors of codes as a word has codes.
template <Format F>
constexpr int64_t kChunk = codes_of_word(F) * kOne;

#if LK_REGISTER_BYTES >= 32
// A byte a lane.
LK_INLINE Ints widened(const uint8_t* from, bool is_signed) {
#if LK_REGISTER_BYTES == 64
  const auto bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Ints>(is_signed ? _mm512_maskz_cvtepi8_epi32(0xFFFF, bytes)
                                          : _mm512_maskz_cvtepu8_epi32(0xFFFF, bytes));
#else
  const auto bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Ints>(is_signed ? _mm256_cvtepi8_epi32(bytes)
                                          : _mm256_cvtepu8_epi32(bytes));
#endif
}
#endif

// The word of each lane of the V-th vector of a chunk, and how far in it the lane's code is: by a
// permutation and shifts, since gcc would spread bytes over lanes one by one.
template <Format F, int V, int... Lane>
LK_INLINE Ints words_of_lanes(const Ints& words, std::integer_sequence<int, Lane...>) {
  return permuted(words, Ints{(V * kOne + Lane) / codes_of_word(F)...});
}
template <Format F, int V, int... Lane>
LK_INLINE Ints shifts_of_lanes(std::integer_sequence<int, Lane...>) {
  return Ints{shift_of(F, V * kOne + Lane)...};
}

// The V-th vector of the chunk that starts at `from`, unscaled.
template <Format F, int V>
LK_INLINE Floats values_of(const uint8_t* from) {
#if LK_REGISTER_BYTES >= 32
  if constexpr (F == Format::kInt8) {
    return __builtin_convertvector(widened(from + V * kOne, true), Floats);
  } else if constexpr (F == Format::kFp8) {
    return fp8_values(widened(from + V * kOne, false));
  }
#endif
  constexpr auto lanes = std::make_integer_sequence<int, kOne>();
  Ints words;
  std::memcpy(&words, from, sizeof(words));
  const Ints word = words_of_lanes<F, V>(words, lanes), shifts = shifts_of_lanes<F, V>(lanes);
  if constexpr (F == Format::kNf4) return nf4_values_at(word, shifts);
  if constexpr (F == Format::kFp8) return fp8_values((word >> shifts) & 0xFF);
  return __builtin_convertvector((word << (24 - shifts)) >> 24, Floats);
}

// The two scales of a chunk, of a half each.
struct Scales {
  Floats first, second;
};

// All vectors of a chunk, scaled; a half may be of another block than the other.
template <Format F, int... V>
LK_INLINE void store_chunk(const uint8_t* from, const Scales& scales, float* out,
                           std::integer_sequence<int, V...>) {
  ((vector(out + V * kOne) =
        values_of<F, V>(from) * (2 * V < codes_of_word(F) ? scales.first : scales.second)),
   ...);
}

#if LK_REGISTER_BYTES >= 32
// The vectors of a chunk of NF4 as they come out of its bytes: lane l of vector v is code
// nf4_source(v, l), a lane of the lower half of one of the lower half. That takes no permutation of
// words and no shift that differs by lane, and x is brought into the same order once (arrange()).
#if LK_REGISTER_BYTES == 64
constexpr int nf4_source(int vector, int lane) { return 8 * lane + (vector ^ 1); }

LK_INLINE void nf4_chunk(const uint8_t* from, Floats (&values)[8]) {
  const __m512i words = _mm512_loadu_si512(from);
  const __m512 table = _mm512_load_ps(kNf4);
  for (int v = 0; v < 8; ++v) {
    const auto index = reinterpret_cast<__m512i>(reinterpret_cast<Ints>(words) >> (4 * v));
    values[v] = _mm512_maskz_permutexvar_ps(0xFFFF, index, table);  // reads four bits
  }
}
#else
constexpr int nf4_source(int vector, int lane) {
  return 2 * (4 * (vector % 4) + lane % 4 + 16 * (lane / 4)) + vector / 4;
}

// The values of 32 codes, a byte each: each of a value's four bytes is looked up in a table of
// sixteen, and they are put together. A value at a time would be looked up in two registers.
LK_INLINE void nf4_values_of_bytes(const __m256i& index, Floats* values) {
  __m256i bytes[4];
  for (int i = 0; i < 4; ++i) {
    const auto* table = reinterpret_cast<const __m128i*>(kNf4Bytes.of[i]);
    bytes[i] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(table)), index);
  }
  const __m256i low = _mm256_unpacklo_epi8(bytes[0], bytes[1]),
                more_low = _mm256_unpackhi_epi8(bytes[0], bytes[1]),
                high = _mm256_unpacklo_epi8(bytes[2], bytes[3]),
                more_high = _mm256_unpackhi_epi8(bytes[2], bytes[3]);
  values[0] = reinterpret_cast<__m256>(_mm256_unpacklo_epi16(low, high));
  values[1] = reinterpret_cast<__m256>(_mm256_unpackhi_epi16(low, high));
  values[2] = reinterpret_cast<__m256>(_mm256_unpacklo_epi16(more_low, more_high));
  values[3] = reinterpret_cast<__m256>(_mm256_unpackhi_epi16(more_low, more_high));
}

LK_INLINE void nf4_chunk(const uint8_t* from, Floats (&values)[8]) {
  const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m256i four_bits = _mm256_set1_epi8(15);
  nf4_values_of_bytes(_mm256_and_si256(_mm256_srli_epi16(codes, 4), four_bits), values);
  nf4_values_of_bytes(_mm256_and_si256(codes, four_bits), values + 4);
}
#endif
#endif

// Whether a chunk is of one block or of two, a half each.
template <Format F>
LK_INLINE bool has_chunks(const QuantizedMatrix& w) {
  return w.block % (kChunk<F> / 2) == 0;
}

// A block and how many of its elements are to come: walked along, since a division for each chunk
// would take longer than the chunk.
struct Place {
  int64_t block, left;
};

LK_INLINE Place place_of(const QuantizedMatrix& w, int64_t i) {
  // Numbers of 32 bits divide in a third of the time on many a processor.
  const bool few = (i | w.block) >> 32 == 0;
  const int64_t block =
      few ? static_cast<uint32_t>(i) / static_cast<uint32_t>(w.block) : i / w.block;
  return {block, (block + 1) * w.block - i};
}

LK_INLINE void advance(const QuantizedMatrix& w, Place& place, int64_t count) {
  place.left -= count;
  if (place.left > 0) return;
  ++place.block;
  place.left = w.block;
}

// The scales of the chunk at `place`, which moves on to the next.
template <Format F>
LK_INLINE Scales scales_of(const QuantizedMatrix& w, Place& place) {
  constexpr float kUnit = F == Format::kInt8 ? kInt8Unit : 1.0f;
  const int64_t block = place.block;
  const Floats first = Floats{} + scale_at(w, block) * kUnit;
  advance(w, place, kChunk<F> / 2);
  const Floats second = place.block == block ? first : Floats{} + scale_at(w, place.block) * kUnit;
  advance(w, place, kChunk<F> / 2);
  return {first, second};
}

template <Format F>
LK_INLINE const uint8_t* codes_at(const QuantizedMatrix& w, int64_t i) {
  return w.codes + (F == Format::kNf4 ? i >> 1 : i);
}

// The chunk of elements from i on, which is at `place`.
template <Format F>
LK_INLINE void decode_chunk(const QuantizedMatrix& w, int64_t i, Place& place, float* out) {
  // The same place of the rows that are decoded together next.
  __builtin_prefetch(codes_at<F>(w, i + kRowsAtOnce * w.cols));
  constexpr auto vectors = std::make_integer_sequence<int, codes_of_word(F)>();
  store_chunk<F>(codes_at<F>(w, i), scales_of<F>(w, place), out, vectors);
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
  Place place = place_of(w, start);
  for (int64_t i = start; i < stop; i += kChunk<F>) decode_chunk<F>(w, i, place, out + i - begin);
  decode_one_by_one<F>(w, stop, end, out + stop - begin);
}

// Calls run with the format as a constant.
template <typename Run>
LK_INLINE void with_format(Format format, Run run) {
  if (format == Format::kNf4) return run(std::integral_constant<Format, Format::kNf4>{});
  if (format == Format::kInt8) return run(std::integral_constant<Format, Format::kInt8>{});
  return run(std::integral_constant<Format, Format::kFp8>{});
}

// Whether `dots` multiplies x in the order of nf4_source().
template <Format F>
LK_INLINE bool arranged(const QuantizedMatrix& w) {
  if constexpr (kOne < 8 || F != Format::kNf4) return false;
  return has_chunks<F>(w) && w.cols % kChunk<F> == 0;
}

#if LK_REGISTER_BYTES >= 32
// A scale for each lane of an arranged chunk.
LK_INLINE Floats by_halves(const Scales& scales) {
#if LK_REGISTER_BYTES == 64
  return with_bits<float>(_mm512_mask_blend_ps(0xFF00, reinterpret_cast<__m512>(scales.first),
                                               reinterpret_cast<__m512>(scales.second)));
#else
  return with_bits<float>(_mm256_blend_ps(reinterpret_cast<__m256>(scales.first),
                                          reinterpret_cast<__m256>(scales.second), 0xF0));
#endif
}

// Columns [k, k + width) of row n, as they come out of their bytes.
LK_INLINE void decode_arranged(const QuantizedMatrix& w, int64_t n, int64_t k, int64_t width,
                               float* out) {
  Place place = place_of(w, n * w.cols + k);
  for (int64_t i = 0; i < width; i += kChunk<Format::kNf4>) {
    const uint8_t* from = codes_at<Format::kNf4>(w, n * w.cols + k + i);
    __builtin_prefetch(from + kRowsAtOnce * w.cols / 2);
    Floats values[8];
    nf4_chunk(from, values);
    const Floats scale = by_halves(scales_of<Format::kNf4>(w, place));
    for (int v = 0; v < 8; ++v) vector(out + i + v * kOne) = values[v] * scale;
  }
}

// How many bytes ahead codes are fetched where only one row of x is multiplied.
constexpr int64_t kAhead = 1 << 14;

// x . W_n with x arranged: a chunk's products are summed unscaled, and nothing is stored.
LK_INLINE float nf4_dot(const QuantizedMatrix& w, const float* x, int64_t n) {
  const uint8_t* from = codes_at<Format::kNf4>(w, n * w.cols);
  Place place = place_of(w, n * w.cols);
  Floats sums = {};
  for (int64_t k = 0; k < w.cols; k += kChunk<Format::kNf4>, from += sizeof(Floats)) {
    __builtin_prefetch(from + kAhead);
    Floats values[8];
    nf4_chunk(from, values);
    Floats part = values[0] * vector(x + k);
    for (int v = 1; v < 8; ++v) part += values[v] * vector(x + k + v * kOne);
    sums += part * by_halves(scales_of<Format::kNf4>(w, place));
  }
  return sum_of_lanes<float>(sums);
}

// Columns of W in a line of the cache, and those that one chain of additions runs over.
constexpr int64_t kLine = 64, kOfChain = 8 * kLine;

// x . W_(n + j) for P rows of W that have a scale each, or one together.
template <Format F, int P>
LK_INLINE void byte_dots(const QuantizedMatrix& w, const float* x, int64_t n, float* out) {
  constexpr float kUnit = F == Format::kInt8 ? kInt8Unit : 1.0f;
  const uint8_t* rows[P];
  for (int j = 0; j < P; ++j) rows[j] = w.codes + (n + j) * w.cols;
  Floats sums[P] = {};
  int64_t k = 0;
  while (k + kLine <= w.cols) {
    Floats chains[P] = {};
    const int64_t end = std::min(k + kOfChain, w.cols / kLine * kLine);
    for (; k < end; k += kLine) {
      for (int j = 0; j < P; ++j) __builtin_prefetch(rows[j] + k + kAhead);
      for (int64_t part = k; part < k + kLine; part += kOne) {
        const Floats columns = vector(x + part);
        for (int j = 0; j < P; ++j) chains[j] += columns * values_of<F, 0>(rows[j] + part);
      }
    }
    for (int j = 0; j < P; ++j) sums[j] += chains[j];
  }
  for (int j = 0; j < P; ++j) {
    float rest = 0;
    for (int64_t tail = k; tail < w.cols; ++tail) rest += x[tail] * value_at<F>(rows[j], tail);
    const float scale = scale_at(w, (n + j) * w.cols / w.block) * kUnit;
    out[n + j] = (sum_of_lanes<float>(sums[j]) + rest) * scale;
  }
}

// One row of x with all of W, if there is a way that decodes into registers alone.
template <Format F>
LK_INLINE bool dots_of_one(const QuantizedMatrix& w, const float* x, int64_t begin, int64_t end,
                           float* out) {
  int64_t n = begin;
  if constexpr (F == Format::kNf4) {
    if (!arranged<F>(w)) return false;
    for (; n < end; ++n) out[n] = nf4_dot(w, x, n);
  } else {
    if (w.block % w.cols != 0) return false;
    for (; n + kRowsAtOnce <= end; n += kRowsAtOnce) byte_dots<F, kRowsAtOnce>(w, x, n, out);
    for (; n < end; ++n) byte_dots<F, 1>(w, x, n, out);
  }
  return true;
}
#endif

// Columns [k, k + width) of row n, in the order of x's.
template <Format F>
LK_INLINE void decode_columns(const QuantizedMatrix& w, int64_t n, int64_t k, int64_t width,
                              float* out) {
#if LK_REGISTER_BYTES >= 32
  if constexpr (F == Format::kNf4) {
    if (arranged<F>(w)) return decode_arranged(w, n, k, width, out);
  }
#endif
  decode_range<F>(w, n * w.cols + k, n * w.cols + k + width, out);
}

// lanes[i][j] += x_i * w_j, lane by lane. The sums of a span start at zero: one chain over all of a
// row's columns would round worse than a GEMM.
template <int R, int P>
LK_INLINE void dot_span(const float* x, int64_t x_stride, const float (*w)[kDecoded], int64_t width,
                        Floats (*lanes)[kRowsAtOnce]) {
  Floats sums[R][P] = {};
  for (int64_t k = 0; k < width; k += kOne) {
    Floats columns[P];
    for (int j = 0; j < P; ++j) columns[j] = vector(w[j] + k);
    for (int i = 0; i < R; ++i) {
      const Floats row = vector(x + i * x_stride + k);
      for (int j = 0; j < P; ++j) sums[i][j] += row * columns[j];
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < P; ++j) lanes[i][j] += sums[i][j];
  }
}

template <Format F, int P>
LK_INLINE void dots_tile(const QuantizedMatrix& w, const float* x, int64_t x_stride, int64_t count,
                         int64_t n, float* out, int64_t out_stride) {
  Floats lanes[kMostRows][kRowsAtOnce] = {};
  alignas(64) float decoded[P][kDecoded];
  for (int64_t k = 0; k < w.cols; k += kDecoded) {
    const int64_t width = std::min(kDecoded, w.cols - k);
    const int64_t padded = (width + kOne - 1) / kOne * kOne;
    for (int j = 0; j < P; ++j) {
      decode_columns<F>(w, n + j, k, width, decoded[j]);
      std::fill(decoded[j] + width, decoded[j] + padded, 0.0f);
    }
    int64_t i = 0;
    for (; i + kTall <= count; i += kTall) {
      dot_span<kTall, P>(x + i * x_stride + k, x_stride, decoded, padded, lanes + i);
    }
    for (; i < count; ++i) {
      dot_span<1, P>(x + i * x_stride + k, x_stride, decoded, padded, lanes + i);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int j = 0; j < P; ++j) out[i * out_stride + n + j] = sum_of_lanes<float>(lanes[i][j]);
  }
}

template <typename Element>
LK_INLINE void decode_as(const QuantizedMatrix& w, int64_t begin, int64_t end, Element* out) {
  with_format(w.format, [&](auto format) LK_LAMBDA {
    float chunk[kDecoded];
    for (int64_t i = begin; i < end; i += kDecoded) {
      const int64_t count = std::min(kDecoded, end - i);
      decode_range<decltype(format)::value>(w, i, i + count, chunk);
      narrow_row(out + i - begin, chunk, count);
    }
  });
}

}  // namespace

LK_LOOP void decode(const QuantizedMatrix& w, int64_t begin, int64_t end, void* out,
                    Storage storage) {
  if (storage == Storage::kDouble) {
    with_format(w.format, [&](auto format) LK_LAMBDA {
      decode_one_by_one<decltype(format)::value>(w, begin, end, static_cast<double*>(out));
    });
  } else if (storage == Storage::kBFloat16) {
    decode_as(w, begin, end, static_cast<Brain*>(out));
  } else if (storage == Storage::kHalf) {
    decode_as(w, begin, end, static_cast<HalfFloat*>(out));
  } else {
    decode_as(w, begin, end, static_cast<float*>(out));
  }
}

LK_LOOP void arrange(const QuantizedMatrix& w, const float* row, float* out) {
  std::copy(row, row + w.cols, out);
#if LK_REGISTER_BYTES >= 32
  constexpr int64_t kPart = kChunk<Format::kNf4>;
  if (w.format != Format::kNf4 || !arranged<Format::kNf4>(w)) return;
  for (int64_t k = 0; k < w.cols; k += kPart) {
    for (int v = 0; v < 8; ++v) {
      for (int lane = 0; lane < kOne; ++lane) {
        out[k + v * kOne + lane] = row[k + nf4_source(v, lane)];
      }
    }
  }
#endif
}

LK_LOOP void dots(const QuantizedMatrix& w, const float* x, int64_t x_stride, int64_t count,
                  int64_t begin, int64_t end, float* out, int64_t out_stride) {
  with_format(w.format, [&](auto format) LK_LAMBDA {
    constexpr Format F = decltype(format)::value;
#if LK_REGISTER_BYTES >= 32
    if (count == 1 && dots_of_one<F>(w, x, begin, end, out)) return;
#endif
    int64_t n = begin;
    for (; n + kRowsAtOnce <= end; n += kRowsAtOnce) {
      dots_tile<F, kRowsAtOnce>(w, x, x_stride, count, n, out, out_stride);
    }
    for (; n < end; ++n) dots_tile<F, 1>(w, x, x_stride, count, n, out, out_stride);
  });
}

}  // namespace LK_VERSION
}  // namespace lora_kernels
