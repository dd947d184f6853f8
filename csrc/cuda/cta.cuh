// A thread block as decode_loops.h sees it: the card's instructions by name.
#pragma once

#include "decode_index.h"

namespace lora_kernels {

struct Half {};
struct Brain16 {};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// What any card from compute capability 8.0 on has.
template <typename Element>
struct Cta {
  static constexpr bool kBrain = sizeof(Element) && __is_same(Element, Brain16);

  template <typename T, int Count>
  struct Registers {
    T value[Count];
    __device__ __forceinline__ T& operator()(int, int i) { return value[i]; }
  };

  const DecodeProblem& p;
  char* memory;
  uint64_t* barriers;

  __device__ __forceinline__ Cta(const DecodeProblem& p, char* memory)
      : p(p), memory(memory), barriers(nullptr) {}

  __device__ __forceinline__ char* shared() const { return memory; }
  __device__ __forceinline__ int rank() const { return blockIdx.x; }
  __device__ __forceinline__ int part() const { return blockIdx.y; }
  __device__ __forceinline__ int projection() const { return blockIdx.z; }
  // The same in all lanes, which the compiler cannot know of threadIdx.
  __device__ __forceinline__ int warp() const {
    return __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);
  }
  template <typename Run>
  __device__ __forceinline__ void lanes(Run run) const {
    run(static_cast<int>(threadIdx.x % 32));
  }

  __device__ __forceinline__ void init_barriers(uint64_t* at, int copiers) {
    barriers = at;
    if (threadIdx.x != 0) return;
    for (int i = 0; i <= 2 * kStages; ++i) {
      const int arrivals = i >= kStages && i < 2 * kStages ? kWarps : copiers;
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(at + i)), "r"(arrivals)
                   : "memory");
    }
  }
  // Tells the copying warp that this warp has read a stage.
  __device__ __forceinline__ void release(int barrier) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(
                       shared_address(barriers + barrier))
                   : "memory");
    }
  }
  __device__ __forceinline__ void sync_warp() const { __syncwarp(); }
  __device__ __forceinline__ void sync_compute() const {
    __syncwarp();
    asm volatile("bar.sync 1, %0;" ::"n"(32 * kWarps) : "memory");
  }

  template <typename Address>
  __device__ __forceinline__ void load_matrices(Registers<uint32_t, 4>& to, Address address) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.value[0]), "=r"(to.value[1]), "=r"(to.value[2]), "=r"(to.value[3])
                 : "r"(shared_address(address(static_cast<int>(threadIdx.x % 32))))
                 : "memory");
  }
  template <typename Address>
  __device__ __forceinline__ void load_transposed(Registers<uint32_t, 4>& to,
                                                  Address address) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.value[0]), "=r"(to.value[1]), "=r"(to.value[2]), "=r"(to.value[3])
                 : "r"(shared_address(address(static_cast<int>(threadIdx.x % 32))))
                 : "memory");
  }

#define LK_MMA(TYPE)                                                                    \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                   \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"   \
               : "+f"(c.value[0]), "+f"(c.value[1]), "+f"(c.value[2]), "+f"(c.value[3]) \
               : "r"(a.value[0]), "r"(a.value[1]), "r"(a.value[2]), "r"(a.value[3]),    \
                 "r"(b.value[first]), "r"(b.value[first + 1]))
  __device__ __forceinline__ void multiply(Registers<float, 4>& c, const Registers<uint32_t, 4>& a,
                                           const Registers<uint32_t, 4>& b, int first) const {
    if constexpr (kBrain) {
      LK_MMA("bf16");
    } else {
      LK_MMA("f16");
    }
  }
#undef LK_MMA

  __device__ __forceinline__ uint16_t narrow(float value) const {
    uint16_t bits;
    if constexpr (kBrain) {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    } else {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    }
    return bits;
  }
  __device__ __forceinline__ float widen(uint16_t bits) const {
    float value;
    if constexpr (kBrain) {
      value = __uint_as_float(static_cast<uint32_t>(bits) << 16);
    } else {
      asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    }
    return value;
  }
  __device__ __forceinline__ void store_eight(uint16_t* to, const uint16_t* from) const {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  }
};

