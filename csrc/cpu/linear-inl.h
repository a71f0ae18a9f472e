// docs/spec.md, step 2, on the CPU, for types whose products are slow in torch, and the gradients of x and of the weight.
//
// These products are thin: thousands of tokens by a few experts. So both gradients use the same read of x, 16-bit elements are
// converted to float in registers, and the weight, which every tile of tokens needs, is packed into panels.
#pragma once

#include "cpu/panels-inl.h"
#include "cpu/parallel.h"

namespace topn_gating::cpu::TOPN_LEVEL {
namespace {

// Computes the logits of a tile of tokens, a block of features at a time.
template <class T>
class LinearTile {
 public:
  LinearTile(const Linear& args, const ComputeType<T>* weight)
      : a_(args), weight_(weight), columns_(round_up(a_.experts, panel<R>)), x_(kTile * kLinearBlock),
        z_(kTile * columns_) {}

  void run(int64_t first) {
    const int64_t tokens = std::min(kTile, a_.tokens - first);
    std::fill_n(static_cast<R*>(z_), tokens * columns_, R(0));
    for (int64_t j = 0; j < a_.dim; j += kLinearBlock) {
      const int64_t terms = std::min(kLinearBlock, a_.dim - j);
      for (int64_t t = 0; t < tokens; ++t) {
        convert(static_cast<const T*>(a_.x) + (first + t) * a_.dim + j, terms, x_ + t * kLinearBlock);
      }
      for (int64_t e = 0; e < columns_; e += panel<R>) add(tokens, e, weight_ + e * a_.dim + j * panel<R>, terms);
    }
    T* logits = static_cast<T*>(a_.logits) + first * a_.experts;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t e = 0; e < columns_; e += width<R>) {
        store_padded(logits + t * a_.experts + e, 0, a_.experts - e, load<Vector<R>>(z_ + t * columns_ + e));
      }
    }
  }

 private:
  using R = ComputeType<T>;

  void add(int64_t tokens, int64_t e, const R* weight, int64_t terms) {
    for_rows(tokens, [&](int64_t t, int64_t rows) {
      multiply<true>(rows, x_ + t * kLinearBlock, kLinearBlock, 1, weight, terms, z_ + t * columns_ + e, columns_);
    });
  }

  const Linear& a_;
  const R* weight_;
  int64_t columns_;  // experts, rounded up to whole panels
  Scratch<R> x_;     // (tile, block)
  Scratch<R> z_;     // (tile, columns)
};

// Computes both gradients for a block of features and a chunk of tokens.
template <class T>
class LinearGradient {
 public:
  LinearGradient(const LinearBackward& args, const LinearPlan& plan, const ComputeType<T>* weight, ComputeType<T>* sums)
      : a_(args), plan_(plan), weight_(weight), sums_(sums), grad_(kTile * a_.experts), x_(kTile * plan.block) {}

  void run(int64_t chunk, int64_t block) {
    const int64_t column = block * plan_.block, columns = std::min(plan_.block, a_.dim - column);
    const int64_t end = std::min(a_.tokens, (chunk + 1) * plan_.chunk);
    R* sums = sums_ + chunk * a_.experts * plan_.columns + column * a_.experts;
    if (a_.grad_weight != nullptr) std::fill_n(sums, round_up(columns, panel<R>) * a_.experts, R(0));
    for (int64_t first = chunk * plan_.chunk; first < end; first += kTile) {
      const int64_t count = std::min(kTile, end - first);
      convert(static_cast<const T*>(a_.grad_logits) + first * a_.experts, count * a_.experts, static_cast<R*>(grad_));
      if (a_.grad_weight != nullptr) {
        pack(static_cast<const T*>(a_.x) + first * a_.dim + column, count, a_.dim, columns, static_cast<R*>(x_), kTile);
      }
      for (int64_t j = 0; j < columns; j += panel<R>) {
        if (a_.grad_weight != nullptr) add_to_weight(count, j, sums + j * a_.experts);
        if (a_.grad_x != nullptr) write_x(first, count, column + j);
      }
    }
  }

 private:
  using R = ComputeType<T>;

  void add_to_weight(int64_t tokens, int64_t j, R* sums) {
    for_rows(a_.experts, [&](int64_t e, int64_t rows) {
      multiply<true>(rows, grad_ + e, 1, a_.experts, x_ + j * kTile, tokens, sums + e * panel<R>, panel<R>);
    });
  }

