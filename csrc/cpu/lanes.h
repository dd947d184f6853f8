// Vectors as wide as a register, in the compiler's own notation, and what every loop does with
// them. Included by each_version.h for each version in turn, so without an include guard.

namespace lora_kernels {
namespace LK_VERSION {
namespace {

// A loop that is called from outside: a symbol of its own in every version.
#define LK_LOOP __attribute__((noinline))

template <typename Math>
struct VectorType {
  typedef Math type __attribute__((vector_size(LK_REGISTER_BYTES), aligned(sizeof(Math))));
};
template <typename Math>
using VectorOf = typename VectorType<Math>::type;

// Lanes of a register.
template <typename Math>
constexpr int kWidth = LK_REGISTER_BYTES / sizeof(Math);

constexpr bool kManyRegisters = LK_REGISTERS >= 32;
// The tile of sums that is kept in registers, rows by vectors, beside what is multiplied.
constexpr int kTileRows = kManyRegisters ? 8 : 4;
constexpr int kTileVectors = kManyRegisters ? 3 : 2;

// The integer as wide as a lane.
template <typename Math>
using LaneBits = std::conditional_t<sizeof(Math) == 4, int32_t, int64_t>;

// The vector that starts at p, which need not be aligned.
template <typename Math>
LK_INLINE VectorOf<Math>& vector(Math* p) {
  return *reinterpret_cast<VectorOf<Math>*>(p);
}

template <typename Math>
LK_INLINE const VectorOf<Math>& vector(const Math* p) {
  return *reinterpret_cast<const VectorOf<Math>*>(p);
}

// The next tile over vectors where `left` of them are to be done: no single one last where pairs
// can be had.
LK_INLINE int64_t vectors_now(int64_t left) {
  if (left >= kTileVectors && left != kTileVectors + 1) return kTileVectors;
  return left >= 2 ? 2 : 1;
}

// Calls run(number of vectors, as a constant).
template <typename Run>
LK_INLINE void with_vectors(int64_t count, Run run) {
  if (count == 1) return run(std::integral_constant<int, 1>{});
  if (count == 2) return run(std::integral_constant<int, 2>{});
  return run(std::integral_constant<int, kTileVectors>{});
}

// Calls run(pointer of the storage's own type); Math is the type that the storage is summed in.
template <typename Math, typename Run>
LK_INLINE void typed(const void* data, Storage storage, Run run) {
  if constexpr (sizeof(Math) == sizeof(double)) {
    run(static_cast<const double*>(data));
  } else if (storage == Storage::kBFloat16) {
    run(static_cast<const Brain*>(data));
  } else if (storage == Storage::kHalf) {
    run(static_cast<const HalfFloat*>(data));
  } else {
    run(static_cast<const float*>(data));
  }
}

// From which lane of two vectors in a row a lane comes, where blocks of `Distance` lanes change.
template <int Width, int Distance, bool High>
constexpr int source(int lane) {
  const bool second = (lane & Distance) != 0;
  if (High) return second ? Width + lane : lane + Distance;
  return second ? Width + lane - Distance : lane;
}

template <typename Math, int Distance, bool High, int... Lane>
LK_INLINE void change_over(const VectorOf<Math>& first, const VectorOf<Math>& second,
                           VectorOf<Math>& out, std::integer_sequence<int, Lane...>) {
#if __has_builtin(__builtin_shufflevector)
  out = __builtin_shufflevector(first, second, source<kWidth<Math>, Distance, High>(Lane)...);
#else  // gcc before 12
  out = __builtin_shuffle(first, second,
                          VectorOf<LaneBits<Math>>{source<kWidth<Math>, Distance, High>(Lane)...});
#endif
}

// lanes += what lies `Distance` lanes further, and so on in halves: the first is the sum of all.
template <typename Math, int Distance>
LK_INLINE void add_halves(VectorOf<Math>& lanes) {
  VectorOf<Math> other;
  change_over<Math, Distance, true>(lanes, lanes, other,
                                    std::make_integer_sequence<int, kWidth<Math>>());
  lanes += other;
  if constexpr (Distance > 1) add_halves<Math, Distance / 2>(lanes);
}

// The sum of the lanes, in a tree.
template <typename Math>
LK_INLINE Math sum_of_lanes(const VectorOf<Math>& lanes) {
  VectorOf<Math> sums = lanes;
  add_halves<Math, kWidth<Math> / 2>(sums);
  return sums[0];
}

// The vector of bits that is as wide as one of Math.
template <typename Math, typename From>
LK_INLINE VectorOf<Math> with_bits(const From& bits) {
  static_assert(sizeof(From) == sizeof(VectorOf<Math>));
  VectorOf<Math> out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

// The vector from p on, in the type that is summed in.
LK_INLINE void read_vector(VectorOf<double>& out, const double* p) { out = vector(p); }
LK_INLINE void read_vector(VectorOf<float>& out, const float* p) { out = vector(p); }

LK_INLINE void read_vector(VectorOf<float>& out, const Brain* p) {
  uint32_t bits[kWidth<float>];
  for (int i = 0; i < kWidth<float>; ++i) bits[i] = static_cast<uint32_t>(p[i].bits) << 16;
  std::memcpy(&out, bits, sizeof(out));
}

LK_INLINE void read_vector(VectorOf<float>& out, const HalfFloat* p) {
#if LK_REGISTER_BYTES == 64
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  out = with_bits<float>(_mm512_maskz_cvtph_ps(0xFFFF, halves));
#elif LK_REGISTER_BYTES == 32
  out = with_bits<float>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  float lanes[kWidth<float>];
  for (int i = 0; i < kWidth<float>; ++i) lanes[i] = widen(p[i]);
  out = vector(lanes);
#endif
}

// to = from, in the type that is summed in.
template <typename Math, typename Stored>
LK_INLINE void widen_row(Math* to, const Stored* from, int64_t count) {
  int64_t k = 0;
  for (; k + kWidth<Math> <= count; k += kWidth<Math>) {
    VectorOf<Math> wide;
    read_vector(wide, from + k);
    vector(to + k) = wide;
  }
  for (; k < count; ++k) to[k] = widen(from[k]);
}

// to = from, rounded to what is stored.
template <typename Math, typename Stored>
LK_INLINE void narrow_row(Stored* to, const Math* from, int64_t count) {
  int64_t k = 0;
#if LK_REGISTER_BYTES >= 32
  // Element by element otherwise: the compiler has no vector of halves.
  if constexpr (std::is_same_v<Stored, HalfFloat>) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT;
    for (; k + kWidth<Math> <= count; k += kWidth<Math>) {
#if LK_REGISTER_BYTES == 64
      const auto halves = _mm512_maskz_cvtps_ph(0xFFFF, _mm512_loadu_ps(from + k), kNearest);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), halves);
#else
      const auto halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + k), kNearest);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + k), halves);
