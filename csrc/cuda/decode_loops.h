// The decode kernels' loops, in plain C++: a Cta is a thread block of the card (cta.cuh) or of the
// tests' simulation, seen by one of its warps.
//
// Matrices are multiplied as pages by rows: sixteen pages (or rows of the weight, or columns of B)
// by eight rows of x a product, whatever the batch is, so that a row's sums have one order.
#pragma once

#include "decode_index.h"

namespace lora_kernels {

template <int Rows, typename Cta>
struct Decode {
  static constexpr bool kBase = Rows == kLinearRows;
  static constexpr int kRowTiles = Rows / 8;
  // Sixteen columns each, of the kColumns of a step, for a warp.
  static constexpr int kTiles = kColumns / 16 / kWarps;
  using Words = typename Cta::template Registers<uint32_t, 4>;
  using Sums = typename Cta::template Registers<float, 4>;

  Cta& cta;
  const DecodeProblem& p;
  const Projection& projection;
  SharedLayout at;
  Schedule todo;
  // The cluster's columns of N.
  Extent columns;

  LK_HOST_DEVICE Decode(Cta& cta, const DecodeProblem& p)
      : cta(cta),
        p(p),
        projection(p.projection[cta.projection()]),
        at(shared_layout(p, Rows)),
        columns(kBase ? cluster_columns(projection.out_cols, p.cluster_cols, cta.part())
                      : Extent{0, projection.out_cols}) {}

  template <typename T>
  LK_HOST_DEVICE T* shared(int offset) const {
    return reinterpret_cast<T*>(cta.shared() + offset);
  }
  LK_HOST_DEVICE const Assignment& mine() const { return *shared<Assignment>(at.assignment); }
  LK_HOST_DEVICE uint16_t* stage(int step) const {
    return shared<uint16_t>(at.stages) + step % kStages * kPages * kPitch;
  }

  // Segment s is adapter `adapter`'s, if that exists and has a rank.
  LK_HOST_DEVICE bool assign_segment(Assignment* to, int s, int adapter, uint32_t members) const {
    const bool known = adapter >= 0 && adapter < p.adapters;
    const int rank = known ? projection.spans[2 * adapter + 1] : 0;
    if (rank == 0) return false;
    const float scaling = projection.scalings == nullptr ? 1.0f : projection.scalings[adapter];
    to->segment[s] = {projection.spans[2 * adapter], rank, to->blocks, members, scaling};
    to->blocks += ceil_div(rank, kPages);
    return true;
  }

  LK_HOST_DEVICE float coef_of(int row) const { return p.coef == nullptr ? 1.0f : p.coef[row]; }

  // The slots of one tile, sorted by adapter.
  LK_HOST_DEVICE void assign_tile(Assignment* to) const {
    const int adapter = p.tiles[2 * cta.part()], first = p.tiles[2 * cta.part() + 1];
    const int rows = least(p.offsets[adapter + 1] - first, kTileRows);
    cta.lanes([&](int lane) {
      if (lane < rows) {
        to->row[lane] = p.order[first + lane];
        to->coef[lane] = coef_of(to->row[lane]);
      }
      if (lane == 31) {
        to->rows = rows, to->blocks = 0;
        to->segments = assign_segment(to, 0, adapter, (1u << rows) - 1) ? 1 : 0;
      }
    });
  }

  // All rows of the batch, and the adapters that they use.
  LK_HOST_DEVICE void assign_all(Assignment* to) const {
    cta.lanes([&](int lane) {
      if (lane < p.rows) {
        to->row[lane] = lane;
        to->coef[lane] = coef_of(lane);
      }
      if (lane != 31) return;
      to->rows = p.rows, to->blocks = 0, to->segments = 0;
      for (int t = 0; t < p.tile_count; ++t) {
        const int adapter = p.tiles[2 * t];
        if (adapter < 0 || adapter >= p.adapters) continue;
        uint32_t members = 0;
        for (int i = p.tiles[2 * t + 1]; i < p.offsets[adapter + 1]; ++i) {
          members |= 1u << p.order[i];
        }
        if (assign_segment(to, to->segments, adapter, members)) ++to->segments;
      }
    });
  }

