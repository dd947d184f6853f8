// Every loop of csrc/cpu against a plain one in double, in each version that the processor has; the
// names of those versions go to the output. Built with csrc/cpu's passes alone, for any processor.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <random>
#include <vector>

#include "../../csrc/common/philox.h"
#include "../../csrc/cpu/activation_pass.h"
#include "../../csrc/cpu/dropout_pass.h"
#include "../../csrc/cpu/dropped_pass.h"
#include "../../csrc/cpu/gate_pass.h"
#include "../../csrc/cpu/gather_pass.h"
#include "../../csrc/cpu/kept_memory.h"
#include "../../csrc/cpu/panel_pass.h"
#include "../../csrc/cpu/quantized_pass.h"
#include "../../csrc/cpu/scale_pass.h"
#include "../../csrc/cpu/version.h"

namespace lora_kernels {
namespace {

// The same numbers in every run.
// NOLINTNEXTLINE(bugprone-random-generator-seed,bugprone-throwing-static-initialization)
std::mt19937 engine(1);

template <typename Math>
constexpr Storage kStored = sizeof(Math) == 8 ? Storage::kDouble : Storage::kFloat;

template <typename Math>
std::vector<Math> numbers(int64_t count) {
  std::uniform_real_distribution<double> values(-1, 1);
  std::vector<Math> made(count);
  for (Math& value : made) value = static_cast<Math>(values(engine));
  return made;
}

std::vector<uint8_t> some_bytes(int64_t count) {
  std::vector<uint8_t> made(count);
  for (uint8_t& value : made) value = static_cast<uint8_t>(engine());
  return made;
}

bool kept(const std::vector<uint8_t>& keep, int64_t stride, int64_t m, int64_t k) {
  return keep.empty() || (keep[m * stride + k / 8] >> (k % 8) & 1) != 0;
}

// How far a sum of `terms` products of numbers below one may be off.
template <typename Math>
void same(const char* what, double got, double expected, int64_t terms) {
  const double unit = sizeof(Math) == 8 ? 2.3e-16 : 1.2e-7;
  if (std::abs(got - expected) <= 4 * unit * static_cast<double>(terms + 4)) return;
  std::printf("%s: %.9g, expected %.9g\n", what, got, expected);
  std::exit(1);
}

struct Size {
  int64_t rows, cols, rank;
};

template <typename Math>
void check_accumulate(Size s, bool drops, bool shrinks, bool adds) {
  const int64_t mask = (s.cols + 7) / 8;
  const auto x = numbers<Math>(s.rows * s.cols), factor = numbers<Math>(s.cols * s.rank),
             vectors = numbers<Math>(s.rows * s.rank);
  const auto keep = drops ? some_bytes(s.rows * mask) : std::vector<uint8_t>();
  std::vector<Math> shrunk(s.rows * s.rank), outer(s.cols * s.rank);
  const Activation in = {x.data(), kStored<Math>, s.cols, drops ? keep.data() : nullptr, mask, 2.0};
  const Products<Math> products = {s.rank, factor.data(), shrinks ? shrunk.data() : nullptr,
                                   vectors.data(), adds ? outer.data() : nullptr};
  accumulate(in, {0, s.rows}, {0, s.cols}, products);
  const auto at = [&](int64_t m, int64_t k) {
    return kept(keep, mask, m, k) ? x[m * s.cols + k] * (drops ? 2.0 : 1.0) : 0.0;
  };
  for (int64_t r = 0; r < s.rank; ++r) {
    for (int64_t m = 0; m < s.rows && shrinks; ++m) {
      double sum = 0;
      for (int64_t k = 0; k < s.cols; ++k) sum += at(m, k) * factor[k * s.rank + r];
      same<Math>("accumulate: shrunk", shrunk[m * s.rank + r], sum, 2 * s.cols);
    }
    for (int64_t k = 0; k < s.cols && adds; ++k) {
      double sum = 0;
      for (int64_t m = 0; m < s.rows; ++m) sum += at(m, k) * vectors[m * s.rank + r];
      same<Math>("accumulate: outer", outer[k * s.rank + r], sum, 2 * s.rows);
    }
  }
}

template <typename Math>
void check_expand(Size s, bool drops, bool add) {
  const int64_t mask = (s.cols + 7) / 8;
  const auto vectors = numbers<Math>(s.rows * s.rank), factor = numbers<Math>(s.rank * s.cols),
             before = numbers<Math>(s.rows * s.cols), w = numbers<Math>(s.rows * s.cols);
  const auto keep = drops ? some_bytes(s.rows * mask) : std::vector<uint8_t>();
  std::vector<Math> out = before, norm(s.rows);
  Expansion<Math> e = {s.rank,        vectors.data(), s.rank,
                       factor.data(), s.cols,         s.cols,
                       out.data(),    kStored<Math>,  drops ? keep.data() : nullptr,
                       mask,          Math(2),        add};
  expand(e, {0, s.rows});
  norms(Norms<Math>{{w.data(), kStored<Math>, s.cols, nullptr, 0, 1.0}, e, norm.data()},
        {0, s.rows});
  for (int64_t m = 0; m < s.rows; ++m) {
    double squares = 0;
    for (int64_t k = 0; k < s.cols; ++k) {
      double sum = 0;
      for (int64_t r = 0; r < s.rank; ++r) {
        sum += static_cast<double>(vectors[m * s.rank + r]) * factor[r * s.cols + k];
      }
      const double start = add ? before[m * s.cols + k] : 0.0;
      same<Math>("expand", out[m * s.cols + k], start + (kept(keep, mask, m, k) ? 2 * sum : 0.0),
                 2 * s.rank);
      squares += (w[m * s.cols + k] + sum) * (w[m * s.cols + k] + sum);
    }
    same<Math>("norms", norm[m], std::sqrt(squares), s.cols);
  }
}

template <typename Math>
void check_transpose(Size s) {
  const auto in = numbers<Math>(s.rows * s.cols);
  std::vector<Math> out(s.rows * s.cols);
  transpose(in.data(), s.cols, out.data(), s.rows, s.rows, {0, s.cols});
  for (int64_t m = 0; m < s.rows; ++m) {
    for (int64_t k = 0; k < s.cols; ++k) {
      same<Math>("transpose", out[k * s.rows + m], in[m * s.cols + k], -4);
    }
  }
}

template <typename Math>
void check_scale(Size s) {
  const int64_t mask = (s.cols + 7) / 8, size = s.rows * s.cols;
  auto z = numbers<Math>(size), dy = numbers<Math>(size), c = numbers<Math>(s.cols),
       b = numbers<Math>(s.cols);
  std::vector<Math> y(size), dz(size), sums(s.cols), dropped(size), rest(size), kept_sum = z;
  const auto keep = some_bytes(s.rows * mask);
  const auto matrix = [&](std::vector<Math>& from) {
    return Matrix{from.data(), kStored<Math>, s.cols};
  };
  run(Scaling<Math>{matrix(z), c.data(), b.data(), matrix(y)}, {0, s.rows}, s.cols);
  run(Unscaling<Math>{matrix(dy), c.data(), matrix(dz), matrix(z), sums.data()}, {0, s.rows},
      {0, s.cols});
  run(Splitting{matrix(z), {keep.data(), mask, 2.0}, matrix(dropped), matrix(rest)}, {0, s.rows},
      s.cols);
  run(Keeping{matrix(dy), {keep.data(), mask, 1.0}, matrix(kept_sum)}, {0, s.rows}, s.cols);
  for (int64_t k = 0; k < s.cols; ++k) {
    double sum = 0;
    for (int64_t m = 0; m < s.rows; ++m) {
      const int64_t i = m * s.cols + k;
      const bool on = kept(keep, mask, m, k);
      sum += static_cast<double>(dy[i]) * z[i];
      same<Math>("scale", y[i], static_cast<double>(z[i]) * c[k] + b[k], 2);
      same<Math>("unscale", dz[i], static_cast<double>(dy[i]) * c[k], 1);
      same<Math>("split: dropped", dropped[i], on ? 2.0 * z[i] : 0.0, 1);
      same<Math>("split: rest", rest[i], on ? -static_cast<double>(z[i]) : z[i], 1);
      same<Math>("keep", kept_sum[i], z[i] + (on ? static_cast<double>(dy[i]) : 0.0), 1);
    }
    same<Math>("unscale: sums", sums[k], sum, s.rows);
  }
}

template <typename Math>
void check_gather(Size s) {
  const int64_t count = s.rows;
  const auto x = numbers<Math>(count * s.cols), pages = numbers<Math>(s.rank * s.cols),
             vectors = numbers<Math>(count * s.rank);
  std::vector<int32_t> slots, index;
  for (int64_t i = 0; i < count; ++i) slots.push_back(static_cast<int32_t>(count - 1 - i));
  for (int64_t r = 0; r < s.rank; ++r) index.push_back(static_cast<int32_t>(r * 3 % s.rank));
  std::vector<Math> h(count * s.rank), out(count * s.cols), grad(s.rank * s.cols),
      turned(s.rank * s.cols), sums(kTile * s.cols);
  auto added = x;
  const Rows<Math> rows = {x.data(), s.cols, slots.data(), count, 1};
  const Pages all = {pages.data(), kStored<Math>, s.cols, s.cols, index.data()};
  dots(rows, all, 0, s.rank, h.data(), s.rank);
  mix(rows, all, Mix<Math>{vectors.data(), s.rank, s.rank, out.data(), s.cols}, {0, s.cols});
  mix_add(rows, all, Mix<Math>{vectors.data(), s.rank, s.rank, sums.data(), 0}, {0, s.cols},
          {added.data(), kStored<Math>, s.cols});
  outer_pages(rows, index.data(), 0, s.rank,
              Mix<Math>{vectors.data(), s.rank, 0, grad.data(), s.cols}, {0, s.cols});
  turn(pages.data(), kStored<Math>, s.cols, s.cols, s.rank, turned.data());
  for (int64_t r = 0; r < s.rank; ++r) {
    for (int64_t m = 0; m < count; ++m) {
      double sum = 0;
      for (int64_t k = 0; k < s.cols; ++k) {
        sum += static_cast<double>(x[m * s.cols + k]) * pages[index[r] * s.cols + k];
      }
      same<Math>("dots", h[m * s.rank + r], sum, s.cols);
    }
    for (int64_t k = 0; k < s.cols; ++k) {
      double sum = 0;
      for (int64_t m = 0; m < count; ++m) {
        sum += static_cast<double>(vectors[m * s.rank + r]) * x[m * s.cols + k];
      }
      same<Math>("outer_pages", grad[index[r] * s.cols + k], sum, count);
      same<Math>("turn", turned[k * s.rank + r], pages[r * s.cols + k], -4);
    }
  }
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t k = 0; k < s.cols; ++k) {
      double sum = 0;
      for (int64_t r = 0; r < s.rank; ++r) {
        sum += static_cast<double>(vectors[m * s.rank + r]) * pages[index[r] * s.cols + k];
      }
      same<Math>("mix", out[m * s.cols + k], sum, s.rank);
      same<Math>("mix_add", added[m * s.cols + k], x[m * s.cols + k] + sum, s.rank + 1);
    }
  }
}

