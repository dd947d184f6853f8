// Which instructions the loops use. Every loop is compiled for each version (each_version.h), and
// which one runs is asked of the processor once: no resolver in the loader, which a sanitizer
// would not survive.
#pragma once

#include <atomic>
#include <vector>

namespace lora_kernels {

// From the widest to the narrowest; the names are those of LORA_KERNELS_CPU_VERSION.
#if defined(__x86_64__)
enum class Version { kAvx512, kAvx2, kSse2 };
constexpr const char* kVersionNames[] = {"avx512", "avx2", "sse2"};
#elif defined(__aarch64__)
enum class Version { kNeon };
constexpr const char* kVersionNames[] = {"neon"};
#else
enum class Version { kPlain };
constexpr const char* kVersionNames[] = {"plain"};
#endif

// Those that this processor can run, the widest first.
std::vector<Version> runnable_versions();

extern std::atomic<Version> chosen_version;

// The one in use, from the start the widest that can run.
inline Version version() { return chosen_version.load(std::memory_order_relaxed); }

}  // namespace lora_kernels

// Calls a function of the version in use.
#if defined(__x86_64__)
#define LK_DISPATCH(call)  \
  switch (version()) {     \
    case Version::kAvx512: \
      return avx512::call; \
    case Version::kAvx2:   \
      return avx2::call;   \
    default:               \
      return sse2::call;   \
  }
#elif defined(__aarch64__)
#define LK_DISPATCH(call) return neon::call
#else
#define LK_DISPATCH(call) return plain::call
#endif
