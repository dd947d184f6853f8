#include "panel_pass.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "version.h"

namespace lora_kernels {
namespace {

// The part of a term's depth that a block reads.
struct Part {
  const PanelTerm* term;
  Range depth;
};

int64_t parts_of(int64_t depth) { return panels_of(depth, kPartDepth); }

Range part_of(int64_t depth, int64_t part) {
  const int64_t parts = parts_of(depth);
  return {depth * part / parts, depth * (part + 1) / parts};
}

// The products that are one chain of additions.
struct Block {
  static constexpr int kMost = 16;
  Part parts[kMost];
  int count = 0;
  int64_t depth = 0;

  bool takes(Range run) const {
    return count == 0 || (count < kMost && depth + run.end - run.begin <= kChainDepth);
  }
  void add(const PanelTerm& term, Range run) {
    parts[count++] = {&term, run};
    depth += run.end - run.begin;
  }
};

}  // namespace
}  // namespace lora_kernels

#define LK_LOOPS "panel_loops.h"
#include "each_version.h"

namespace lora_kernels {

PanelShape panel_shape() { LK_DISPATCH(panel_shape()); }

void pack_rows(const float* matrix, int64_t stride, int64_t rows, int64_t depth, Range panels,
               float* packed) {
  LK_DISPATCH(pack_rows(matrix, stride, rows, depth, panels, packed));
}

void multiply_panels(const PanelProduct& product, Range row_panels, Range col_panels,
                     float* scratch) {
  LK_DISPATCH(multiply_panels(product, row_panels, col_panels, scratch));
}

}  // namespace lora_kernels
