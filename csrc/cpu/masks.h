// Masks of a masked sweep: labels, ids and thresholds, tested in vectors.
//
// Such tests can hold for any pair of a tile, so that its dense terms admit different ones. The strip is taken in
// blocks of kStrip rows x kLanes columns. Each test is made once for a block; a term's mask is an AND of their
// outcomes, all ones where the pair counts, and what it leaves of an exponential that all terms share is theirs.
// Exceptional pairs count in no mask; they are scalar code's, as everywhere.
#pragma once

#include "tile.h"

namespace fastcl::cpu {
namespace {

template <class Number, class Index>
inline void gather(const Number* from, const Index& index, int64_t count, int64_t size, Number* to) {
  for (int64_t i = 0; from != nullptr && i < size; ++i) to[i] = i < count ? from[index(i)] : Number{};
}

// What masks test about the rows of a strip and the columns of a tile.
struct TileTags {
  int32_t nearest[kStrip];
  int32_t reach[kStrip];
  int32_t id[kStrip];
  float threshold[kStrip];
  alignas(64) int32_t column_label[kMaxTile];
  alignas(64) int32_t column_id[kMaxTile];
  alignas(64) float column_threshold[kMaxTile];

  void gather_columns(const Sweep& sweep, const Tile& tile) {
    const auto index = [&](int64_t c) { return tile.column + c; };
    gather(sweep.y_tags.label, index, tile.columns, kMaxTile, column_label);
    gather(sweep.y_tags.id, index, tile.columns, kMaxTile, column_id);
    gather(sweep.y_tags.threshold, index, tile.columns, kMaxTile, column_threshold);
  }

  void gather_rows(const Sweep& sweep, const Tile& tile, const Strip& strip) {
    const auto index = [&](int64_t r) { return row_of(sweep, tile.row + strip.row + r); };
    gather(sweep.x_tags.nearest, index, strip.height, kStrip, nearest);
    gather(sweep.x_tags.reach, index, strip.height, kStrip, reach);
    gather(sweep.x_tags.id, index, strip.height, kStrip, id);
    gather(sweep.x_tags.threshold, index, strip.height, kStrip, threshold);
  }
};

// The outcome for a block of each test that the sweep has tags for.
struct Block {
  Lanes counts[kStrip];  // neither exceptional nor padding nor below the diagonal
  Lanes label[kStrip];
  Lanes id[kStrip];
  Lanes row_above[kStrip];
  Lanes column_above[kStrip];
};

inline void test_block(const Sweep& sweep, const TileTags& tags, const Strip& strip, int64_t v, Block& block) {
  const float* dots = strip.dots + v * kLanes;
  const int64_t c = strip.column + v * kLanes;
  const Vector excluded = broadcast(Scale(sweep.scale).excluded);
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) block.counts[r] = differ(load(dots + r * kTilePitch), excluded);
  if (sweep.x_tags.label != nullptr) {
    const IntVector label = load(tags.column_label + c);
    // As unsigned numbers, those that are not within reach, below or above, are greater.
#pragma GCC unroll 16
    for (int r = 0; r < kStrip; ++r) {
      block.label[r] =
          at_most((UnsignedVector)(label - tags.nearest[r]), (UnsignedVector)(IntVector{} + tags.reach[r]));
    }
  }
  if (sweep.x_tags.id != nullptr) {
    const IntVector id = load(tags.column_id + c);
#pragma GCC unroll 16
    for (int r = 0; r < kStrip; ++r) block.id[r] = equal(id, IntVector{} + tags.id[r]);
  }
  if (sweep.x_tags.threshold != nullptr) {
#pragma GCC unroll 16
    for (int r = 0; r < kStrip; ++r) {
      block.row_above[r] = exceeds(load(dots + r * kTilePitch) * sweep.scale, broadcast(tags.threshold[r]));
    }
  }
  if (sweep.y_tags.threshold != nullptr) {
    const Vector threshold = load(tags.column_threshold + c);
#pragma GCC unroll 16
    for (int r = 0; r < kStrip; ++r) {
      block.column_above[r] = exceeds(load(dots + r * kTilePitch) * sweep.scale, threshold);
    }
  }
}

// The pairs of a block that a term admits, kept for the next term if its mask is the same.
class BlockMask {
 public:
  explicit BlockMask(const Block& block) : block_(block), pairs_(block.counts) {}

  // `above` is what the block says of the threshold along the term's axis.
  const Lanes* of(const PairTerm& term, const Lanes* above) {
    if (last_.label == term.label && last_.id == term.id && last_.above == term.above &&
        (last_above_ == above || term.above == Test::kAbsent)) {
      return pairs_;
    }
    last_ = term;
    last_above_ = above;
    pairs_ = block_.counts;
    demand(term.label, block_.label);
    demand(term.id, block_.id);
    demand(term.above, above);
    return pairs_;
  }

 private:
  void demand(Test test, const Lanes* outcomes) {
    if (test == Test::kAbsent) return;
    const Lanes* pairs = pairs_;
    const Lanes flip = test == Test::kForbidden ? static_cast<Lanes>(~kNoLanes) : kNoLanes;
#pragma GCC unroll 16
    for (int r = 0; r < kStrip; ++r) admitted_[r] = pairs[r] & (outcomes[r] ^ flip);
    pairs_ = admitted_;
  }

  const Block& block_;
  const Lanes* pairs_;
  PairTerm last_{};
  const Lanes* last_above_ = nullptr;
  Lanes admitted_[kStrip];
};

// A strip's dots with those that a row term doesn't admit taken out, from `strip.column` on; may be the strip itself.
[[gnu::noinline]] void mask_strip(const Sweep& sweep, const TileTags& tags, const Strip& strip, const PairTerm& term,
                                  float* out) {
  const Vector excluded = broadcast(Scale(sweep.scale).excluded);
  Block block;
  for (int64_t v = 0; v < strip.vectors; ++v) {
    test_block(sweep, tags, strip, v, block);
    BlockMask mask(block);
    const Lanes* pairs = mask.of(term, block.row_above);
    for (int r = 0; r < kStrip; ++r) {
      const int64_t at = r * kTilePitch + v * kLanes;
      store(out + at, select(pairs[r], load(strip.dots + at), excluded));
    }
  }
}

}  // namespace
}  // namespace fastcl::cpu