  // False where the cluster has nothing to do.
  LK_HOST_DEVICE bool begin() {
    if (!kBase && p.tiles[2 * cta.part()] < 0) return false;
    if (cta.warp() == 0) {
      auto* to = shared<Assignment>(at.assignment);
      if (kBase) {
        assign_all(to);
      } else {
        assign_tile(to);
      }
    }
    cta.prepare(shared<uint64_t>(at.barriers));
    Extent n = slice_of(columns.size(), cta.rank(), kCluster);
    n = {columns.begin + n.begin, columns.begin + n.end};
    todo = {mine().blocks, kBase ? columns.size() / kPages : 0,
            slice_of(p.cols, cta.rank(), kCluster), n};
    return kBase || !p.accumulate || todo.blocks > 0;
  }

  // Row i of a row block: a page of A, or a row of the weight.
  LK_HOST_DEVICE const uint16_t* row_of_block(int block, int i) const {
    if (kBase && block >= todo.blocks) {
      const int64_t row = projection.out_begin + columns.begin + (block - todo.blocks) * kPages + i;
      return p.weight + row * p.weight_stride;
    }
    return projection.a + page(block, i) * projection.a_stride;
  }
  LK_HOST_DEVICE int64_t page(int block, int i) const {
    const Segment& segment = mine().of_block(block);
    const int first = (block - segment.first_block) * kPages;
    return projection.pages[segment.first_page + first + i];
  }
  LK_HOST_DEVICE int rows_of_block(int block) const {
    if (kBase && block >= todo.blocks) return kPages;
    const Segment& segment = mine().of_block(block);
    return least(segment.rank - (block - segment.first_block) * kPages, kPages);
  }

  // What the copying warp does: x, and steps [first, last).
  LK_HOST_DEVICE void copy_x() const {
    const Assignment& who = mine();
    cta.copy_rows(
        shared<uint16_t>(at.x), at.x_pitch, who.rows, todo.k.size(),
        [&](int i) { return p.x + who.row[i] * p.x_stride + todo.k.begin; }, 2 * kStages);
  }
  LK_HOST_DEVICE void copy_steps(int first, int last) const {
    for (int i = first; i < last; ++i) {
      const int round = (i - first) / kStages;
      if (round > 0) cta.wait(kStages + i % kStages, (round - 1) & 1);
      if (i < todo.shrink_steps()) {
        const int block = i / todo.k_chunks();
        const Extent cols = todo.chunk(todo.k, i % todo.k_chunks());
        cta.copy_rows(
            stage(i), kPitch, rows_of_block(block), cols.size(),
            [&](int row) { return row_of_block(block, row) + cols.begin; }, i % kStages);
      } else {
        const int block = (i - todo.shrink_steps()) % todo.blocks;
        const Extent cols = todo.chunk(todo.n, (i - todo.shrink_steps()) / todo.blocks);
        cta.copy_rows(
            stage(i), kPitch, rows_of_block(block), cols.size(),
            [&](int row) {
              return projection.b + page(block, row) * projection.b_stride + cols.begin;
            },
            i % kStages);
      }
    }
  }

  // Sixteen elements of each row of x, or of h, from column k on.
  LK_HOST_DEVICE void load_rows(Words& to, const uint16_t* from, int pitch, int k) const {
    cta.load_matrices(to, [&](int lane) {
      const int row = kRowTiles == 2 ? lane / 16 * 8 + lane % 8 : lane % 8;
      return from + row * pitch + k + lane / 8 % 2 * 8;
    });
  }

