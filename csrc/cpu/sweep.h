// From a problem to the sweep that the levels execute.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "schedule.h"

namespace fastcl::cpu {

inline AxisTerms describe(const std::vector<PairTerm>& terms, float shift) {
  AxisTerms axis{terms.data(), static_cast<int>(terms.size()), false, false};
  for (const PairTerm& term : terms) {
    if (!is_dense(term)) continue;
    // Without a finite shift every row is computed with a running maximum anyway.
    axis.dense_sum |= term.reduce == Reduce::kLogSumExp && std::isfinite(shift);
    axis.dense_max |= term.reduce == Reduce::kMax;
  }
  return axis;
}

// Whether a sum of exp(S - shift) that is 0 says that there was nothing to add, as no such number underflows.
inline bool trusts_empty(const Problem& problem, float shift) {
  constexpr float kLogSmallest = -87.0f;
  return problem.lowest + problem.shift - shift > kLogSmallest;
}

// Whether a log-sum-exp has to be computed again with a running maximum.
inline bool is_suspect(const Problem& problem, bool trust_empty, double value) {
  return value - problem.shift < problem.flag_below && !(trust_empty && value == -INFINITY);
}

inline Sweep make_sweep(const Problem& problem) {
  Sweep sweep{};
  sweep.x = problem.a;
  sweep.y = problem.symmetric ? problem.a : problem.b;
  sweep.x_count = sweep.x.rows;
  sweep.symmetric = problem.symmetric;
  sweep.tile = tile_size(sweep.x.rows, sweep.y.rows, sweep.x.depth);
  sweep.row_block = block_size(sweep.x.rows, sweep.tile);
  sweep.column_block = block_size(sweep.y.rows, sweep.tile);
  sweep.scale = problem.scale;
  sweep.shift = problem.shift;
  sweep.x_tags = problem.a_tags;
  sweep.y_tags = problem.symmetric ? problem.a_tags : problem.b_tags;
  sweep.rows = describe(problem.row_terms, problem.shift);
  // The tile (i, j) of a symmetric plan serves row i as the pair (i, j) and row j as the pair (j, i).
  sweep.columns = problem.symmetric ? sweep.rows : describe(problem.column_terms, problem.shift);
  // There, the pair of a row with itself is always exceptional: it serves that row once, not as row and as column.
  sweep.tests = {problem.symmetric, problem.symmetric, problem.row0, problem.col0, nullptr, nullptr};
  for (const auto* terms : {&problem.row_terms, &problem.column_terms}) {
    for (const PairTerm& term : *terms) {
      sweep.tests.uses_self |= term.self_pair != Test::kAbsent;
      if (term.target != Test::kAbsent) sweep.tests.x_target = problem.target;
      sweep.masked |= is_dense(term) && (term.reduce == Reduce::kSum || tests_tags(term));
    }
  }
  if (problem.symmetric) sweep.tests.y_target = sweep.tests.x_target;
  return sweep;
}

// The same pairs with rows and columns exchanged.
inline Sweep transposed(Sweep sweep) {
  std::swap(sweep.x, sweep.y);
  std::swap(sweep.row_block, sweep.column_block);
  std::swap(sweep.rows, sweep.columns);
  std::swap(sweep.x_packed.slices, sweep.y_packed.slices);
  sweep.y_packed.panels = nullptr;
  std::swap(sweep.tests.x0, sweep.tests.y0);
  std::swap(sweep.tests.x_target, sweep.tests.y_target);
  std::swap(sweep.x_tags, sweep.y_tags);
  sweep.x_count = sweep.x.rows;
  return sweep;
}

// What engine.h declares, of a problem whose sweep is there with what its tasks share.
void statistics(const Problem& problem, const Sweep& sweep, const Workers& workers, Vectors<float> out);
void gradient(const Problem& problem, const Sweep& sweep, const Workers& workers, Vectors<const float> statistics,
              Vectors<const float> incoming, float* a, float* b);

inline int64_t row_blocks(const Sweep& sweep) { return (sweep.x.rows + sweep.row_block - 1) / sweep.row_block; }
inline int64_t column_blocks(const Sweep& sweep) {
  return (sweep.y.rows + sweep.column_block - 1) / sweep.column_block;
}

}  // namespace fastcl::cpu
