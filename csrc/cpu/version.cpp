#include "version.h"

namespace lora_kernels {

std::vector<Version> runnable_versions() {
#if defined(__x86_64__)
  std::vector<Version> versions;
  // Every processor with AVX2 and FMA converts half precision as well.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512) versions.push_back(Version::kAvx512);
  if (avx2) versions.push_back(Version::kAvx2);
  versions.push_back(Version::kSse2);
  return versions;
#else
  return {Version{}};
#endif
}

std::atomic<Version> chosen_version{runnable_versions().front()};

}  // namespace lora_kernels
