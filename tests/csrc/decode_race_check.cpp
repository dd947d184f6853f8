// The decode kernels' loops on a few batches, for the sanitizers: what a launch of one kind gives
// is what the other gives, and every element is written.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cuda/decode_index.h"

extern "C" void simulate(const lora_kernels::DecodeProblem* problem, int brain);

namespace {

using namespace lora_kernels;

// Two adapters of other ranks, rows in no order, and one without an adapter.
struct Batch {
  static constexpr uint16_t kOne = 0x3F80;
  static constexpr int kRows = 5, kCols = 176, kOut = 560, kRanks[2] = {19, 3}, kPagesAll = 22;
  std::vector<uint16_t> x, a, b, weight, y;
  std::vector<float> coef = std::vector<float>(kRows, 0.5f), scalings = {0.5f, 2.0f}, parts;
  std::vector<int32_t> order = {3, 0, 4, 1, 2}, offsets = {0, 2, 4, 5}, spans = {0, 19, 19, 3};
  std::vector<int32_t> second_spans = {0, 0, 4, 17};
  std::vector<int32_t> tiles = {0, 0, 1, 2, 2, 4}, pages;

  Batch() : x(some(kRows * kCols)), a(some(kPagesAll * kCols)), b(some(kPagesAll * kOut)) {
    weight = some(kOut * kCols);
    for (int i = 0; i < kPagesAll; ++i) pages.push_back(kPagesAll - 1 - i);
  }
  // bfloat16 numbers between 0.5 and 2, of both signs.
  static std::vector<uint16_t> some(int count) {
    std::vector<uint16_t> values(count);
    uint32_t state = 1;
    for (uint16_t& value : values) {
      state = state * 1664525u + 1013904223u;
      value = static_cast<uint16_t>((state >> 31 << 15) | (0x3F00u + (state >> 16 & 0xFFu)));
    }
    return values;
  }

  std::vector<uint16_t> run(bool base, bool two_launches) {
    y.assign(kRows * kOut, 0xFFFF);
    parts.assign(two_launches ? 3 * part_elements(kRanks[0]) : 0, NAN);
    DecodeProblem p = {};
    p.x = x.data(), p.x_stride = kCols, p.rows = kRows, p.cols = kCols;
    p.coef = coef.data(), p.order = order.data(), p.offsets = offsets.data();
    p.tiles = tiles.data(), p.adapters = 2, p.tile_count = 3, p.max_rank = kRanks[0];
    p.weight = base ? weight.data() : nullptr, p.weight_stride = kCols, p.cluster_cols = 288;
    p.y = y.data(), p.y_stride = kOut, p.projections = 1;
    p.projection[0] = {a.data(),     b.data(), kCols, kOut, pages.data(),
                       spans.data(), nullptr,  0,     kOut};
    p.parts = two_launches ? parts.data() : nullptr;
    simulate(&p, 1);
    return y;
  }

  // Adds to ones, in two projections with factors of their own: the second has one adapter alone.
  std::vector<uint16_t> add(bool two_launches) {
    constexpr int kFirst = 320;
    y.assign(kRows * kOut, kOne);
    parts.assign(two_launches ? 6 * part_elements(kRanks[0]) : 0, NAN);
    DecodeProblem p = {};
    p.x = x.data(), p.x_stride = kCols, p.rows = kRows, p.cols = kCols;
    p.order = order.data(), p.offsets = offsets.data(), p.tiles = tiles.data();
    p.adapters = 2, p.tile_count = 3, p.max_rank = kRanks[0];
    p.y = y.data(), p.y_stride = kOut, p.accumulate = true, p.projections = 2;
    p.projection[0] = {a.data(),     b.data(),        kCols, kOut,  pages.data(),
                       spans.data(), scalings.data(), 0,     kFirst};
    p.projection[1] = {
        a.data(),        b.data(), kCols,        kOut, pages.data(), second_spans.data(),
        scalings.data(), kFirst,   kOut - kFirst};
    p.parts = two_launches ? parts.data() : nullptr;
    simulate(&p, 1);
    return y;
  }

  // Ones where a row has no adapter, or one without pages; nothing else is exactly that throughout.
  bool alone(int row, int first, int last) const {
    for (int i = first; i < last; ++i) {
      if (y[row * kOut + i] != kOne) return false;
    }
    return true;
  }
};

void expect(bool true_thing, const char* what) {
  if (true_thing) return;
  std::fprintf(stderr, "decode_race_check: %s\n", what);
  std::exit(1);
}

bool all_written(const std::vector<uint16_t>& y) {
  for (const uint16_t value : y) {
    if ((value & 0x7F80) == 0x7F80) return false;
  }
  return true;
}

}  // namespace

int main() {
  Batch batch;
  const std::vector<uint16_t> one = batch.run(false, false);
  expect(all_written(one), "an element of the delta was not written");
  expect(batch.run(false, true) == one, "two launches differ from one");
  expect(all_written(batch.run(true, false)), "an element of the product was not written");
  const std::vector<uint16_t> sum = batch.add(false);
  expect(all_written(sum), "an element of the sum is no number");
  // Row 2 has no adapter; rows 3 and 0 have the one that the second projection leaves out.
  expect(batch.alone(2, 0, Batch::kOut) && batch.alone(0, 320, Batch::kOut), "a row was touched");
  expect(!batch.alone(0, 0, 320) && !batch.alone(4, 320, Batch::kOut), "nothing was added");
  expect(batch.add(true) == sum, "two launches that add differ from one");
  std::puts("decode loops: one launch, two launches, those that add and the fused one ran");
}
