// Runs the decode kernels' loops on this machine: every cluster of the grid, one after the other.
#include "../../csrc/cuda/decode_loops.h"
#include "host_cta.h"

namespace {

using namespace lora_kernels;

template <int Rows, typename Element, typename Run>
void run_grid(const DecodeProblem& p, int parts, Run run) {
  const int bytes = shared_layout(p, Rows).bytes;
  for (int z = 0; z < p.projections; ++z) {
    for (int part = 0; part < parts; ++part) {
      HostCluster cluster(bytes);
      std::vector<std::thread> warps;
      warps.reserve(kCluster * (kWarps + 1));
      for (int i = 0; i < kCluster * (kWarps + 1); ++i) {
        warps.emplace_back([&, i] {
          using Block = HostCta<Element>;
          Block cta(p, cluster, i / (kWarps + 1), part, z, i % (kWarps + 1));
          Decode<Rows, Block> decode(cta, p);
          run(decode);
        });
      }
      for (std::thread& warp : warps) warp.join();
    }
  }
}

template <typename Element>
void run_all(const DecodeProblem& p) {
  if (p.weight != nullptr) {
    int widest = 0;
    for (int i = 0; i < p.projections; ++i) widest = std::max(widest, p.projection[i].out_cols);
    run_grid<kLinearRows, Element>(p, ceil_div(widest, p.cluster_cols), [](auto& d) { d.run(); });
  } else if (p.parts == nullptr) {
    run_grid<kTileRows, Element>(p, p.tile_count, [](auto& d) { d.run(); });
  } else {
    run_grid<kTileRows, Element>(p, p.tile_count, [](auto& d) { d.run_shrink(); });
    run_grid<kTileRows, Element>(p, p.tile_count, [](auto& d) { d.run_expand(); });
  }
}

}  // namespace

// With a weight: the kernel that has the base product; with parts: the two launches.
extern "C" void simulate(const DecodeProblem* problem, int brain) {
  if (brain != 0) {
    run_all<Brain>(*problem);
  } else {
    run_all<_Float16>(*problem);
  }
}

extern "C" int64_t part_elements_of(int max_rank) { return part_elements(max_rank); }
extern "C" int shared_bytes_of(int rows, int cols, int max_rank, int adapters, int cluster_cols) {
  return shared_layout(rows, cols, most_blocks(rows, max_rank, adapters), cluster_cols / kPages)
      .bytes;
}
extern "C" int columns_per_cluster_of(int out_cols, int clusters) {
  return columns_per_cluster(out_cols, clusters);
}
