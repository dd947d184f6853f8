// Memory that a thread keeps between calls, as BLAS libraries keep theirs: fresh pages can cost
// more than what is written into them.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace lora_kernels {

// It starts where a cache line does: a vector across two lines is loaded twice.
template <typename T>
class KeptMemory {
 public:
  // Room for that many elements; what it held is lost where it held fewer.
  T* room(int64_t elements) {
    if (size_ < elements) {
      memory_.reset();
      size_ = 0;  // and stays so if there is no memory for more
      memory_.reset(new (kLine) T[elements]);
      size_ = elements;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(T* memory) const { ::operator delete[](memory, kLine); }
  };

  std::unique_ptr<T[], Free> memory_;
  int64_t size_ = 0;
};

}  // namespace lora_kernels
