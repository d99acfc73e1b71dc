// The sweep of a function of every pair (pair_functions.h): S and the parameters become values, sums and W, and W the
// products, tile by tile. Own keys, labels and ids are masks here.
#pragma once

#include "gradient_task.h"
#include "pair_functions.h"

namespace fastcl::cpu {
namespace {

// What a strip needs of its tile, and what it makes.
struct PairStrip {
  const Sweep& sweep;
  const PairOperands& operands;
  const Strip& strip;
  const TileTags& tags;
  const PairRows& rows;
  const PairColumns& columns;
  const float* guide;  // dots of the second S, and their factor
  float guide_scale;
  int64_t first_column;  // of the tile
  double values[kMostOutputs][kStrip];
  double row_sums[2][kStrip];
  float* column_sums;  // [2][kMaxTile]
};

// Calls visit(v, r, pairs) for each row and vector of the strip.
template <class Visit>
inline void for_each_pairs(const PairStrip& on, int64_t v, Block& block, Visit&& visit) {
  const bool labels = on.sweep.x_tags.label != nullptr;
  const bool ids = on.sweep.x_tags.id != nullptr;
  const float scale = Scale(on.sweep.scale).logit;
  const int64_t c = v * kLanes;
  const IntVector column = counting(static_cast<int32_t>(c));
  test_block(on.sweep, on.tags, on.strip, v, block);
  for (int r = 0; r < kStrip; ++r) {
    Pairs pairs{on.rows, on.columns, r, c};
    pairs.s = load(on.strip.dots + r * kTilePitch + c) * scale + on.operands.bias;
    pairs.guide = on.guide == nullptr ? Vector{} : load(on.guide + r * kTilePitch + c) * on.guide_scale;
    pairs.counts = block.counts[r];
    pairs.own = equal(column, IntVector{} + on.rows.own[r]);
    pairs.label = labels ? block.label[r] : kNoLanes;
    pairs.id = ids ? block.id[r] : kNoLanes;
    visit(r, pairs);
  }
}

// The lanes' largest and its column, the first where several are.
inline void first_largest(Vector values, Vector columns, double& value, double& column) {
  value = -INFINITY;
  column = -1.0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (values[lane] > value || (values[lane] == value && columns[lane] < column)) {
      value = values[lane];
      column = columns[lane];
    }
  }
}

// Values of a strip's rows, and with kWeights the sums of W, which overwrites the dots.
template <class Function, bool kWeights>
[[gnu::noinline]] void take_pairs(const Function& function, PairStrip& on) {
  constexpr PairShape shape = shape_of(Function::kFunction);
  constexpr bool kParameter = shape.slopes == 2;
  Vector values[kMostOutputs][kStrip];
  for (int k = 0; k < shape.outputs; ++k) {
    for (int r = 0; r < kStrip; ++r) values[k][r] = broadcast(static_cast<float>(empty_value(shape.along[k])));
  }
  Vector weights[kStrip] = {};
  Vector of_rows[kStrip] = {};
  Block block;
  for (int64_t v = 0; v < on.strip.vectors; ++v) {
    const Vector column = __builtin_convertvector(counting(static_cast<int32_t>(v * kLanes)), Vector);
    Vector column_weights{};
    Vector of_columns{};
    for_each_pairs(on, v, block, [&](int r, const Pairs& pairs) {
      Vector outputs[kMostOutputs];
      const PairSlopes slopes = function(pairs, outputs);
#pragma GCC unroll 4
      for (int k = 0; k < shape.outputs; ++k) {
        if (shape.along[k] == Along::kSum) values[k][r] += outputs[k];
        if (shape.along[k] == Along::kMax) values[k][r] = larger(outputs[k], values[k][r]);
        if (shape.along[k] != Along::kFirstMax) continue;
        const Lanes better = exceeds(outputs[k], values[k][r]);
        values[k][r] = select(better, outputs[k], values[k][r]);
        values[k + 1][r] = select(better, column, values[k + 1][r]);
      }
      if (!kWeights) return;
      store(on.strip.dots + r * kTilePitch + v * kLanes, slopes.s);
      weights[r] += slopes.s;
      column_weights += slopes.s;
      if (kParameter) of_rows[r] += slopes.row;
      if (kParameter) of_columns += slopes.column;
    });
    if (!kWeights) continue;
    float* sums = on.column_sums + v * kLanes;
    store(sums, load(sums) + column_weights);
    if (kParameter) store(sums + kMaxTile, load(sums + kMaxTile) + of_columns);
  }
  for (int64_t r = 0; r < kStrip; ++r) {
    for (int k = 0; k < shape.outputs; ++k) {
      if (shape.along[k] == Along::kSum) on.values[k][r] = sum(values[k][r]);
      if (shape.along[k] == Along::kMax) on.values[k][r] = largest(values[k][r]);
      if (shape.along[k] != Along::kFirstMax) continue;
      first_largest(values[k][r], values[k + 1][r], on.values[k][r], on.values[k + 1][r]);
      on.values[k + 1][r] += on.values[k + 1][r] < 0.0 ? 0.0 : static_cast<double>(on.first_column);
    }
    if (!kWeights) continue;
    on.row_sums[0][r] = sum(weights[r]);
    on.row_sums[1][r] = sum(of_rows[r]);
  }
}

// The log-sum-exp of a strip's rows, with the largest logit as the shift. Overwrites the dots.
template <class Function>
[[gnu::noinline]] void take_logits(const Function& function, PairStrip& on) {
  Vector highest[kStrip];
  for (int r = 0; r < kStrip; ++r) highest[r] = broadcast(-INFINITY);
  Block block;
  for (int64_t v = 0; v < on.strip.vectors; ++v) {
    for_each_pairs(on, v, block, [&](int r, const Pairs& pairs) {
      const Vector logit = function.logit(pairs);
      store(on.strip.dots + r * kTilePitch + v * kLanes, logit);
      highest[r] = larger(logit, highest[r]);
    });
  }
  for (int64_t r = 0; r < kStrip; ++r) {
    const float max = largest(highest[r]);
    on.values[0][r] = max;
    if (std::isinf(max)) continue;
    Vector sums{};
    const float* logits = on.strip.dots + r * kTilePitch;
    for (int64_t v = 0; v < on.strip.vectors; ++v) sums += exponential(load(logits + v * kLanes) - max);
    on.values[0][r] = max + std::log(static_cast<double>(sum(sums)));
  }
}

template <class Function>
inline void take(const Function& function, bool weighs, PairStrip& on) {
  if (weighs) {
    take_pairs<Function, true>(function, on);
  } else {
    take_pairs<Function, false>(function, on);
  }
}

// The functions of a distance.
template <bool kEuclidean>
inline void take_distances(bool weighs, PairStrip& on) {
  const float* numbers = on.operands.numbers;
  switch (on.operands.function) {
    case PairFunction::kContrastive:
      return take(Contrastive<kEuclidean>{numbers}, weighs, on);
    case PairFunction::kNegatives:
      return take_logits(Negatives<kEuclidean>{numbers}, on);
    case PairFunction::kNegativesSlope:
      return take(NegativesSlope<kEuclidean>{numbers}, weighs, on);
    case PairFunction::kLifted:
      return take(Lifted<kEuclidean>{numbers}, weighs, on);
    case PairFunction::kHardest:
      return take_pairs<Hardest<kEuclidean>, false>({}, on);
    default:
      return take_pairs<Similarities<kEuclidean>, false>({}, on);
  }
}

inline void take_function(bool weighs, PairStrip& on) {
  const float* numbers = on.operands.numbers;
  switch (on.operands.function) {
    case PairFunction::kNearest:
      return take_pairs<Nearest, false>({}, on);
    case PairFunction::kImportance:
      return take_logits(Importance<false>{numbers}, on);
    case PairFunction::kEnergy:
      return take(Energy<false>{numbers}, weighs, on);
    case PairFunction::kPowerImportance:
      return take_logits(Importance<true>{numbers}, on);
    case PairFunction::kPowerEnergy:
      return take(Energy<true>{numbers}, weighs, on);
    case PairFunction::kCandidates:
      return take_logits(Candidates{}, on);
    case PairFunction::kSoftTargets:
      return take(SoftTargets{}, weighs, on);
    case PairFunction::kSquares:
      return take(Squares{}, weighs, on);
    default:
      return on.operands.row_squares != nullptr ? take_distances<true>(weighs, on) : take_distances<false>(weighs, on);
  }
}

inline void gather_rows(const Sweep& sweep, const PairJob& job, const Tile& tile, const Strip& strip, PairRows& rows) {
  const PairOperands& operands = job.operands;
  const int64_t n = sweep.x.rows;
  const int64_t first = tile.row + strip.row;
  const auto index = [&](int64_t r) { return first + r; };
  const auto vector = [&](const float* from, int64_t k) { return from == nullptr ? from : from + k * n; };
  std::memset(&rows, 0, sizeof rows);
  gather(operands.row_squares, index, strip.height, kStrip, rows.squares);
  for (int k = 0; k < job.shape.row_given; ++k) {
    gather(vector(operands.row_given, k), index, strip.height, kStrip, rows.given[k]);
  }
  for (int k = 0; k < job.shape.incoming; ++k) {
    gather(vector(operands.incoming, k), index, strip.height, kStrip, rows.incoming[k]);
  }
  for (int64_t r = 0; r < kStrip; ++r) {
    rows.own[r] = static_cast<int32_t>(position(first + r + sweep.tests.x0, tile.column, tile.columns));
  }
}

// Two matrices may be of different types, GuideDot being that of the guide's operands.
template <class Dot, class GuideDot>
void pairs_task(const Sweep& sweep, const PairJob& job, const Task& task, void* memory) {
  Workspace space;
  Workspace guide_space;
  const size_t used = lay_out<Dot>(sweep, static_cast<char*>(memory), space);
  if (job.guide != nullptr) lay_out<GuideDot>(*job.guide, static_cast<char*>(memory) + used, guide_space);
  const int64_t n = sweep.x.rows;
  const int64_t m = sweep.y.rows;
  const PairShape& shape = job.shape;
  const bool weighs = job.operands.incoming != nullptr;
  double* values = job.values + task.row_lane * shape.outputs * n;
  double* row_sums = job.row_sums == nullptr ? nullptr : job.row_sums + task.row_lane * shape.slopes * n;
  double* column_sums = job.column_sums == nullptr ? nullptr : job.column_sums + task.column_lane * shape.slopes * m;
  TileTags tags;
  PairRows rows;
  PairColumns columns{};
  alignas(64) float tile_sums[2 * kMaxTile];
  const auto pack = [&](const Tile& tile) {
    prepare_columns<Dot>(sweep, tile, job.a.wanted(), space);
    if (job.guide != nullptr) prepare_columns<GuideDot>(*job.guide, tile, false, guide_space);
    tags.gather_columns(sweep, tile);
    const auto index = [&](int64_t c) { return tile.column + c; };
    gather(job.operands.column_squares, index, tile.columns, kMaxTile, columns.squares);
    gather(job.operands.column_given, index, tile.columns, kMaxTile, columns.given);
  };
  for_each_tile(sweep, task, pack, [&](const Tile& tile) {
    prepare_tile_rows<Dot>(sweep, tile, job.b.wanted(), space);
    if (job.guide != nullptr) {
      prepare_tile_rows<GuideDot>(*job.guide, tile, false, guide_space);
      for_each_strip<GuideDot>(*job.guide, tile, guide_space, true, [](const Strip&) {});
    }
    std::memset(tile_sums, 0, sizeof tile_sums);
    for_each_strip<Dot>(sweep, tile, space, Dot::kPairs == 1 && weighs, [&](const Strip& strip) {
      tags.gather_rows(sweep, tile, strip);
      gather_rows(sweep, job, tile, strip, rows);
      PairStrip on{sweep, job.operands, strip, tags, rows, columns};
      on.guide = job.guide == nullptr ? nullptr : guide_space.logits + strip.row * kTilePitch;
      on.guide_scale = job.guide == nullptr ? 0.0f : Scale(job.guide->scale).logit;
      on.first_column = tile.column;
      on.column_sums = tile_sums;
      take_function(weighs, on);
      for (int64_t r = 0; r < strip.height; ++r) {
        const int64_t x = tile.row + strip.row + r;
        if (shape.outputs > 0) absorb(shape, values + x, n, &on.values[0][r], kStrip);
        for (int k = 0; row_sums != nullptr && k < shape.slopes; ++k) row_sums[k * n + x] += on.row_sums[k][r];
      }
      if (weighs) store_weights<Dot>(strip, space);
    });
    for (int k = 0; column_sums != nullptr && k < shape.slopes; ++k) {
      for (int64_t c = 0; c < tile.columns; ++c) column_sums[k * m + tile.column + c] += tile_sums[k * kMaxTile + c];
    }
    add_products<Dot>(tile, task, sweep.x.depth, space, job.a, job.b);
  });
}

}  // namespace
}  // namespace fastcl::cpu
