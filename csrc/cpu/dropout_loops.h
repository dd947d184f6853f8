// The loops of dropout_pass.h, for each version.

namespace lora_kernels {
namespace LK_VERSION {
LK_LOOP void fill_bytes(uint8_t* out, uint64_t seed, int64_t begin, int64_t end, uint32_t limit) {
  for (int64_t i = begin; i < end; ++i) {
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