void check_panels(Size s, bool transposed) {
  const auto left = numbers<float>(s.rows * s.cols), right = numbers<float>(s.cols * s.rank),
             bias = numbers<float>(s.rank);
  const PanelShape shape = panel_shape();
  const int64_t row_panels = panels_of(s.rows, shape.rows),
                col_panels = panels_of(s.rank, shape.cols);
  std::vector<float> packed(row_panels * shape.rows * s.cols), scratch(shape.scratch()),
      out(s.rows * s.rank);
  pack_rows(left.data(), s.cols, s.rows, s.cols, {0, row_panels}, packed.data());
  const PanelTerm term = {packed.data(), right.data(), transposed ? s.cols : s.rank, transposed,
                          s.cols};
  multiply_panels({&term, 1, s.rows, s.rank, out.data(), s.rank, bias.data(), false},
                  {0, row_panels}, {0, col_panels}, scratch.data());
  for (int64_t m = 0; m < s.rows; ++m) {
    for (int64_t n = 0; n < s.rank; ++n) {
      double sum = bias[n];
      for (int64_t k = 0; k < s.cols; ++k) {
        sum += static_cast<double>(left[m * s.cols + k]) *
               right[transposed ? n * s.cols + k : k * s.rank + n];
      }
      same<float>("panels", out[m * s.rank + n], sum, s.cols);
    }
  }
}

