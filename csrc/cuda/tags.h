// What masks ask of a pair beside its place: whether its row and its column have near labels or one id, and whether its
// logit is above the threshold of one of them (fastcl/terms.py).
//
// A bit for each pair that a thread holds and for each question, once for all terms of a tile; what a term counts is
// then a few operations on words. Kernels for plans without tags have none of it.
#pragma once

#include "problem.h"
#include "reduce.h"

namespace fastcl::cuda {

// Of a tile's rows or columns.
struct AxisTags {
  uint64_t labels[kTile];
  uint64_t ids[kTile];
};

// In shared memory, and not there without tags.
template <bool kTagged>
struct TileTags {};

template <>
struct TileTags<true> {
  AxisTags row_tags;
  AxisTags column_tags;
};

// Loads the tags of the tile at (i0, j0), which are there when the team has met. Those over the edge repeat the last.
template <class Team>
FASTCL_DEVICE void load_tags(const Similarity& s, int i0, int j0, TileTags<true>& to) {
#pragma unroll
  for (int axis = Team::thread() / kTile; axis < 2; axis += Team::kThreads / kTile) {
    const int k = Team::thread() % kTile;
    const Tags& tags = axis == 0 ? s.row_tags : s.column_tags;
    AxisTags& in_tile = axis == 0 ? to.row_tags : to.column_tags;
    const int index = axis == 0 ? smaller(i0 + k, s.operands.a.count - 1) : smaller(j0 + k, s.operands.b.count - 1);
    if (tags.labels != nullptr) in_tile.labels[k] = tags.labels[index];
    if (tags.ids != nullptr) in_tile.ids[k] = tags.ids[index];
  }
}

// The pairs of a thread's rows from u on and columns from v on with |x - y| <= width, of which x belongs to the row and
// y to the column. A few pairs at a time: all of them at once would need more registers than there are.
template <class Fragments, int kRows, int kColumns>
FASTCL_HOST_DEVICE PairSet<kRows, kColumns> near_pairs(const uint64_t* rows, const uint64_t* columns, uint64_t width,
                                                       int thread, int u, int v) {
  constexpr int kTogether = 8;
  static_assert(kColumns % kTogether == 0);
  PairSet<kRows, kColumns> set;
#pragma unroll
  for (int word = 0; word < set.kWords; ++word) {
    uint64_t bits = 0;
#pragma unroll 1
    for (int first = 0; first < smaller(64, kRows * kColumns); first += kTogether) {
      const int k = word * 64 + first;
      // In unsigned numbers, where -width <= x - y <= width is one comparison.
      const uint64_t x = rows[Fragments::row(thread, u + k / kColumns)] + width;
      uint32_t few = 0;
#pragma unroll
      for (int bit = 0; bit < kTogether; ++bit) {
        const uint64_t y = columns[Fragments::column(thread, v + k % kColumns + bit)];
        few |= static_cast<uint32_t>(x - y <= 2 * width) << bit;
      }
      bits |= static_cast<uint64_t>(few) << first;
    }
    set.words[word] = bits;
  }
  return set;
}

// The pairs whose logits are above a threshold, that of their row or that of their column; in a tile whose rows or
// columns begin at `first`, of `count`.
template <class Team, int kRows, int kColumns>
FASTCL_DEVICE PairSet<kRows, kColumns> pairs_above(const float* threshold, bool of_rows, int first, int count,
                                                   float scale, const typename Team::Accumulators& products, int u,
                                                   int v) {
  PairSet<kRows, kColumns> set = {};
  const auto threshold_at = [&](int in_tile) { return threshold[smaller(first + in_tile, count - 1)]; };
  if (of_rows) {
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const float limit = threshold_at(Team::row(Team::thread(), u + k));
#pragma unroll
      for (int l = 0; l < kColumns; ++l) set.insert(k, l, products.at(u + k, v + l) * scale > limit);
    }
  } else {
#pragma unroll
    for (int l = 0; l < kColumns; ++l) {
      const float limit = threshold_at(Team::column(Team::thread(), v + l));
#pragma unroll
      for (int k = 0; k < kRows; ++k) set.insert(k, l, products.at(u + k, v + l) * scale > limit);
    }
  }
  return set;
}

// The answers for some of a thread's pairs.
template <int kRows, int kColumns>
struct TagSets {
  using Set = PairSet<kRows, kColumns>;

  Set label;
  Set id;
  Set above_rows;
  Set above_columns;

  // Those pairs of `set` that a term's tests of tags leave; thresholds are those of the side that the term is along.
  FASTCL_HOST_DEVICE Set admitted(Set set, const PairTerm& term, bool along_columns) const {
    set.keep(term.label, label);
    set.keep(term.id, id);
    set.keep(term.above, along_columns ? above_columns : above_rows);
    return set;
  }
};

// `products` are A @ B.T of the tile at (i0, j0); what no mask asks for is left empty.
template <class Team, int kRows, int kColumns>
FASTCL_DEVICE TagSets<kRows, kColumns> tag_sets(const Similarity& s, const TileTags<true>& tags, int i0, int j0,
                                                const typename Team::Accumulators& products, int u, int v) {
  TagSets<kRows, kColumns> sets = {};
  const int thread = Team::thread();
  if (s.row_tags.labels != nullptr) {
    sets.label =
        near_pairs<Team, kRows, kColumns>(tags.row_tags.labels, tags.column_tags.labels, s.label_width, thread, u, v);
  }
  if (s.row_tags.ids != nullptr) {
    sets.id = near_pairs<Team, kRows, kColumns>(tags.row_tags.ids, tags.column_tags.ids, 0, thread, u, v);
  }
  if (s.row_tags.threshold != nullptr) {
    sets.above_rows = pairs_above<Team, kRows, kColumns>(s.row_tags.threshold, true, i0, s.operands.a.count, *s.scale,
                                                         products, u, v);
  }
  if (s.column_tags.threshold != nullptr) {
    sets.above_columns = pairs_above<Team, kRows, kColumns>(s.column_tags.threshold, false, j0, s.operands.b.count,
                                                            *s.scale, products, u, v);
  }
  return sets;
}

}  // namespace fastcl::cuda