  // Sixteen pages by the rows of x, over a warp's share of a step's columns.
  LK_HOST_DEVICE void multiply(Sums (&sums)[kRowTiles], const uint16_t* pages, int k,
                               int cols) const {
    for (int c = 16 * cta.warp(); c < cols; c += 16 * kWarps) {
      Words a, b;
      cta.load_matrices(a,
                        [&](int lane) { return pages + lane % 16 * kPitch + c + lane / 16 * 8; });
      load_rows(b, shared<uint16_t>(at.x), at.x_pitch, k + c);
      LK_UNROLL
      for (int t = 0; t < kRowTiles; ++t) cta.multiply(sums[t], a, b, 2 * t);
    }
  }

  // Each row block's sums over this thread block's slice of K: the warps', added in order.
  //
  LK_HOST_DEVICE void shrink() const {
    cta.wait(2 * kStages, 0);
    for (int block = 0; block < todo.row_blocks(); ++block) {
      Sums sums[kRowTiles];
      zero(sums);
      for (int chunk = 0; chunk < todo.k_chunks(); ++chunk) {
        const int step = block * todo.k_chunks() + chunk;
        cta.wait(step % kStages, step / kStages & 1);
        multiply(sums, stage(step), chunk * kColumns, todo.chunk(todo.k, chunk).size());
        cta.release(kStages + step % kStages);
      }
      add_warps(sums, block);
    }
  }
  template <int Count>
  LK_HOST_DEVICE void zero(Sums (&sums)[Count]) const {
    cta.lanes([&](int lane) {
      LK_UNROLL
      for (int t = 0; t < Count; ++t) {
        LK_UNROLL
        for (int i = 0; i < 4; ++i) sums[t](lane, i) = 0.0f;
      }
    });
  }
  // Where register i of a lane lies in a product of sixteen by eight.
  LK_HOST_DEVICE static int page_of(int lane, int i) { return lane / 4 + i / 2 * 8; }
  LK_HOST_DEVICE static int row_of(int lane, int i) { return lane % 4 * 2 + i % 2; }

  LK_HOST_DEVICE void add_warps(Sums (&sums)[kRowTiles], int block) const {
    constexpr int kSize = kPages * Rows;
    // Two in turn: a warp that is ahead writes the other one.
    float* parts = shared<float>(at.warp_sums) + block % 2 * kWarps * kSize;
    cta.lanes([&](int lane) {
      LK_UNROLL
      for (int t = 0; t < kRowTiles; ++t) {
        LK_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int place = page_of(lane, i) * Rows + t * 8 + row_of(lane, i);
          parts[cta.warp() * kSize + place] = sums[t](lane, i);
        }
      }
    });
    cta.sync_compute();
    float* to = shared<float>(at.sums) + block * kSize;
    cta.lanes([&](int lane) {
      for (int i = 32 * cta.warp() + lane; i < kSize; i += 32 * kWarps) {
        float total = parts[i];
        LK_UNROLL
        for (int w = 1; w < kWarps; ++w) total += parts[w * kSize + i];
        to[i] = total;
      }
    });
  }

  // Element i of the sums, over the whole of K: the thread blocks', added in order.
  LK_HOST_DEVICE float whole_sum(int i) const {
    float total = cta.peer_sum(shared<float>(at.sums) + i, i, 0);
    for (int c = 1; c < kCluster; ++c) {
      total += cta.peer_sum(shared<float>(at.sums) + i, i, c);
    }
    return total;
  }

  // coef h in the rows' own type; zero where a row has no such page.
  LK_HOST_DEVICE void gather_h() const {
    const Assignment& who = mine();
    auto* h = shared<uint16_t>(at.h);
    cta.lanes([&](int lane) {
      for (int i = 32 * cta.warp() + lane; i < todo.blocks * kPages * Rows; i += 32 * kWarps) {
        const int column = i / Rows, row = i % Rows;
        const Segment& segment = who.of_block(column / kPages);
        const bool live = column - segment.first_block * kPages < segment.rank &&
                          (segment.members >> row & 1) != 0;
        const float coef = segment.scaling * who.coef[row];
        h[row * at.h_pitch + column] = live ? cta.narrow(coef * whole_sum(i)) : 0;
      }
    });
    cta.sync_compute();
  }