void check_dropped(Size s) {
  const int64_t mask = (s.cols + 7) / 8, chunks = (s.cols + kChunk - 1) / kChunk, out = s.rank;
  const auto keep = some_bytes(s.rows * mask);
  const auto x = numbers<float>(s.rows * s.cols), w = numbers<float>(out * s.cols),
             dy = numbers<float>(s.rows * out);
  auto y = numbers<float>(s.rows * out), dx = numbers<float>(s.rows * s.cols);
  const auto y_before = y, dx_before = dx;
  std::vector<int64_t> starts(s.rows * chunks + 1);
  count_dropped(keep.data(), mask, s.cols, {0, s.rows}, starts.data() + 1);
  for (int64_t i = 0; i < s.rows * chunks; ++i) starts[i + 1] += starts[i];
  std::vector<uint8_t> columns(starts.back());
  std::vector<float> values(starts.back()), tile(kChunk * kPiece);
  list_dropped(keep.data(), mask, x.data(), s.cols, s.cols, {0, s.rows}, starts.data(),
               columns.data(), values.data());
  const DroppedList list = {chunks, starts.data(), columns.data(), values.data()};
  for (int64_t n = 0; n < out; n += kPanel) {
    subtract({list, w.data(), s.cols, s.cols, y.data(), out}, {0, s.rows},
             {n, std::min(n + kPanel, out)});
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    replace({list, dy.data(), out, w.data(), s.cols, out, s.cols, dx.data(), s.cols}, {0, s.rows},
            chunk, tile.data());
  }
  for (int64_t m = 0; m < s.rows; ++m) {
    for (int64_t n = 0; n < out; ++n) {
      double sum = y_before[m * out + n];
      for (int64_t k = 0; k < s.cols; ++k) {
        if (!kept(keep, mask, m, k)) {
          sum -= static_cast<double>(x[m * s.cols + k]) * w[n * s.cols + k];
        }
      }
      same<float>("subtract", y[m * out + n], sum, s.cols);
    }
    for (int64_t k = 0; k < s.cols; ++k) {
      double sum = 0;
      for (int64_t n = 0; n < out; ++n) {
        sum += static_cast<double>(dy[m * out + n]) * w[n * s.cols + k];
      }
      const bool on = kept(keep, mask, m, k);
      same<float>("replace", dx[m * s.cols + k], on ? dx_before[m * s.cols + k] : sum, out);
    }
  }
}

