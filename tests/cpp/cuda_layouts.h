// Checks of layouts that both paths of the CUDA engine share: for any type of fragments (csrc/cuda/tile.h).
#pragma once

#include <algorithm>
#include <cstdio>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "../../csrc/cuda/engine.h"

namespace fastcl::cuda {

inline int failures = 0;

inline void check(bool right, const char* what) {
  if (right) return;
  if (++failures <= 20) std::printf("WRONG: %s\n", what);
}

// The exit code.
inline int report() {
  std::printf("%d wrong\n", failures);
  return failures == 0 ? 0 : 1;
}

// Every number of a tile has one thread, and every sum of a warp's rows or columns one lane.
template <class Fragments>
void fragment_maps() {
  std::set<std::pair<int, int>> pairs, row_sums, column_sums;
  for (int thread = 0; thread < Fragments::kThreads; ++thread) {
    for (int u = 0; u < Fragments::kRows; ++u) {
      for (int v = 0; v < Fragments::kColumns; ++v) {
        pairs.insert({Fragments::row(thread, u), Fragments::column(thread, v)});
      }
    }
    const int row = row_after_sum<Fragments>(lane_of(thread)), column = column_after_sum<Fragments>(lane_of(thread));
    for (int k = 0; k < Fragments::kRows / 4; ++k) {
      row_sums.insert({Fragments::across(thread), Fragments::row(thread, row + k)});
    }
    for (int k = 0; k < Fragments::kColumns / 8; ++k) {
      column_sums.insert({Fragments::down(thread), Fragments::column(thread, column + k)});
    }
  }
  constexpr int kPairs = Fragments::kThreads * Fragments::kRows * Fragments::kColumns;
  check(kPairs == kTile * kTile && pairs.size() == kPairs && pairs.rbegin()->first == kTile - 1,
        "one thread for each pair of a tile");
  check(row_sums.size() == Fragments::kWarpsAcross * kTile, "one lane for each row's sum");
  check(column_sums.size() == Fragments::kWarpsDown * kTile, "one lane for each column's sum");
}

// How often the lanes' accesses of `bytes` meet one of the 32 banks, beyond what their number makes unavoidable.
inline int conflicts(const std::vector<int>& offsets, int bytes) {
  std::map<int, std::set<int>> words;
  for (int offset : offsets) {
    for (int b = 0; b < bytes; b += 4) words[(offset + b) / 4 % 32].insert((offset + b) / 4);
  }
  size_t worst = 0, all = 0;
  for (const auto& [bank, distinct] : words) {
    worst = std::max(worst, distinct.size());
    all += distinct.size();
  }
  return static_cast<int>(worst - (all + 31) / 32);
}

template <class Fragments>
void staged_layout() {
  for (int bytes : {2, 4}) {
    std::set<int> offsets;
    for (int row = 0; row < kTile; ++row) {
      for (int column = 0; column < kTile; ++column) offsets.insert(staged_offset(row, column, bytes));
    }
    check(offsets.size() == kTile * kTile && *offsets.rbegin() == (kTile * kTile - 1) * bytes, "staged layout");
    for (int thread = 0; thread < Fragments::kThreads; ++thread) {
      const int row = Fragments::row(thread, 0), column = Fragments::column(thread, 0);
      for (int u = 0; u < Fragments::kRows; ++u) {
        for (int v = 0; v < Fragments::kColumns; ++v) {
          const int down = Fragments::row(0, u), across = Fragments::column(0, v);
          check(row + down == Fragments::row(thread, u) && column + across == Fragments::column(thread, v), "a step");
          check(staged_offset_from(staged_offset(row, column, bytes), down, across, bytes) ==
                    staged_offset(row + down, column + across, bytes),
                "the staged tile's element from the thread's first");
          check(staged_offset_from(staged_offset(column, row, bytes), across, down, bytes) ==
                    staged_offset(column + across, row + down, bytes),
                "the transposed tile's element from the thread's first");
        }
      }
    }
    for (int v = 0; v < Fragments::kColumns; v += 2) {
      // Accesses of 8 bytes are made by half a warp at a time.
      const int lanes = kLanes * 2 / bytes;
      for (int first = 0; first < kLanes; first += lanes) {
        std::vector<int> written;
        for (int lane = first; lane < first + lanes; ++lane) {
          written.push_back(staged_offset(Fragments::row(lane, 0), Fragments::column(lane, v), bytes));
        }
        check(conflicts(written, 2 * bytes) == 0, "the staged tile is written with conflicts");
      }
    }
    for (int row = 0; row < 8; ++row) {
      std::vector<int> read;
      for (int k = 0; k < 8; ++k) read.push_back(staged_offset(row, k * kChunkBytes / bytes, bytes));
      check(conflicts(read, kChunkBytes) == 0, "the staged tile is read with conflicts");
    }
  }
}

// Whether a part of a thread's pairs, from row u and column v on, is what the definition says.
template <class Fragments, int kRows, int kColumns>
void counted_part(const PairTerm& term, const TilePairs& tile, bool turned, int thread, int u0, int v0) {
  const auto set = counted_pairs<Fragments, kRows, kColumns>(term, tile, turned, thread, u0, v0);
  for (int u = 0; u < kRows; ++u) {
    for (int v = 0; v < kColumns; ++v) {
      const int row = Fragments::row(thread, u0 + u), column = Fragments::column(thread, v0 + v);
      const int i = turned ? tile.j0 + column : tile.i0 + row;
      const int j = turned ? tile.i0 + row : tile.j0 + column;
      const int target = turned ? tile.column_targets[column] : tile.row_targets[row];
      const bool want = i < tile.shape.rows && j < tile.shape.columns &&
                        !(term.self_pair == Test::kForbidden && j == i + tile.shape.self_offset) &&
                        !(term.target == Test::kForbidden && j == target) &&
                        !(term.target == Test::kRequired && j != target);
      check(set.has(u, v) == want, "whether a pair counts");
    }
  }
}

template <class Fragments>
void counted(const PairTerm& term, const TilePairs& tile) {
  constexpr int kRows = Fragments::kRows, kColumns = Fragments::kColumns;
  constexpr int kPartRows = Fragments::kPartRows, kPartColumns = Fragments::kPartColumns;
  for (int thread = 0; thread < Fragments::kThreads; thread += 7) {
    for (bool turned : {false, true}) {
      counted_part<Fragments, kRows, kColumns>(term, tile, turned, thread, 0, 0);
      for (int u = 0; u < kRows; u += kPartRows) {
        for (int v = 0; v < kColumns; v += kPartColumns) {
          counted_part<Fragments, kPartRows, kPartColumns>(term, tile, turned, thread, u, v);
        }
      }
    }
  }
}

template <class Fragments>
void counted_pairs_of() {
  const Shape shape{300, 260, -35};
  std::vector<int> row_targets(kTile), column_targets(kTile);
  for (int i0 = 0; i0 < 300; i0 += kTile) {
    for (int j0 = 0; j0 < 260; j0 += kTile) {
      bool any = false;
      for (int k = 0; k < kTile; ++k) {
        row_targets[k] = (i0 + k) * 7 % 263 - 2;
        column_targets[k] = (j0 + k) * 5 % 303 - 2;
        const int j = i0 + k + shape.self_offset;
        any |= j >= j0 && j < j0 + kTile;
      }
      check(has_self_pair(shape, i0, j0, kTile, kTile) == any, "whether a tile has a self pair");
      const TilePairs tile{shape, i0, j0, row_targets.data(), column_targets.data()};
      for (const PairTerm term : {PairTerm{Reduce::kSum, Test::kForbidden, Test::kAbsent},
                                  PairTerm{Reduce::kSum, Test::kAbsent, Test::kRequired},
                                  PairTerm{Reduce::kSum, Test::kForbidden, Test::kForbidden}}) {
        counted<Fragments>(term, tile);
      }
    }
  }
}

}  // namespace fastcl::cuda
