// A few rows are multiplied while the weight is decoded (quantized_pass.h): its codes are the only
// bytes read. For more rows a panel of the weight at a time is decoded and multiplied as any dense
// one is.
#include "quantized_linear.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "lora_linear.h"
#include "math_type.h"
#include "products.h"
#include "quantized_pass.h"
#include "tensors.h"

namespace lora_kernels {
namespace {

using at::Tensor;

// Elements of a panel: 4 MB of float, which the last cache holds while the GEMM reads it.
constexpr int64_t kPanel = 1 << 22;
// Up to so many rows, decoding the weight again for each kMostRows of them is faster than a panel.
constexpr int64_t kDecodedRows = 4 * kMostRows;
// Elements worth a thread.
constexpr int64_t kTask = 1 << 15;

Format format_of(std::string_view name) {
  if (name == "nf4") return Format::kNf4;
  if (name == "int8") return Format::kInt8;
  TORCH_CHECK_VALUE(name == "fp8", "format: expected nf4, int8 or fp8, got ", std::string(name));
  return Format::kFp8;
}

QuantizedMatrix matrix(const Tensor& codes, const Tensor& scales, const OptTensor& nested,
                       std::string_view format, int64_t rows, int64_t cols, int64_t block) {
  return {static_cast<const uint8_t*>(codes.const_data_ptr()),
          scales.const_data_ptr(),
          has(nested) ? nested->const_data_ptr<float>() : nullptr,
          format_of(format),
          rows,
          cols,
          block};
}

// Rows [first, first + out.size(0)) of W.
void decode_rows(const QuantizedMatrix& weight, int64_t first, Tensor& out) {
  const int64_t cols = weight.cols, begin = first * cols;
  auto* data = static_cast<char*>(out.mutable_data_ptr());
  const auto storage = storage_of(out.scalar_type());
  const auto size = static_cast<int64_t>(out.element_size());
  // Pieces start at even elements, so that no byte of codes is shared by two.
  const int64_t pieces = (out.numel() + kTask - 1) / kTask;
  at::parallel_for(0, pieces, 1, [&](int64_t from, int64_t to) {
    const int64_t start = from * kTask, stop = std::min(to * kTask, out.numel());
    decode(weight, begin + start, begin + stop, data + start * size, storage);
  });
}

// x in float32 as `dots` reads it, with zeros up to `padded` columns.
Tensor arranged(const QuantizedMatrix& weight, const Tensor& x, int64_t padded) {
  const Tensor wide = x.to(at::kFloat).contiguous();
  Tensor rows = at::empty({x.size(0), padded}, wide.options());
  const auto* from = wide.const_data_ptr<float>();
  auto* to = rows.mutable_data_ptr<float>();
  for (int64_t m = 0; m < x.size(0); ++m, from += weight.cols, to += padded) {
    arrange(weight, from, to);
    std::fill(to + weight.cols, to + padded, 0.0f);
  }
  return rows;
}

// x W' in float32, for a few rows.
Tensor decoded_dots(const QuantizedMatrix& weight, const Tensor& x) {
  const int64_t count = x.size(0), padded = (weight.cols + kLanes - 1) / kLanes * kLanes;
  const Tensor rows = arranged(weight, x, padded);
  Tensor sums = at::empty({count, weight.rows}, rows.options());
  // Four rows of W at a time, whichever thread takes them.
  const int64_t tiles = (weight.rows + 3) / 4;
  at::parallel_for(
      0, tiles, std::max<int64_t>(1, kTask / (4 * weight.cols)), [&](int64_t begin, int64_t end) {
        for (int64_t first = 0; first < count; first += kMostRows) {
          dots(weight, rows.const_data_ptr<float>() + first * padded, padded,
               std::min(kMostRows, count - first), 4 * begin, std::min(4 * end, weight.rows),
               sums.mutable_data_ptr<float>() + first * weight.rows, weight.rows);
        }
      });
  return sums;
}

void add_panels(Tensor& out, const Tensor& x, const QuantizedMatrix& weight, bool transpose) {
  // A sum over panels that is rounded to a short type after each of them would be less exact.
  const bool whole = transpose && x.element_size() < 4;
  const int64_t each =
      whole ? weight.rows : std::clamp<int64_t>(kPanel / weight.cols, 1, weight.rows);
  const Way way =
      way_of(Op::kQuantized, x.scalar_type(), {x.size(0), weight.rows * weight.cols, 1});
  Tensor memory = at::empty({each, weight.cols}, x.options());
  for (int64_t first = 0; first < weight.rows; first += each) {
    const int64_t count = std::min(each, weight.rows - first);
    Tensor panel = memory.narrow(0, 0, count);
    decode_rows(weight, first, panel);
    if (transpose) {
      accumulate_product(way, out, x.narrow(1, first, count), panel);
    } else {
      accumulate_product(way, out.narrow(1, first, count), x, panel.t());
    }
  }
}

void add_product(Tensor& out, const Tensor& x, const QuantizedMatrix& weight, bool transpose) {
  if (!transpose && x.size(0) <= kDecodedRows && x.scalar_type() != at::kDouble) {
    out.add_(decoded_dots(weight, x));
  } else {
    add_panels(out, x, weight, transpose);
  }
}

}  // namespace

Tensor dequantize(const Tensor& codes, const Tensor& scales, const OptTensor& nested,
                  std::string_view format, int64_t rows, int64_t cols, int64_t block,
                  at::ScalarType dtype) {
  Tensor out = at::empty({rows, cols}, codes.options().dtype(dtype));
  decode_rows(matrix(codes, scales, nested, format, rows, cols, block), 0, out);
  return out;
}

void quantized_linear(Tensor& out, const Tensor& x, const Tensor& codes, const Tensor& scales,
                      const OptTensor& nested, std::string_view format, int64_t rows, int64_t cols,
                      int64_t block, bool transpose) {
  add_product(out, x, matrix(codes, scales, nested, format, rows, cols, block), transpose);
}

std::tuple<Tensor, Tensor, Tensor> quantized_lora_linear(
    const Tensor& x, const Tensor& codes, const Tensor& scales, const OptTensor& nested,
    const Tensor& lora_a, const Tensor& lora_b, const OptTensor& bias, const OptTensor& gate,
    const OptTensor& x_lora, const OptTensor& seed, std::string_view format, int64_t block,
    double scaling, double dropout_p) {
  auto [y, h, mask] =
      lora_linear(x, std::nullopt, lora_a, lora_b, bias, gate, x_lora, seed, scaling, dropout_p);
  const auto weight = matrix(codes, scales, nested, format, lora_b.size(0), x.size(1), block);
  add_product(y, x, weight, false);
  return {y, h, mask};
}

}  // namespace lora_kernels
