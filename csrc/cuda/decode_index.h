// The decode kernels' problem, and who works on what: integer arithmetic alone, for card and host.
//
// A cluster of kCluster thread blocks serves a few rows of the batch. Each block has a slice of K,
// in which it multiplies the rows by pages of A (and rows of the weight); the sums of the blocks
// are added in order; then each block has a slice of N, for which it reads pages of B. What is read
// comes in steps of up to kPages rows of kColumns columns, each byte once a cluster.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace lora_kernels {

constexpr int kCluster = 8;
// Rows of a cluster: a tile's slots, as `plan_batch` cuts them; all rows, with the base product.
constexpr int kTileRows = 16, kLinearRows = 8;
constexpr int kPages = 16, kColumns = 256, kStages = 4;
// Warps that compute; one more copies.
constexpr int kWarps = 4, kThreads = 32 * (kWarps + 1);
// Sixteen bytes more than a row: eight rows of a matrix then lie in different banks.
constexpr int kPad = 8, kPitch = kColumns + kPad;
constexpr int kMaxRank = 256, kMaxSegments = 8, kMaxProjections = 4;

struct Extent {
  int begin, end;
  LK_HOST_DEVICE int size() const { return end - begin; }
};

LK_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
LK_HOST_DEVICE constexpr int least(int a, int b) { return a < b ? a : b; }

// Part `part` of [0, total): total is a multiple of 16, and so are the bounds.
LK_HOST_DEVICE Extent slice_of(int total, int part, int parts) {
  const int units = total / 16;
  return {units * part / parts * 16, units * (part + 1) / parts * 16};
}

LK_HOST_DEVICE constexpr int widest_slice(int total, int parts) {
  return ceil_div(total / 16, parts) * 16;
}

// The adapters of one projection of x; several projections write side by side into y. `scalings`
// has a factor for each adapter; null is 1.
struct Projection {
  const uint16_t *a, *b;
  int64_t a_stride, b_stride;
  const int32_t *pages, *spans;
  const float* scalings;
  int out_begin, out_cols;
};

struct DecodeProblem {
  const uint16_t* x;
  int64_t x_stride;
  int rows, cols;
  // A factor for each row; null is 1.
  const float* coef;
  const int32_t *order, *offsets, *tiles;
  int adapters, tile_count, max_rank;
  // With the base product, else null; a cluster has this many rows of the weight.
  const uint16_t *weight, *bias;
  int64_t weight_stride;
  int cluster_cols;
  uint16_t* y;
  int64_t y_stride;
  // The delta is added to what y has, and rows without an adapter are left alone; not with a base
  // product.
  bool accumulate;
  Projection projection[kMaxProjections];
  int projections;
  // Where blocks do not share memory, their sums: [projection, tile, kCluster, sums of a block].
  float* parts;
};

// The rows of one adapter among those of a cluster, where its pages are, and its factor.
struct Segment {
  int first_page, rank, first_block;
  uint32_t members;
  float scaling;
};

// Which rows of x a cluster has, and their adapters; a block is up to kPages pages.
struct Assignment {
  int rows, segments, blocks;
  int row[kTileRows];
  float coef[kTileRows];
  Segment segment[kMaxSegments];

  LK_HOST_DEVICE const Segment& of_block(int block) const {
    int s = 0;
    while (s + 1 < segments && block >= segment[s + 1].first_block) ++s;
    return segment[s];
  }
};

// Blocks that the adapters of a cluster can have: one adapter, or one a row.
LK_HOST_DEVICE constexpr int most_blocks(int rows, int max_rank, int adapters) {
  const int each = ceil_div(max_rank, kPages);
  return rows == kTileRows ? each : each * least(rows, adapters);
}

// Shared memory of a thread block, in bytes from its start.
struct SharedLayout {
  int barriers, assignment, x, stages, warp_sums, sums, h, out, bytes;
  // Elements from a row of x, or of h, to the next.
  int x_pitch, h_pitch;
};

LK_HOST_DEVICE constexpr SharedLayout shared_layout(int rows, int cols, int blocks,
                                                    int weight_blocks) {
  SharedLayout at = {};
  at.x_pitch = widest_slice(cols, kCluster) + kPad;
  at.h_pitch = blocks * kPages + kPad;
  at.assignment = 128;
  at.x = at.assignment + (int(sizeof(Assignment)) + 15) / 16 * 16;
  at.stages = at.x + rows * at.x_pitch * 2;
  at.warp_sums = at.stages + kStages * kPages * kPitch * 2;
  at.sums = at.warp_sums + 2 * kWarps * kPages * rows * 4;
  at.h = at.sums + (blocks + weight_blocks) * kPages * rows * 4;
  at.out = at.h + rows * at.h_pitch * 2;
  at.bytes = at.out + kWarps * rows * (kPages + kPad) * 2;
  return at;
}

LK_HOST_DEVICE constexpr SharedLayout shared_layout(const DecodeProblem& p, int rows) {
  return shared_layout(rows, p.cols, most_blocks(rows, p.max_rank, p.adapters),
                       p.weight == nullptr ? 0 : p.cluster_cols / kPages);
}

// The steps of a thread block in the order in which they are copied and used: each row block
// (pages of A, then rows of the weight) over its columns of K, then each chunk of its columns of N
// over the pages of B.
struct Schedule {
  int blocks, weight_blocks;
  Extent k, n;

  LK_HOST_DEVICE int row_blocks() const { return blocks + weight_blocks; }
  LK_HOST_DEVICE int k_chunks() const { return ceil_div(k.size(), kColumns); }
  LK_HOST_DEVICE int n_chunks() const { return ceil_div(n.size(), kColumns); }
  LK_HOST_DEVICE int shrink_steps() const { return row_blocks() * k_chunks(); }
  LK_HOST_DEVICE int steps() const { return shrink_steps() + n_chunks() * blocks; }
  LK_HOST_DEVICE static Extent chunk(Extent all, int i) {
    const int begin = all.begin + i * kColumns;
    return {begin, least(begin + kColumns, all.end)};
  }
};

// The rows of the weight that cluster `part` of a projection has.
LK_HOST_DEVICE Extent cluster_columns(int out_cols, int cluster_cols, int part) {
  return {part * cluster_cols, least((part + 1) * cluster_cols, out_cols)};
}

// Rows of the weight a cluster, so that about `clusters` of them share a projection.
LK_HOST_DEVICE int columns_per_cluster(int out_cols, int clusters) {
  const int cols = ceil_div(out_cols / 16, clusters < 1 ? 1 : clusters) * 16;
  return least(cols, 1024);
}

// Bytes of the sums of one tile where blocks do not share memory.
LK_HOST_DEVICE constexpr int64_t part_elements(int max_rank) {
  return int64_t(kCluster) * ceil_div(max_rank, kPages) * kPages * kTileRows;
}

}  // namespace lora_kernels
