#include "gather_pass.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "version.h"

#define LK_LOOPS "gather_loops.h"
#include "each_version.h"

namespace lora_kernels {

void dots(const Rows<float>& rows, const Pages& pages, int64_t first, int64_t last, float* out,
          int64_t out_stride) {
  LK_DISPATCH(dots(rows, pages, first, last, out, out_stride));
}

void dots(const Rows<double>& rows, const Pages& pages, int64_t first, int64_t last, double* out,
          int64_t out_stride) {
  LK_DISPATCH(dots(rows, pages, first, last, out, out_stride));
}

void mix(const Rows<float>& slots, const Pages& pages, const Mix<float>& what, Columns columns) {
  LK_DISPATCH(mix(slots, pages, what, columns));
}

void mix(const Rows<double>& slots, const Pages& pages, const Mix<double>& what, Columns columns) {
  LK_DISPATCH(mix(slots, pages, what, columns));
}

void mix_add(const Rows<float>& slots, const Pages& pages, const Mix<float>& what, Columns columns,
             const Target& to) {
  LK_DISPATCH(mix_add(slots, pages, what, columns, to));
}

void mix_add(const Rows<double>& slots, const Pages& pages, const Mix<double>& what,
             Columns columns, const Target& to) {
  LK_DISPATCH(mix_add(slots, pages, what, columns, to));
}

void outer_pages(const Rows<float>& rows, const int32_t* index, int64_t first, int64_t last,
                 const Mix<float>& what, Columns columns) {
  LK_DISPATCH(outer_pages(rows, index, first, last, what, columns));
}

void outer_pages(const Rows<double>& rows, const int32_t* index, int64_t first, int64_t last,
                 const Mix<double>& what, Columns columns) {
  LK_DISPATCH(outer_pages(rows, index, first, last, what, columns));
}

void turn(const void* from, Storage storage, int64_t stride, int64_t rank, int64_t width,
          float* out) {
  LK_DISPATCH(turn(from, storage, stride, rank, width, out));
}

void turn(const void* from, Storage storage, int64_t stride, int64_t rank, int64_t width,
          double* out) {
  LK_DISPATCH(turn(from, storage, stride, rank, width, out));
}

}  // namespace lora_kernels