void check_quantized(Size s, Format format, int64_t block) {
  const int64_t size = s.rows * s.cols, padded = (s.cols + kLanes - 1) / kLanes * kLanes;
  auto codes = some_bytes(size);
  for (uint8_t& code : codes) {
    if (format == Format::kFp8 && (code & 0x7F) == 0x7F) code = 1;  // not a number
  }
  auto scales = numbers<float>((size + block - 1) / block);
  if (format == Format::kFp8) {
    for (float& scale : scales) scale /= 448;
  }
  const QuantizedMatrix w = {codes.data(), scales.data(), nullptr, format, s.rows, s.cols, block};
  std::vector<double> exact(size);
  std::vector<float> wide(size), x(s.rank * padded), turned(x), out(s.rank * s.rows);
  decode(w, 0, size, exact.data(), Storage::kDouble);
  decode(w, 0, size, wide.data(), Storage::kFloat);
  for (int64_t i = 0; i < size; ++i) same<float>("decode", wide[i], exact[i], 0);
  for (int64_t i = 0; i < s.rank; ++i) {
    const auto row = numbers<float>(s.cols);
    std::copy(row.begin(), row.end(), x.begin() + i * padded);
    arrange(w, row.data(), turned.data() + i * padded);
  }
  dots(w, turned.data(), padded, s.rank, 0, s.rows, out.data(), s.rows);
  for (int64_t i = 0; i < s.rank; ++i) {
    for (int64_t n = 0; n < s.rows; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < s.cols; ++k) sum += exact[n * s.cols + k] * x[i * padded + k];
      same<float>("quantised dots", out[i * s.rows + n], sum, s.cols);
    }
  }
}

template <typename Math>
void check_dropout() {
  const int64_t cols = 101;
  std::vector<uint8_t> mask(cols);
  fill_bytes(mask.data(), 5, 3, cols, 1u << 31);
  for (int64_t i = 3; i < cols; ++i) {
    same<double>("fill_bytes", mask[i], keep_byte(5, i, 1u << 31), -4);
  }
  const auto x = numbers<Math>(cols);
  std::vector<Math> out(cols);
  drop(out.data(), x.data(), mask.data(), cols);
  for (int64_t k = 0; k < cols; ++k) {
    same<Math>("drop", out[k], kept(mask, 0, 0, k) ? x[k] : Math(0), -4);
  }
}

