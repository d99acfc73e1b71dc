// All triplets of the rows of a panel, whose distances are kept until they are whole, and then W in their place.
//
// A row's positives are sorted. A negative is in triplets with a run of them: those which reach beyond it and, if
// semihard, are closer. So each negative is looked up among the positives, and prefix sums over these do the rest.
#pragma once

#include <algorithm>

#include "gradient_task.h"

namespace fastcl::cpu {
namespace {

enum class Kind : int8_t { kNone, kPositive, kNegative };

// The buffers of one thread. A block of the panel is what it has in one tile of columns, as in Workspace::logits.
struct TripletSpace {
  Workspace tile;
  float* blocks;
  int64_t block_size;
  Kind* kinds;     // [y.rows], of one row
  float* own;      // [y.rows], its positives' distances, sorted
  float* reach;    // [y.rows], plus the margin
  int64_t* count;  // [y.rows + 1]
  double* sum;     // [y.rows + 1]
};

template <class Dot>
inline size_t lay_out_triplets(const Sweep& sweep, char* base, TripletSpace& space) {
  const int64_t m = sweep.y.rows;
  size_t used = lay_out<Dot>(sweep, base, space.tile);
  const auto take = [&](int64_t bytes) {
    char* p = base + used;
    used += static_cast<size_t>(round_up(bytes, 64));
    return p;
  };
  space.block_size = sweep.row_block * kTilePitch;
  const int64_t blocks = (m + sweep.tile - 1) / sweep.tile;
  space.blocks = reinterpret_cast<float*>(take(sizeof(float) * blocks * space.block_size));
  space.kinds = reinterpret_cast<Kind*>(take(m));
  space.own = reinterpret_cast<float*>(take(sizeof(float) * m));
  space.reach = reinterpret_cast<float*>(take(sizeof(float) * m));
  space.count = reinterpret_cast<int64_t*>(take(sizeof(int64_t) * (m + 1)));
  space.sum = reinterpret_cast<double*>(take(sizeof(double) * (m + 1)));
  return used;
}

// How many of a sorted list are below x, or at most x. None is, if x is NaN.
template <bool kAtMost>
inline int64_t count_below(const float* sorted, int64_t size, float x) {
  const float* first = sorted;
  while (size > 0) {
    const int64_t half = (size + 1) / 2;
    const bool below = kAtMost ? first[half - 1] <= x : first[half - 1] < x;
    first += below ? half : 0;
    size -= half;
  }
  return first - sorted;
}

// The first tile of a panel, without columns.
inline Tile triplet_tile(const Sweep& sweep, int64_t panel) {
  const int64_t row = panel * sweep.row_block;
  return {row, smaller(sweep.row_block, sweep.x.rows - row), 0, 0, false};
}

// Calls visit(tile, block) for each tile of columns.
template <class Visit>
inline void for_each_block(const Sweep& sweep, Tile tile, const TripletSpace& space, Visit&& visit) {
  for (float* block = space.blocks; tile.column < sweep.y.rows; tile.column += sweep.tile) {
    tile.columns = smaller(sweep.y.rows - tile.column, sweep.tile);
    visit(tile, block);
    block += space.block_size;
  }
}

inline Kind kind_of(const Sweep& sweep, int64_t x, int64_t y) {
  const PairOutcome pair = test_pair(sweep, x, y, 0.0f).row;
  if (pair.label) return x + sweep.tests.x0 == y ? Kind::kNone : Kind::kPositive;
  return pair.id ? Kind::kNone : Kind::kNegative;
}

// Turns a row of dots into distances; returns how many positives it has, or -1 where one of their distances is NaN.
inline int64_t measure_row(const Sweep& sweep, const Triplets& job, const Tile& tile, int64_t r,
                           const TripletSpace& space) {
  const int64_t x = tile.row + r;
  const float scale = Scale(sweep.scale).logit;
  int64_t positives = 0;
  bool is_nan = false;
  for_each_block(sweep, tile, space, [&](const Tile& part, float* block) {
    float* distances = block + r * kTilePitch;
    for (int64_t c = 0; c < part.columns; ++c) {
      const float s = distances[c] * scale + job.bias;
      if (job.row_squares == nullptr) {
        distances[c] = 1.0f - s;
      } else {
        const float squared = job.row_squares[x] + job.column_squares[part.column + c] - 2.0f * s;
        distances[c] = __builtin_sqrtf(squared < 0.0f ? 0.0f : squared);
      }
    }
    for (int64_t c = 0; c < part.columns; ++c) {
      const Kind kind = kind_of(sweep, x, part.column + c);
      space.kinds[part.column + c] = kind;
      if (kind != Kind::kPositive) continue;
      is_nan |= distances[c] != distances[c];
      space.own[positives++] = distances[c];
    }
  });
  return is_nan ? -1 : positives;
}

// Values of a row, and W in place of its distances where that is wanted.
inline void take_row(const Sweep& sweep, const TripletJob& job, const Tile& tile, int64_t r,
                     const TripletSpace& space) {
  const Triplets& triplets = job.triplets;
  const int64_t x = tile.row + r;
  const int64_t found = measure_row(sweep, triplets, tile, r, space);
  const int64_t positives = found < 0 ? 0 : found;
  // An order of its own, so that this code of the standard library is not linked into another level.
  std::sort(space.own, space.own + positives, [](float p, float q) { return p < q; });
  for (int64_t k = 0; k < positives; ++k) space.reach[k] = space.own[k] + triplets.margin;
  std::memset(space.count, 0, sizeof(int64_t) * (positives + 1));
  std::memset(space.sum, 0, sizeof(double) * (positives + 1));
  const auto run_of = [&](float d) {
    const int64_t first = count_below<true>(space.reach, positives, d);
    const int64_t last = triplets.semihard ? count_below<false>(space.own, positives, d) : positives;
    return BlockRange{first, last > first ? last : first, 1};
  };
  for_each_block(sweep, tile, space, [&](const Tile& part, const float* block) {
    for (int64_t c = 0; c < part.columns; ++c) {
      if (space.kinds[part.column + c] != Kind::kNegative) continue;
      const float d = block[r * kTilePitch + c];
      const BlockRange run = run_of(d);
      ++space.count[run.begin];
      --space.count[run.end];
      space.sum[run.begin] += d;
      space.sum[run.end] -= d;
    }
  });
  double cost = found < 0 ? NAN : 0.0;
  int64_t active = 0;
  for (int64_t k = 0; k < positives; ++k) {
    if (k > 0) {
      space.count[k] += space.count[k - 1];
      space.sum[k] += space.sum[k - 1];
    }
    cost += static_cast<double>(space.count[k]) * space.reach[k] - space.sum[k];
    active += space.count[k];
  }
  job.values[x] = static_cast<float>(cost);
  job.values[sweep.x.rows + x] = static_cast<float>(active);
  if (job.row_sums == nullptr) return;
  const float incoming = found < 0 ? NAN : triplets.incoming[x];
  double total = 0.0;
  for_each_block(sweep, tile, space, [&](const Tile& part, float* block) {
    float* row = block + r * kTilePitch;
    for (int64_t c = 0; c < kTilePitch; ++c) {
      const Kind kind = c < part.columns ? space.kinds[part.column + c] : Kind::kNone;
      float slope = 0.0f;
      if (kind == Kind::kPositive && positives > 0) {
        slope = static_cast<float>(space.count[count_below<false>(space.own, positives, row[c])]);
      } else if (kind == Kind::kNegative) {
        const BlockRange run = run_of(row[c]);
        slope = static_cast<float>(run.begin - run.end);
      }
      if (triplets.row_squares != nullptr) slope = row[c] == 0.0f ? 0.0f : slope / row[c];
      row[c] = kind == Kind::kNone ? 0.0f : -slope * incoming;
      // Of cosines it is a sum of integers, which is 0.
      if (kind != Kind::kNone) total -= static_cast<double>(slope) * incoming;
    }
  });
  job.row_sums[x] = static_cast<float>(total);
}

// Stores a block of W as the LEFT of both products.
template <class Dot>
inline void use_block(const Tile& tile, float* block, Workspace& space) {
  if (Dot::kPairs == 1) {
    space.w_rows = space.w_columns = block;
    return;
  }
  for (int64_t row = 0; row < tile.rows; row += kStrip) {
    const Strip strip{row, smaller(tile.rows - row, kStrip), 0, (tile.columns + kLanes - 1) / kLanes,
                      block + row * kTilePitch};
    store_weights<Dot>(strip, space);
  }
}

template <class Dot>
void triplets_task(const Sweep& sweep, const TripletJob& job, int64_t panel, void* memory) {
  TripletSpace space;
  lay_out_triplets<Dot>(sweep, static_cast<char*>(memory), space);
  const Tile first = triplet_tile(sweep, panel);
  const int64_t depth = sweep.x.depth;
  prepare_tile_rows<Dot>(sweep, first, false, space.tile);
  for_each_block(sweep, first, space, [&](const Tile& tile, float* block) {
    space.tile.logits = block;
    prepare_columns<Dot>(sweep, tile, false, space.tile);
    for_each_strip<Dot>(sweep, tile, space.tile, true, [](const Strip&) {});
  });
  for (int64_t r = 0; r < first.rows; ++r) take_row(sweep, job, first, r, space);
  if (job.row_sums == nullptr) return;
  for_each_block(sweep, first, space, [&](const Tile& tile, float* block) {
    const int64_t padding = round_up(tile.rows, kStrip) - tile.rows;
    std::memset(block + tile.rows * kTilePitch, 0, sizeof(float) * padding * kTilePitch);
    if (job.a == nullptr) return;
    prepare_columns<Dot>(sweep, tile, true, space.tile);
    use_block<Dot>(tile, block, space.tile);
    add_product<Dot, Layout::kRowMajor>(space.tile.w_rows, kTilePitch / Dot::kPairs, space.tile.y_slices.words,
                                        space.tile.y_slices.pitch, tile.columns, false, job.a + tile.row * depth,
                                        tile.rows, depth);
  });
}

template <class Dot>
void triplet_columns_task(const Sweep& sweep, const TripletJob& job, int64_t panel, int64_t column, void* memory) {
  TripletSpace space;
  lay_out_triplets<Dot>(sweep, static_cast<char*>(memory), space);
  Tile tile = triplet_tile(sweep, panel);
  tile.column = column * sweep.tile;
  tile.columns = smaller(sweep.y.rows - tile.column, sweep.tile);
  const int64_t depth = sweep.x.depth;
  float* block = space.blocks + column * space.block_size;
  for (int64_t r = 0; r < tile.rows; ++r) {
    for (int64_t c = 0; c < tile.columns; ++c) job.column_sums[tile.column + c] += block[r * kTilePitch + c];
  }
  if (job.b == nullptr) return;
  prepare_tile_rows<Dot>(sweep, tile, true, space.tile);
  use_block<Dot>(tile, block, space.tile);
  add_product<Dot, Layout::kColumnMajor>(space.tile.w_columns, kTilePitch, space.tile.x_slices.words,
                                         space.tile.x_slices.pitch, tile.rows, false, job.b + tile.column * depth,
                                         tile.columns, depth);
}

}  // namespace
}  // namespace fastcl::cpu