#endif
    }
  }
#endif
  for (; k < count; ++k) narrow(to + k, from[k]);
}

template <typename Math, int... Lane>
LK_INLINE VectorOf<LaneBits<Math>> bit_of_lane(std::integer_sequence<int, Lane...>) {
  return VectorOf<LaneBits<Math>>{(LaneBits<Math>(1) << Lane)...};
}

// x where the bit of its lane is set, from column k of packed keep bits on, and an exact zero
// elsewhere, whatever x holds there. Column k is the first of a vector.
template <typename Math>
LK_INLINE VectorOf<Math> kept(const VectorOf<Math>& x, const uint8_t* keep, int64_t k) {
  constexpr int width = kWidth<Math>;
  const auto lane = bit_of_lane<Math>(std::make_integer_sequence<int, width>());
  LaneBits<Math> bits = keep[k / 8];
  if constexpr (width == 16) bits |= keep[k / 8 + 1] << 8;
  if constexpr (width < 8) bits >>= k % 8;
  return (lane & bits) != 0 ? x : VectorOf<Math>{};
}

// out = x * keep * scale; bit k % 8 of byte k / 8 is column k.
template <typename Math>
LK_INLINE void drop_row(Math* out, const Math* x, const uint8_t* keep, int64_t cols, Math scale) {
  int64_t k = 0;
  for (; k + kWidth<Math> <= cols; k += kWidth<Math>) {
    vector(out + k) = kept<Math>(vector(x + k) * scale, keep, k);
  }
  for (; k < cols; ++k) out[k] = keep[k / 8] >> (k % 8) & 1 ? x[k] * scale : 0;
}

// Swaps the blocks of `Distance` lanes off the diagonal: one of the steps of a transposition.
template <typename Math, int Distance>
LK_INLINE void transpose_by(VectorOf<Math> (&rows)[kWidth<Math>]) {
  constexpr auto lanes = std::make_integer_sequence<int, kWidth<Math>>();
  for (int i = 0; i < kWidth<Math>; ++i) {
    if (i & Distance) continue;
    const VectorOf<Math> first = rows[i], second = rows[i + Distance];
    change_over<Math, Distance, false>(first, second, rows[i], lanes);
    change_over<Math, Distance, true>(first, second, rows[i + Distance], lanes);
  }
  if constexpr (Distance > 1) transpose_by<Math, Distance / 2>(rows);
}

template <typename Math>
LK_INLINE void transpose_rows(VectorOf<Math> (&rows)[kWidth<Math>]) {
  transpose_by<Math, kWidth<Math> / 2>(rows);
}

// out[k][n] = in[n][k] for a square as wide as a vector.
template <typename Math>
LK_INLINE void transpose_square(const Math* in, int64_t in_stride, Math* out, int64_t out_stride) {
  VectorOf<Math> rows[kWidth<Math>];
  for (int i = 0; i < kWidth<Math>; ++i) rows[i] = vector(in + i * in_stride);
  transpose_rows<Math>(rows);
  for (int i = 0; i < kWidth<Math>; ++i) vector(out + i * out_stride) = rows[i];
}

}  // namespace
}  // namespace LK_VERSION
}  // namespace lora_kernels