// Blocks of one launch that cannot see each other: their sums go through memory.
template <typename Element>
struct PlainCta : Cta<Element> {
  using Cta<Element>::Cta;

  __device__ __forceinline__ void prepare(uint64_t* at) {
    this->init_barriers(at, 32);
    __syncthreads();
  }
  __device__ __forceinline__ void wait(int barrier, int parity) const {
    uint32_t done;
    do {
      asm volatile(
          "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; "
          "}"
          : "=r"(done)
          : "r"(shared_address(this->barriers + barrier)), "r"(parity)
          : "memory");
    } while (done == 0);
    __syncwarp();
  }
  template <typename Source>
  __device__ __forceinline__ void copy_rows(uint16_t* to, int pitch, int rows, int cols,
                                            Source source, int barrier) const {
    const int pieces = cols / 8;
    for (int i = threadIdx.x % 32; i < rows * pieces; i += 32) {
      const int row = i / pieces, k = i % pieces * 8;
      asm volatile(
          "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to + row * pitch + k)),
          "l"(__cvta_generic_to_global(source(row) + k))
          : "memory");
    }
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(
                     shared_address(this->barriers + barrier))
                 : "memory");
  }
  // No thread leaves before what it asked for has come.
  __device__ __forceinline__ void finish_copies() const {
    asm volatile("cp.async.wait_all;" ::: "memory");
  }
  __device__ __forceinline__ int64_t part_place(int i, int rank) const {
    const int64_t tile = int64_t(this->projection()) * gridDim.y + this->part();
    return (tile * kCluster + rank) * (part_elements(this->p.max_rank) / kCluster) + i;
  }
  __device__ __forceinline__ void publish_sum(int i, float sum) const {
    this->p.parts[part_place(i, this->rank())] = sum;
  }
  __device__ __forceinline__ float peer_sum(const float*, int i, int rank) const {
    return this->p.parts[part_place(i, rank)];
  }
};

// Blocks of one cluster: bulk copies in, distributed shared memory between them.
template <typename Element>
struct ClusterCta : Cta<Element> {
  using Cta<Element>::Cta;

  __device__ __forceinline__ void prepare(uint64_t* at) {
    this->init_barriers(at, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();
  }
  __device__ __forceinline__ void wait(int barrier, int parity) const {
    uint32_t done;
    do {
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
          : "=r"(done)
          : "r"(shared_address(this->barriers + barrier)), "r"(parity)
          : "memory");
    } while (done == 0);
    __syncwarp();
  }
  template <typename Source>
  __device__ __forceinline__ void copy_rows(uint16_t* to, int pitch, int rows, int cols,
                                            Source source, int barrier) const {
    const int lane = threadIdx.x % 32;
    const uint32_t at = shared_address(this->barriers + barrier), bytes = cols * 2;
    if (lane == 0) {
      asm volatile(
          "{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(at),
          "r"(rows * bytes)
          : "memory");
    }
    __syncwarp();
    if (lane < rows && cols > 0) {
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
          "[%3];" ::"r"(shared_address(to + lane * pitch)),
          "l"(__cvta_generic_to_global(source(lane))), "r"(bytes), "r"(at)
          : "memory");
    }
  }
  __device__ __forceinline__ void finish_copies() const {}
  __device__ __forceinline__ void cluster_arrive() const {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  }
  __device__ __forceinline__ void cluster_wait() const {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
  __device__ __forceinline__ float peer_sum(const float* own, int, int rank) const {
    uint32_t address;
    float sum;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(address)
                 : "r"(shared_address(own)), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(sum) : "r"(address) : "memory");
    return sum;
  }
};

}  // namespace lora_kernels
