// Tiles of tokens go through the whole chain in the cache of their core (gate_pass.h). The gates'
// gradients are summed for chunks of tokens, whose number depends on the shape alone, and added up.
#include "gate_chain.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "gate_pass.h"
#include "kept_memory.h"
#include "math_type.h"
#include "tensors.h"

namespace lora_kernels {
namespace {

using at::Tensor;

// Chunks of tokens with sums of their own.
constexpr int64_t kChunks = 16;

// A gate, its transpose, and where it finds its columns in a tile.
template <typename Math>
struct Step {
  int64_t size;
  std::vector<int64_t> offsets, bases;
  std::vector<Math> packed, transposed;

  GatePlaces places() const {
    return {offsets.data(), bases.data(), size, static_cast<int64_t>(bases.size())};
  }
};

template <typename Math>
std::vector<Math> packed(const Tensor& gate) {
  const int64_t size = gate.size(0), panels = (size + kGateRows - 1) / kGateRows;
  std::vector<Math> out(panels * size * kGateRows);
  const auto rows = gate.accessor<Math, 2>();
  for (int64_t n = 0; n < size; ++n) {
    Math* panel = out.data() + n / kGateRows * size * kGateRows + n % kGateRows;
    for (int64_t k = 0; k < size; ++k) panel[k * kGateRows] = rows[n][k];
  }
  return out;
}

// The gate on axes j < i.
template <typename Math>
Step<Math> step_of(const Tensor& given, at::IntArrayRef dims, size_t i, size_t j) {
  const auto span = [&](size_t from, size_t to) {
    return std::accumulate(dims.begin() + from, dims.begin() + to, kTokens, std::multiplies<>());
  };
  const Tensor gate = given.to(c10::CppTypeToScalarType<Math>::value);
  const int64_t behind = span(i + 1, dims.size()), whole = span(j + 1, dims.size());
  Step<Math> step{gate.size(0), {}, {}, packed<Math>(gate), packed<Math>(gate.t())};
  for (int64_t a = 0; a < dims[j]; ++a) {
    for (int64_t b = 0; b < dims[i]; ++b) step.offsets.push_back(a * whole + b * behind);
  }
  for (int64_t before = 0; before < span(0, dims.size()); before += whole * dims[j]) {
    for (int64_t between = 0; between < whole; between += behind * dims[i]) {
      for (int64_t rest = 0; rest < behind; rest += kTokens) {
        step.bases.push_back(before + between + rest);
      }
    }
  }
  return step;
}

template <typename Math>
struct Chain {
  // Places of a token, and the rows of a tile.
  int64_t token = 1, places;
  std::vector<Step<Math>> steps;

  Chain(at::TensorList gates, at::IntArrayRef dims) {
    for (const int64_t size : dims) token *= size;
    places = (token + kLanes - 1) / kLanes * kLanes;
    auto gate = gates.begin();
    for (size_t i = dims.size(); i-- > 0;) {
      for (size_t j = i; j-- > 0;) steps.push_back(step_of<Math>(*gate++, dims, i, j));
    }
  }

