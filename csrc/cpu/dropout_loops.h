// The loops of dropout_pass.h, for each version.

namespace lora_kernels {
namespace LK_VERSION {
namespace {

#ifdef __x86_64__
using Words = VectorOf<uint32_t>;
using Pairs = VectorOf<uint64_t>;

// The whole product of the lower half of each lane with a number.
LK_INLINE Pairs low_halves_times(const Pairs& lanes, uint32_t factor) {
#if LK_REGISTER_BYTES == 64
  const __m512i product =
      _mm512_maskz_mul_epu32(0xFF, reinterpret_cast<__m512i>(lanes), _mm512_set1_epi64(factor));
#elif LK_REGISTER_BYTES == 32
  const __m256i product =
      _mm256_mul_epu32(reinterpret_cast<__m256i>(lanes), _mm256_set1_epi64x(factor));
#else
  const __m128i product = _mm_mul_epu32(reinterpret_cast<__m128i>(lanes), _mm_set1_epi64x(factor));
#endif
  return with_bits<uint64_t>(product);
}

// The four words of keep_byte() for a counter in each lane, in lower halves: what the upper ones
// hold is never read.
LK_INLINE void philox(Pairs (&words)[4], const Pairs& counters, uint64_t seed) {
  words[0] = counters;
  words[1] = counters >> 32;
  words[2] = words[3] = Pairs{};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Pairs low = low_halves_times(words[0], kPhiloxLow);
    const Pairs high = low_halves_times(words[2], kPhiloxHigh);
    words[0] = high >> 32 ^ words[1] ^ static_cast<uint64_t>(k0);
    words[1] = high;
    words[2] = low >> 32 ^ words[3] ^ static_cast<uint64_t>(k1);
    words[3] = low;
    k0 += kPhiloxStep0, k1 += kPhiloxStep1;
  }
}

// The bytes of as many counters as a register has words, from `counter` on: even ones and odd ones
// apart, so that their words lie in turn.
LK_INLINE void fill_vector(uint8_t* out, uint64_t seed, uint64_t counter, uint32_t limit) {
  constexpr int width = kWidth<uint32_t>;
  Pairs even, words[2][4];
  for (int i = 0; i < width / 2; ++i) even[i] = counter + 2 * i;
  philox(words[0], even, seed);
  philox(words[1], even + 1, seed);
  Words bits = {};
  for (int i = 0; i < 4; ++i) {
    const auto both = with_bits<uint32_t>((words[0][i] & 0xFFFFFFFFu) | words[1][i] << 32);
    bits |= (both >= limit ? Words{} + (1u << 2 * i) : Words{});
    bits |= ((both << 16 | both >> 16) >= limit ? Words{} + (2u << 2 * i) : Words{});
  }
  typedef uint8_t Bytes __attribute__((vector_size(width)));
  const Bytes bytes = __builtin_convertvector(bits, Bytes);
  std::memcpy(out, &bytes, width);
}
#endif

}  // namespace

LK_LOOP void fill_bytes(uint8_t* out, uint64_t seed, int64_t begin, int64_t end, uint32_t limit) {
  int64_t i = begin;
#ifdef __x86_64__
  for (; i + kWidth<uint32_t> <= end; i += kWidth<uint32_t>) {
    fill_vector(out + i, seed, static_cast<uint64_t>(i), limit);
  }
#endif
  for (; i < end; ++i) {
    out[i] = keep_byte(seed, static_cast<uint64_t>(i), limit);
  }
}

LK_LOOP void drop(float* out, const float* x, const uint8_t* keep, int64_t cols) {
  drop_row(out, x, keep, cols, 1.0f);
}

LK_LOOP void drop(double* out, const double* x, const uint8_t* keep, int64_t cols) {
  drop_row(out, x, keep, cols, 1.0);
}

}  // namespace LK_VERSION
}  // namespace lora_kernels
