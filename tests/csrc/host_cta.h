// A thread block of threads of this machine, as decode_loops.h sees it: a warp a thread, its 32
// lanes one after the other. Barriers wait, copies are late by nothing, and products and matrix
// loads go through the register layouts that PTX documents for mma.m16n8k16 and ldmatrix.
#pragma once

#include <barrier>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <type_traits>
#include <vector>

#include "../../csrc/common/storage.h"
#include "../../csrc/cuda/decode_index.h"

namespace lora_kernels {

// An mbarrier: a phase ends when all have arrived and all bytes that were announced have come.
class PhaseBarrier {
 public:
  void init(int arrivals) { expected_ = pending_ = arrivals; }
  void arrive(int64_t bytes = 0) {
    const std::lock_guard lock(mutex_);
    bytes_ += bytes;
    --pending_;
    end_phase();
  }
  void came(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    bytes_ -= bytes;
    end_phase();
  }
  void wait(int parity) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return (phase_ & 1) != parity; });
  }

 private:
  void end_phase() {
    if (pending_ != 0 || bytes_ != 0) return;
    ++phase_;
    pending_ = expected_;
    changed_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  int expected_ = 0, pending_ = 0, phase_ = 0;
  int64_t bytes_ = 0;
};

struct HostBlock {
  // 0xFF: a NaN in every type, so that what nobody wrote shows.
  explicit HostBlock(int bytes) : lines(bytes / 64 + 2) {
    std::memset(lines.data(), 0xFF, lines.size() * 64);
    for (int i = 0; i < 2 * kStages + 1; ++i) {
      phases[i].init(i >= kStages && i < 2 * kStages ? kWarps : 1);
    }
  }
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> lines;
  PhaseBarrier phases[2 * kStages + 1];
  std::barrier<> all{kWarps + 1}, compute{kWarps};
  char* memory() { return lines.front().bytes; }
};

struct HostCluster {
  explicit HostCluster(int bytes) {
    for (int i = 0; i < kCluster; ++i) blocks.push_back(std::make_unique<HostBlock>(bytes));
  }
  std::vector<std::unique_ptr<HostBlock>> blocks;
  std::barrier<> all{kCluster * (kWarps + 1)};
};

template <typename Element>
class HostCta {
 public:
  template <typename T, int Count>
  struct Registers {
    T value[32][Count];
    T& operator()(int lane, int i) { return value[lane][i]; }
  };

  HostCta(const DecodeProblem& p, HostCluster& cluster, int rank, int part, int projection,
          int warp)
      : p_(p),
        cluster_(cluster),
        block_(*cluster.blocks[rank]),
        rank_(rank),
        part_(part),
        projection_(projection),
        warp_(warp) {}

  char* shared() const { return block_.memory(); }
  int rank() const { return rank_; }
  int part() const { return part_; }
  int projection() const { return projection_; }
  int warp() const { return warp_; }
  template <typename Run>
  void lanes(Run run) const {
    for (int lane = 0; lane < 32; ++lane) run(lane);
  }

  void prepare(uint64_t*) { block_.all.arrive_and_wait(); }
  void wait(int barrier, int parity) const { block_.phases[barrier].wait(parity); }
  void release(int barrier) const { block_.phases[barrier].arrive(); }
  void sync_warp() const {}
  void finish_copies() const {}
  void sync_compute() const { block_.compute.arrive_and_wait(); }
  void cluster_arrive() { token_.emplace(cluster_.all.arrive()); }
  void cluster_wait() {
    if (!token_.has_value()) std::abort();
    cluster_.all.wait(std::move(*token_));
    token_.reset();
  }

  template <typename Source>
  void copy_rows(uint16_t* to, int pitch, int rows, int cols, Source source, int barrier) const {
    block_.phases[barrier].arrive(int64_t(rows) * cols * 2);
    for (int i = 0; i < rows && cols > 0; ++i) {
      const uint16_t* from = source(i);
      if (reinterpret_cast<uintptr_t>(from) % 16 != 0) std::abort();
      std::memcpy(to + i * pitch, from, cols * 2);
      block_.phases[barrier].came(cols * 2);
    }
  }

  template <typename Address>
  void load_matrices(Registers<uint32_t, 4>& to, Address address) const {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const uint16_t* row = address(8 * i + lane / 4) + lane % 4 * 2;
        to(lane, i) = row[0] | uint32_t(row[1]) << 16;
      }
    }
  }
  template <typename Address>
  void load_transposed(Registers<uint32_t, 4>& to, Address address) const {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const uint16_t first = address(8 * i + lane % 4 * 2)[lane / 4];
        const uint16_t second = address(8 * i + lane % 4 * 2 + 1)[lane / 4];
        to(lane, i) = first | uint32_t(second) << 16;
      }
    }
  }
  void multiply(Registers<float, 4>& c, Registers<uint32_t, 4>& a, Registers<uint32_t, 4>& b,
                int first) const {
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 8; ++n) {
        float& sum = c(m % 8 * 4 + n / 2, m / 8 * 2 + n % 2);
        for (int k = 0; k < 16; ++k) {
          const uint32_t left = a(m % 8 * 4 + k % 8 / 2, m / 8 + k / 8 * 2);
          const uint32_t right = b(n * 4 + k % 8 / 2, first + k / 8);
          sum += widen(uint16_t(left >> k % 2 * 16)) * widen(uint16_t(right >> k % 2 * 16));
        }
      }
    }
  }

  uint16_t narrow(float value) const {
    Element stored;
    lora_kernels::narrow(&stored, value);
    uint16_t bits;
    std::memcpy(&bits, &stored, 2);
    return bits;
  }
  float widen(uint16_t bits) const {
    Element stored;
    std::memcpy(&stored, &bits, 2);
    return lora_kernels::widen(stored);
  }
  void store_eight(uint16_t* to, const uint16_t* from) const { std::memcpy(to, from, 16); }

  int64_t part_place(int i, int rank) const {
    const int64_t tile = int64_t(projection_) * p_.tile_count + part_;
    return (tile * kCluster + rank) * (part_elements(p_.max_rank) / kCluster) + i;
  }
  void publish_sum(int i, float sum) const { p_.parts[part_place(i, rank_)] = sum; }
  float peer_sum(const float* own, int i, int rank) const {
    if (p_.parts != nullptr) return p_.parts[part_place(i, rank)];
    const auto* base = reinterpret_cast<const float*>(shared());
    return reinterpret_cast<const float*>(cluster_.blocks[rank]->memory())[own - base];
  }

 private:
  const DecodeProblem& p_;
  HostCluster& cluster_;
  HostBlock& block_;
  int rank_, part_, projection_, warp_;
  std::optional<std::barrier<>::arrival_token> token_;
};

}  // namespace lora_kernels