// A gate on two axes of [3, 2, 2] and the gradient of it, for tokens that end within a tile.
template <typename Math>
void check_gate() {
  constexpr int64_t kPlaces = 16, kCount = 6, kRows = 19, kCols = 11;
  const auto x = numbers<Math>(kRows * kCols), gate = numbers<Math>(kCount * kCount);
  std::vector<int64_t> offsets(kCount);
  for (int64_t k = 0; k < kCount; ++k) offsets[k] = 2 * k * kTokens;
  const int64_t bases[] = {0, kTokens};
  const GatePlaces places{offsets.data(), bases, kCount, 2};
  std::vector<Math> packed(kCount * kGateRows), in(kPlaces * kTokens), out(in.size()),
      scratch(kPlaces * (kLanes + 1)), grad(kCount * kCount), y(x);
  for (int64_t n = 0; n < kCount; ++n) {
    for (int64_t k = 0; k < kCount; ++k) packed[k * kGateRows + n] = gate[n * kCount + k];
  }
  const Storage storage = sizeof(Math) == 8 ? Storage::kDouble : Storage::kFloat;
  const Matrix from{const_cast<Math*>(x.data()), storage, kCols}, to{y.data(), storage, kCols};
  open_tile(from, {0, kRows}, kCols, kPlaces, in.data(), scratch.data());
  apply_gate(places, packed.data(), in.data(), out.data());
  sum_gate(places, out.data(), in.data(), grad.data());
  close_tile(out.data(), kPlaces, to, {0, kRows}, kCols, true, scratch.data());
  const auto value = [&](int64_t m, int64_t place) {
    return place < kCols ? double(x[m * kCols + place]) : 0.0;
  };
  std::vector<double> sums(kCount * kCount);
  for (int64_t m = 0; m < kRows; ++m) {
    for (int64_t n = 0; n < 2 * kCount; ++n) {
      double product = 0;
      for (int64_t k = 0; k < kCount; ++k) {
        product += double(gate[n / 2 * kCount + k]) * value(m, 2 * k + n % 2);
      }
      for (int64_t k = 0; k < kCount; ++k) {
        sums[n / 2 * kCount + k] += product * value(m, 2 * k + n % 2);
      }
      if (n < kCols) same<Math>("gate", y[m * kCols + n], x[m * kCols + n] + product, kCount);
    }
  }
  for (size_t i = 0; i < sums.size(); ++i) same<Math>("sum_gate", grad[i], sums[i], 40 * kRows);
}

template <typename Math>
void check_all(Size s) {
  for (const bool drops : {false, true}) {
    for (const bool second : {false, true}) check_expand<Math>(s, drops, second);
    for (const int which : {1, 2, 3}) {
      const Size padded = {s.rows, s.cols, padded_rank(s.rank)};
      check_accumulate<Math>(padded, drops, (which & 1) != 0, (which & 2) != 0);
    }
  }
  check_transpose<Math>(s);
  check_scale<Math>(s);
  check_gather<Math>(s);
  check_dropout<Math>();
  check_gate<Math>();
}

void check_version() {
  for (const Size& s : {Size{1, 70, 1}, {13, 300, 5}, {19, 161, 16}, {10, 530, 70}, {9, 64, 130}}) {
    check_all<float>(s);
    check_all<double>(s);
    for (const bool transposed : {false, true}) check_panels(s, transposed);
    check_dropped(s);
    // Rows of W that are whole chunks, or that are not, with one row of x or several.
    for (const int64_t cols : {s.cols * 2, s.rows * 128}) {
      for (const int64_t count : {int64_t(1), std::min<int64_t>(s.rank, kMostRows)}) {
        const Size few = {s.rows, cols, count};
        for (const int64_t block : {32, 64, 256}) check_quantized(few, Format::kNf4, block);
        for (const Format format : {Format::kInt8, Format::kFp8}) {
          for (const int64_t block : {int64_t(64), cols, s.rows * cols}) {
            check_quantized(few, format, block);
          }
        }
      }
    }
  }
}

// Where there was no memory for more, the next call gets what it asks for.
void check_kept_memory() {
  KeptMemory<float> memory;
  memory.room(8)[7] = 1;
  try {
    memory.room(int64_t(1) << 50)[0] = 1;
    std::printf("kept memory: expected none for 4 PiB\n");
    std::exit(1);
  } catch (const std::bad_alloc&) {
    memory.room(4)[3] = 1;
  }
}

}  // namespace
}  // namespace lora_kernels

int main() {
  using namespace lora_kernels;
  check_kept_memory();
  for (const Version version : runnable_versions()) {
    chosen_version = version;
    check_version();
    std::printf("%s\n", kVersionNames[static_cast<int>(version)]);
  }
  return 0;
}
