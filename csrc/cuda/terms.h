// A plan as the kernels take it, and the one place where a pair of S meets a mask.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "../pair_terms.h"
#include "tile.h"

namespace fastcl::cuda {

constexpr int kMostTerms = 4;

// The terms along one axis.
struct Terms {
  int count;
  PairTerm at[kMostTerms];
};

struct Plan {
  Terms rows;
  Terms columns;  // of a symmetric plan: its rows, looked at from the other side
  bool symmetric;
  bool uses_self;
  bool uses_target;
  bool tests_tags;
};

// The rows and columns of S, and which column is a row's self pair: i + self_offset.
struct Shape {
  int rows;
  int columns;
  int self_offset;
};

// Whether a term counts the pair (i, j), which may lie over the edge of S, but for what it asks of tags (tags.h).
FASTCL_HOST_DEVICE bool counts(const PairTerm& term, const Shape& shape, int i, int j, int target_of_i) {
  return i < shape.rows && j < shape.columns && passes(term.self_pair, j - i == shape.self_offset) &&
         passes(term.target, j == target_of_i);
}

// Whether the tile of so many rows and columns at (i0, j0) has the self pair of one of its rows.
FASTCL_HOST_DEVICE bool has_self_pair(const Shape& shape, int i0, int j0, int rows, int columns) {
  const int64_t distance = static_cast<int64_t>(shape.self_offset) - (static_cast<int64_t>(j0) - i0);
  return -rows < distance && distance < columns;
}

// What the masks of a tile compare with: the targets of its rows, and where the plan is symmetric of its columns.
struct TilePairs {
  Shape shape;
  int i0;
  int j0;
  const int* row_targets;
  const int* column_targets;
};

// A bit for each of kRows x kColumns pairs.
template <int kRows, int kColumns>
struct PairSet {
  static constexpr int kWords = (kRows * kColumns + 63) / 64;
  uint64_t words[kWords];

  FASTCL_HOST_DEVICE bool has(int u, int v) const {
    return words[(u * kColumns + v) / 64] >> (u * kColumns + v) % 64 & 1;
  }
  FASTCL_HOST_DEVICE void insert(int u, int v, bool present) {
    words[(u * kColumns + v) / 64] |= static_cast<uint64_t>(present) << (u * kColumns + v) % 64;
  }
  // Those alone whose outcome, by the set of all that pass, is the one that a mask asks for.
  FASTCL_HOST_DEVICE void keep(Test test, const PairSet& passing) {
    if (test == Test::kAbsent) return;
#pragma unroll
    for (int k = 0; k < kWords; ++k) words[k] &= test == Test::kRequired ? passing.words[k] : ~passing.words[k];
  }
};

template <int kRows, int kColumns>
FASTCL_HOST_DEVICE PairSet<kRows, kColumns> all_pairs() {
  PairSet<kRows, kColumns> all;
#pragma unroll
  for (uint64_t& word : all.words) word = ~uint64_t{0};
  return all;
}

// The pairs of a thread's rows from u on and columns from v on that a term counts; looked at from the other side,
// (j, i) in place of (i, j), where `turned`. In a loop and not one by one with what is done with them, which would need
// more registers than there are.
template <class Fragments, int kRows, int kColumns>
FASTCL_HOST_DEVICE PairSet<kRows, kColumns> counted_pairs(const PairTerm& term, const TilePairs& tile, bool turned,
                                                          int thread, int u, int v) {
  PairSet<kRows, kColumns> set;
#pragma unroll
  for (int word = 0; word < set.kWords; ++word) {
    uint64_t bits = 0;
#pragma unroll 1
    for (int bit = 0; bit < smaller(64, kRows * kColumns); ++bit) {
      const int k = word * 64 + bit;
      const int row = Fragments::row(thread, u + k / kColumns);
      const int column = Fragments::column(thread, v + k % kColumns);
      const int i = tile.i0 + row;
      const int j = tile.j0 + column;
      const bool counted = turned ? counts(term, tile.shape, j, i, tile.column_targets[column])
                                  : counts(term, tile.shape, i, j, tile.row_targets[row]);
      bits |= static_cast<uint64_t>(counted) << bit;
    }
    set.words[word] = bits;
  }
  return set;
}

inline Plan make_plan(const Terms& rows, const Terms& columns, bool symmetric) {
  Plan plan{rows, symmetric ? rows : columns, symmetric, false, false, false};
  for (const Terms* terms : {&plan.rows, &plan.columns}) {
    for (int t = 0; t < terms->count; ++t) {
      plan.uses_self |= terms->at[t].self_pair != Test::kAbsent;
      plan.uses_target |= terms->at[t].target != Test::kAbsent;
      plan.tests_tags |= tests_tags(terms->at[t]);
    }
  }
  return plan;
}

// Calls call(std::bool_constant), whether the plan tests tags: plans without tags have kernels that know nothing of
// them.
template <class Call>
void for_tags(const Plan& plan, Call call) {
  if (plan.tests_tags) {
    call(std::true_type());
  } else {
    call(std::false_type());
  }
}

}  // namespace fastcl::cuda