  int64_t tile() const { return places * kTokens; }
  int64_t scratch() const { return places * (kLanes + 1); }
};

// Of all passes, which are never under way at once on one thread.
template <typename Math>
Math* kept(int64_t elements) {
  thread_local KeptMemory<Math> memory;
  return memory.room(elements);
}

int64_t tiles_of(int64_t rows) { return (rows + kTokens - 1) / kTokens; }

Range tokens_of(int64_t tile, int64_t rows) {
  return {tile * kTokens, std::min((tile + 1) * kTokens, rows)};
}

// Calls run(out with dense rows), whose first columns it fills; the rest is zero, or stays.
template <typename Run>
void fill(const Tensor& out, int64_t token, bool add, Run run) {
  Tensor written = with_dense_rows(out);
  if (!add && out.size(1) > token) written.narrow(1, token, out.size(1) - token).zero_();
  run(written);
  if (!written.is_same(out)) out.copy_(written);
}

template <typename Math>
void forward(const Chain<Math>& chain, const Tensor& out, const Tensor& x, bool add) {
  const int64_t rows = x.size(0), read = std::min(x.size(1), chain.token);
  const int64_t wrote = std::min(out.size(1), chain.token);
  const Matrix from = matrix_of(x), to = matrix_of(out);
  at::parallel_for(0, tiles_of(rows), 1, [&](int64_t begin, int64_t end) {
    Math* h = kept<Math>(2 * chain.tile() + chain.scratch());
    Math *next = h + chain.tile(), *scratch = next + chain.tile();
    for (int64_t tile = begin; tile < end; ++tile) {
      open_tile(from, tokens_of(tile, rows), read, chain.places, h, scratch);
      for (const auto& step : chain.steps) {
        apply_gate(step.places(), step.packed.data(), h, next);
        std::swap(h, next);
      }
      close_tile(h, chain.places, to, tokens_of(tile, rows), wrote, add, scratch);
    }
  });
}

// What the backward pass of one tile reads and writes; gradients of no elements are not wanted.
struct Backward {
  Matrix x, dy, dx;
  int64_t rows, read, back, wrote;
  bool add;
  at::TensorList grads;
};

template <typename Math>
void backward_tile(const Chain<Math>& chain, const Backward& pass, Range tokens, Math* memory,
                   Math* part) {
  const auto count = static_cast<int64_t>(chain.steps.size());
  const auto input = [&](int64_t k) { return memory + k * chain.tile(); };
  Math *g = input(count), *next = input(count + 1), *scratch = input(count + 2);
  open_tile(pass.x, tokens, pass.read, chain.places, input(0), scratch);
  for (int64_t k = 0; k + 1 < count; ++k) {
    const auto& step = chain.steps[k];
    apply_gate(step.places(), step.packed.data(), input(k), input(k + 1));
  }
  open_tile(pass.dy, tokens, pass.back, chain.places, g, scratch);
  for (int64_t k = count; k-- > 0;) {
    const auto& step = chain.steps[k];
    if (pass.grads[k].numel()) {
      part -= step.size * step.size;
      sum_gate(step.places(), g, input(k), part);
    }
    if (k == 0 && !pass.dx.data) continue;
    apply_gate(step.places(), step.transposed.data(), g, next);
    std::swap(g, next);
  }
  if (pass.dx.data) {
    close_tile(g, chain.places, pass.dx, tokens, pass.wrote, pass.add, scratch);
  }
}

template <typename Math>
void backward(const Chain<Math>& chain, const Backward& pass) {
  int64_t total = 0;
  for (const Tensor& grad : pass.grads) total += grad.numel();
  const int64_t tiles = tiles_of(pass.rows), each = (tiles + kChunks - 1) / kChunks;
  const int64_t chunks = each ? (tiles + each - 1) / each : 0;
  Tensor parts = at::zeros({chunks, total}, c10::CppTypeToScalarType<Math>::value);
  Math* sums = parts.mutable_data_ptr<Math>();
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    const auto inputs = static_cast<int64_t>(chain.steps.size()) + 2;
    Math* memory = kept<Math>(inputs * chain.tile() + chain.scratch());
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      for (int64_t tile = chunk * each; tile < std::min((chunk + 1) * each, tiles); ++tile) {
        backward_tile(chain, pass, tokens_of(tile, pass.rows), memory, sums + (chunk + 1) * total);
      }
    }
  });
  const Tensor summed = parts.sum(0);
  int64_t at = 0;
  for (const Tensor& grad : pass.grads) {
    if (grad.numel()) grad.copy_(summed.narrow(0, at, grad.numel()).view(grad.sizes()));
    at += grad.numel();
  }
}

}  // namespace

void gate_chain(Tensor& out, const Tensor& x, at::TensorList gates, at::IntArrayRef dims,
                bool add) {
  in_math(math_of(x.scalar_type()), [&](auto math) {
    const Chain<decltype(math)> chain(gates, dims);
    fill(out, chain.token, add,
         [&](const Tensor& written) { forward(chain, written, with_dense_rows(x), add); });
  });
}

void gate_chain_backward(const Tensor& dy, const Tensor& x, at::TensorList gates,
                         at::IntArrayRef dims, const std::optional<Tensor>& dx, bool add,
                         at::TensorList grads) {
  const Tensor rows = with_dense_rows(x), back = with_dense_rows(dy);
  in_math(math_of(x.scalar_type()), [&](auto math) {
    const Chain<decltype(math)> chain(gates, dims);
    Backward pass{matrix_of(rows),
                  matrix_of(back),
                  matrix_of(Tensor()),
                  x.size(0),
                  std::min(x.size(1), chain.token),
                  std::min(dy.size(1), chain.token),
                  0,
                  add,
                  grads};
    if (!dx.has_value()) return backward(chain, pass);
    pass.wrote = std::min(dx->size(1), chain.token);
    fill(*dx, chain.token, add, [&](const Tensor& written) {
      pass.dx = matrix_of(written);
      backward(chain, pass);
    });
  });
}

}  // namespace lora_kernels