  // The rows' sums over the pages of B, for this thread block's slice of N. `first` is the step at
  // which this launch began.
  LK_HOST_DEVICE void expand(int first) const {
    int step = todo.shrink_steps();
    for (int chunk = 0; chunk < todo.n_chunks(); ++chunk) {
      const Extent cols = todo.chunk(todo.n, chunk);
      Sums total[kTiles * kRowTiles], sums[kTiles * kRowTiles];
      zero(total);
      zero(sums);
      if (kBase) load_base(total, cols);
      if (!kBase && p.accumulate) load_y(total, cols);
      for (int block = 0; block < todo.blocks; ++block, ++step) {
        const int place = step - first;
        cta.wait(step % kStages, place / kStages & 1);
        multiply_transposed(sums, stage(step), block, cols.size());
        cta.release(kStages + step % kStages);
        const Segment& segment = mine().of_block(block);
        if ((block + 1 - segment.first_block) * kPages >= segment.rank) {
          fold(total, sums, segment.members);
        }
      }
      store(total, cols);
    }
  }

  // The columns of a step that are tile t of a warp: sixteen, from here on.
  LK_HOST_DEVICE int tile_column(int t) const { return 16 * (cta.warp() + kWarps * t); }

  LK_HOST_DEVICE void load_base(Sums (&total)[kTiles * kRowTiles], Extent cols) const {
    LK_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      if (tile_column(t) >= cols.size()) break;
      const int block = todo.blocks + (cols.begin + tile_column(t) - columns.begin) / kPages;
      cta.lanes([&](int lane) {
        LK_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int place = (block * kPages + page_of(lane, i)) * Rows + row_of(lane, i);
          const int col = projection.out_begin + cols.begin + tile_column(t) + page_of(lane, i);
          const float bias = p.bias == nullptr ? 0.0f : cta.widen(p.bias[col]);
          total[t](lane, i) = whole_sum(place) + bias;
        }
      });
    }
  }

  // What the delta is added to, before its pages have come: the sums are rounded once.
  LK_HOST_DEVICE void load_y(Sums (&total)[kTiles * kRowTiles], Extent cols) const {
    const Assignment& who = mine();
    LK_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      if (tile_column(t) >= cols.size()) break;
      const int begin = projection.out_begin + cols.begin + tile_column(t);
      cta.lanes([&](int lane) {
        LK_UNROLL
        for (int r = 0; r < kRowTiles; ++r) {
          LK_UNROLL
          for (int i = 0; i < 4; ++i) {
            const int row = r * 8 + row_of(lane, i);
            if (row >= who.rows) continue;
            const uint16_t* line = p.y + who.row[row] * p.y_stride + begin;
            total[t * kRowTiles + r](lane, i) = cta.widen(line[page_of(lane, i)]);
          }
        }
      });
    }
  }

  LK_HOST_DEVICE void multiply_transposed(Sums (&sums)[kTiles * kRowTiles], const uint16_t* pages,
                                          int block, int cols) const {
    const int live = rows_of_block(block);
    Words h;
    load_rows(h, shared<uint16_t>(at.h), at.h_pitch, block * kPages);
    LK_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      if (tile_column(t) >= cols) break;
      Words b;
      cta.load_transposed(b, [&](int lane) {
        return pages + (lane / 16 * 8 + lane % 8) * kPitch + tile_column(t) + lane / 8 % 2 * 8;
      });
      keep_pages(b, live);
      LK_UNROLL
      for (int r = 0; r < kRowTiles; ++r) cta.multiply(sums[t * kRowTiles + r], b, h, 2 * r);
    }
  }
  // Zero for what lies behind the last page of a rank: that memory was not written.
  LK_HOST_DEVICE void keep_pages(Words& b, int live) const {
    if (live == kPages) return;
    cta.lanes([&](int lane) {
      LK_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int behind = live - (lane % 4 * 2 + i / 2 * 8);
        b(lane, i) &= behind >= 2 ? 0xFFFFFFFFu : behind == 1 ? 0xFFFFu : 0u;
      }
    });
  }

  // Adds what a segment's pages gave to its own rows, and to no other's, whatever it is.
  LK_HOST_DEVICE void fold(Sums (&total)[kTiles * kRowTiles], Sums (&sums)[kTiles * kRowTiles],
                           uint32_t members) const {
    cta.lanes([&](int lane) {
      LK_UNROLL
      for (int t = 0; t < kTiles * kRowTiles; ++t) {
        LK_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = t % kRowTiles * 8 + row_of(lane, i);
          if ((members >> row & 1) != 0) total[t](lane, i) += sums[t](lane, i);
          sums[t](lane, i) = 0.0f;
        }
      }
    });
  }

  // Through a little shared memory, so that sixteen bytes a lane are written.
  LK_HOST_DEVICE void store(Sums (&total)[kTiles * kRowTiles], Extent cols) const {
    constexpr int kOut = kPages + kPad;
    auto* line = shared<uint16_t>(at.out) + cta.warp() * Rows * kOut;
    const Assignment& who = mine();
    LK_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      if (tile_column(t) >= cols.size()) break;
      cta.lanes([&](int lane) {
        LK_UNROLL
        for (int r = 0; r < kRowTiles; ++r) {
          LK_UNROLL
          for (int i = 0; i < 4; ++i) {
            const float value = total[t * kRowTiles + r](lane, i);
            line[(r * 8 + row_of(lane, i)) * kOut + page_of(lane, i)] = cta.narrow(value);
          }
        }
      });
      cta.sync_warp();
      cta.lanes([&](int lane) {
        const int row = lane / 2, half = lane % 2 * 8;
        if (row >= who.rows) return;
        const int64_t col = projection.out_begin + cols.begin + tile_column(t) + half;
        cta.store_eight(p.y + who.row[row] * p.y_stride + col, line + row * kOut + half);
      });
      cta.sync_warp();
    }
  }

  // One launch: both products, with an exchange of the sums between them.
  LK_HOST_DEVICE void run() {
    if (!begin()) return;
    if (cta.warp() == kWarps) {
      // Says first that it is there: the others wait for each other before they read all steps.
      cta.cluster_arrive();
      copy_x();
      copy_steps(0, todo.steps());
      cta.cluster_wait();
      cta.cluster_arrive();
    } else {
      shrink();
      cta.cluster_arrive();
      cta.cluster_wait();
      gather_h();
      expand(0);
      cta.cluster_arrive();
    }
    // A block's memory is there until its peers have read it.
    cta.cluster_wait();
  }

  // Two launches, where thread blocks do not share memory.
  LK_HOST_DEVICE void run_shrink() {
    if (!begin()) return;
    if (cta.warp() == kWarps) {
      copy_x();
      copy_steps(0, todo.shrink_steps());
      cta.finish_copies();
      return;
    }
    shrink();
    cta.sync_compute();
    cta.lanes([&](int lane) {
      const int size = todo.blocks * kPages * Rows;
      for (int i = 32 * cta.warp() + lane; i < size; i += 32 * kWarps) {
        cta.publish_sum(i, shared<float>(at.sums)[i]);
      }
    });
  }
  LK_HOST_DEVICE void run_expand() {
    if (!begin()) return;
    if (cta.warp() == kWarps) {
      copy_steps(todo.shrink_steps(), todo.steps());
      cta.finish_copies();
      return;
    }
    gather_h();
    expand(todo.shrink_steps());
  }
};

}  // namespace lora_kernels
