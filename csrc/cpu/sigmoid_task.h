// The one sweep of a loss that asks a yes-or-no question of each pair (fastcl/losses/sigmoid.py): a tile's costs and
// its W come from the same logits, as no row has to be complete before its gradient is known.
//
// Own keys are exceptional pairs (tile.h); labels and ids are tested in vectors (masks.h).
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "exp2.h"
#include "gradient_task.h"
#include "masks.h"
#include "tile.h"

namespace fastcl::cpu {
namespace {

// softplus(x) and its slope sigmoid(x) share exp(-|x|), which neither overflows nor loses the smaller of two summands.
struct Softplus {
  Vector x;
  Vector e;

  explicit Softplus(Vector logits) : x(logits), e(exp2((x > 0.0f ? -x : x) * kLog2E)) {}

  Vector value() const { return (x > 0.0f ? x : Vector{}) + log1p(e); }
  Vector slope() const { return (x > 0.0f ? Vector{} + 1.0f : e) / (e + 1.0f); }
};

// What a strip's pairs come to along its rows, and the factors of its rows, 0 where they are padding.
struct StripSums {
  float factors[kStrip];
  float incoming[kStrip];
  float costs[kStrip];
  float weights[kStrip];

  void gather(const SigmoidPairs& job, int64_t row, int64_t height) {
    for (int64_t r = 0; r < kStrip; ++r) {
      factors[r] = r < height ? job.factors[row + r] : 0.0f;
      incoming[r] = r < height && job.incoming != nullptr ? job.incoming[row + r] : 0.0f;
    }
  }
};

// Overwrites a strip's dots with W where that is wanted. Nothing but own keys answers yes, and these are taken out.
template <bool kCosts, bool kWeights>
[[gnu::noinline]] void ask(const Strip& strip, float scale, const float* shifts, StripSums& sums) {
  for (int64_t r = 0; r < kStrip; ++r) {
    float* dots = strip.dots + r * kTilePitch;
    const float factor = sums.incoming[r] * sums.factors[r];
    Vector costs{};
    Vector weights{};
    for (int64_t v = 0; v < strip.vectors; ++v) {
      const Softplus softplus(load(dots + v * kLanes) * scale + load(shifts + v * kLanes));
      if (kCosts) costs += softplus.value();
      if (!kWeights) continue;
      const Vector w = softplus.slope() * factor;
      weights += w;
      store(dots + v * kLanes, w);
    }
    sums.costs[r] = kCosts ? sum(costs) * sums.factors[r] : 0.0f;
    sums.weights[r] = sum(weights);
  }
}

// The same where labels answer yes, or ids leave pairs out.
template <bool kCosts, bool kWeights>
[[gnu::noinline]] void ask_tagged(const Sweep& sweep, const TileTags& tags, const Strip& strip, float scale,
                                  const float* shifts, StripSums& sums) {
  const bool labels = sweep.x_tags.label != nullptr;
  const bool ids = sweep.x_tags.id != nullptr;
  const Vector one = broadcast(1.0f);
  Block block;
  Vector costs[kStrip] = {};
  Vector weights[kStrip] = {};
  for (int64_t v = 0; v < strip.vectors; ++v) {
    test_block(sweep, tags, strip, v, block);
    for (int64_t r = 0; r < kStrip; ++r) {
      float* dots = strip.dots + r * kTilePitch + v * kLanes;
      const Lanes yes = labels ? static_cast<Lanes>(block.counts[r] & block.label[r]) : kNoLanes;
      const Lanes left_out = ids ? static_cast<Lanes>(block.id[r] & ~yes) : kNoLanes;
      const Vector x = load(dots) * scale + load(shifts + v * kLanes);
      const Softplus softplus(select(left_out, broadcast(-INFINITY), select(yes, -x, x)));
      const Vector factors = broadcast(sums.factors[r]);
      if (kCosts) costs[r] += softplus.value() * select(yes, one, factors);
      if (!kWeights) continue;
      const Vector w = softplus.slope() * select(yes, -one, factors) * sums.incoming[r];
      weights[r] += w;
      store(dots, w);
    }
  }
  for (int64_t r = 0; r < kStrip; ++r) {
    sums.costs[r] = sum(costs[r]);
    sums.weights[r] = sum(weights[r]);
  }
}

template <class Dot, bool kTagged>
void sigmoid_task(const Sweep& sweep, const SigmoidPairs& job, const Task& task, void* memory) {
  Workspace space;
  lay_out<Dot>(sweep, static_cast<char*>(memory), space);
  const float scale = Scale(sweep.scale).logit;
  const bool weighs = job.incoming != nullptr;
  double* costs = job.costs == nullptr ? nullptr : job.costs + task.row_lane * sweep.x.rows;
  double* row_sums = job.row_sums + task.row_lane * sweep.x.rows;
  double* column_sums = job.column_sums == nullptr ? nullptr : job.column_sums + task.column_lane * sweep.y.rows;
  [[maybe_unused]] TileTags tags;
  alignas(64) float shifts[kMaxTile];
  const auto pack = [&](const Tile& tile) {
    prepare_columns<Dot>(sweep, tile, job.a.wanted(), space);
    if constexpr (kTagged) tags.gather_columns(sweep, tile);
    for (int64_t c = 0; c < kMaxTile; ++c) {
      // What is taken out has a logit of -inf, to which an infinity must not be added.
      const float shift = c < tile.columns ? job.shifts[tile.column + c] : 0.0f;
      shifts[c] = std::isinf(shift) ? std::copysign(FLT_MAX, shift) : shift;
    }
  };
  for_each_tile(sweep, task, pack, [&](const Tile& tile) {
    prepare_tile_rows<Dot>(sweep, tile, job.b.wanted(), space);
    std::memset(space.column_sums, 0, sizeof(float) * kMaxTile);
    for_each_strip<Dot>(sweep, tile, space, Dot::kPairs == 1 && weighs, [&](const Strip& strip) {
      StripSums sums;
      sums.gather(job, tile.row + strip.row, strip.height);
      if constexpr (kTagged) tags.gather_rows(sweep, tile, strip);
      const auto run = [&](auto wants_costs, auto wants_weights) {
        constexpr bool kCosts = decltype(wants_costs)::value;
        constexpr bool kWeights = decltype(wants_weights)::value;
        if constexpr (kTagged) {
          ask_tagged<kCosts, kWeights>(sweep, tags, strip, scale, shifts, sums);
        } else {
          ask<kCosts, kWeights>(strip, scale, shifts, sums);
        }
      };
      if (!weighs) {
        run(std::true_type{}, std::false_type{});
      } else if (costs != nullptr) {
        run(std::true_type{}, std::true_type{});
      } else {
        run(std::false_type{}, std::true_type{});
      }
      for (int64_t r = 0; r < strip.height; ++r) {
        if (costs != nullptr) costs[tile.row + strip.row + r] += sums.costs[r];
        row_sums[tile.row + strip.row + r] += sums.weights[r];
      }
      const int64_t s = strip.row / kStrip;
      for (int32_t i = space.exceptional->strip_end[s]; i < space.exceptional->strip_end[s + 1]; ++i) {
        const Exceptional& pair = space.exceptional->pairs[i];
        const int64_t x = tile.row + pair.row;
        const double logit = static_cast<double>(pair.dot) * sweep.scale + job.shifts[tile.column + pair.column];
        if (costs != nullptr) costs[x] += softplus(-logit);
        if (!weighs) continue;
        const double weight = -sums.incoming[pair.row - strip.row] * sigmoid(-logit);
        row_sums[x] += weight;
        strip.dots[(pair.row - strip.row) * kTilePitch + pair.column] = static_cast<float>(weight);
      }
      if (!weighs) return;
      for (int64_t c = 0; column_sums != nullptr && c < strip.vectors * kLanes; c += kLanes) {
        Vector total = load(space.column_sums + c);
        for (int64_t r = 0; r < strip.height; ++r) total += load(strip.dots + r * kTilePitch + c);
        store(space.column_sums + c, total);
      }
      store_weights<Dot>(strip, space);
    });
    for (int64_t c = 0; column_sums != nullptr && c < tile.columns; ++c) {
      column_sums[tile.column + c] += space.column_sums[c];
    }
    add_products<Dot>(tile, task, sweep.x.depth, space, job.a, job.b);
  });
}

}  // namespace
}  // namespace fastcl::cpu