  void write_x(int64_t first, int64_t tokens, int64_t column) {
    const int64_t columns = a_.dim - column;
    const R* weight = weight_ + column * a_.experts;
    for_rows(tokens, [&](int64_t t, int64_t rows) {
      T* grad_x = static_cast<T*>(a_.grad_x) + (first + t) * a_.dim + column;
      const R* grad = grad_ + t * a_.experts;
      if constexpr (std::is_same_v<R, T>) {
        if (columns >= panel<R>) return multiply<false>(rows, grad, a_.experts, 1, weight, a_.experts, grad_x, a_.dim);
      }
      R part[kRows * panel<R>];
      multiply<false>(rows, grad, a_.experts, 1, weight, a_.experts, part, panel<R>);
      for (int64_t r = 0; r < rows; ++r) {
        for (int v = 0; v < kVectors; ++v) {
          const auto sums = load<Vector<R>>(part + r * panel<R> + v * width<R>);
          if (columns >= panel<R>) {
            store_elements(grad_x + r * a_.dim + v * width<R>, sums);
          } else {
            store_padded(grad_x + r * a_.dim, v, columns, sums);
          }
        }
      }
    });
  }

  const LinearBackward& a_;
  const LinearPlan& plan_;
  const R* weight_;
  R* sums_;
  Scratch<R> grad_;  // (tile, e)
  Scratch<R> x_;     // panels of (tile, block)
};

// Adds the sums of the chunks, in order, for the panels from `begin` to `end` - 1, and writes the weight's gradient.
template <class T>
void add_chunks(const LinearBackward& a, const LinearPlan& plan, const ComputeType<T>* sums, int64_t begin, int64_t end) {
  using R = ComputeType<T>;
  for (int64_t j = begin * panel<R>; j < std::min(a.dim, end * panel<R>); j += panel<R>) {
    for (int64_t e = 0; e < a.experts; ++e) {
      for (int v = 0; v < kVectors; ++v) {
        const R* first = sums + j * a.experts + e * panel<R> + v * width<R>;
        Vector<R> sum{};
        for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
          sum += load<Vector<R>>(first + chunk * a.experts * plan.columns);
        }
        store_padded(static_cast<T*>(a.grad_weight) + e * a.dim + j, v, a.dim - j, sum);
      }
    }
  }
}

}  // namespace

void run(const Linear& a, ParallelFor parallel_for) {
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using R = ComputeType<T>;
    Scratch<R> weight(round_up(a.experts, panel<R>) * a.dim);
    pack_columns(static_cast<const T*>(a.weight), a.dim, a.dim, a.experts, static_cast<R*>(weight), a.dim);
    const int64_t tiles = ceil_div(a.tokens, kTile);
    parallel(parallel_for, tiles, kTermCost * double(kTile * a.dim * a.experts), [&](int64_t begin, int64_t end) {
      LinearTile<T> tile(a, weight);
      for (int64_t i = begin; i < end; ++i) tile.run(i * kTile);
    });
  });
}

void run(const LinearBackward& a, ParallelFor parallel_for) {
  with_type(a.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using R = ComputeType<T>;
    const LinearPlan plan(a);
    Scratch<R> weight(a.grad_x == nullptr ? 0 : a.experts * plan.columns);
    if (a.grad_x != nullptr) pack(static_cast<const T*>(a.weight), a.experts, a.dim, a.dim, static_cast<R*>(weight), a.experts);
    R* sums = static_cast<R*>(a.workspace);
    const double terms = double(plan.chunk * plan.block * a.experts) * ((a.grad_x != nullptr) + (a.grad_weight != nullptr));
    parallel(parallel_for, plan.chunks * plan.blocks, kTermCost * terms, [&](int64_t begin, int64_t end) {
      LinearGradient<T> gradient(a, plan, weight, sums);
      for (int64_t i = begin; i < end; ++i) gradient.run(i / plan.blocks, i % plan.blocks);
    });
    if (a.grad_weight == nullptr) return;
    const int64_t panels = ceil_div(a.dim, panel<R>);
    parallel(parallel_for, panels, 0.2 * double(plan.chunks * a.experts * panel<R>), [&](int64_t begin, int64_t end) {
      add_chunks<T>(a, plan, sums, begin, end);
    });
  });
}

}  // namespace topn_gating::cpu::TOPN_LEVEL
