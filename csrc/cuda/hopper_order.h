// In which order a block of the Hopper path works: which tiles each of its two consumers has, whose turn it is, and
// where in the ring of stages a tile's operands are.
//
// Consumers take turns with the tensor cores, tile by tile: one multiplies while the other one reduces. Each walks
// super-tiles, or tiles of a panel, of its own, and so is the only writer of what it writes. The ring is filled in the
// order of turns; when one consumer has no more tiles, the other one goes on alone. Rows of A that are not too deep
// stay in shared memory along a row of tiles, and the ring has B alone: half the traffic, which L2 could not deliver.
#pragma once

#include "hopper_tile.h"
#include "problem.h"

namespace fastcl::cuda::hopper {

// A block of depth's place in the ring, which is gone through again and again. Barriers alternate between two phases: a
// stage has been filled for this block when `full` has passed this block's parity, and may be filled when `empty` has
// passed the one before.
class RingPosition {
 public:
  FASTCL_HOST_DEVICE explicit RingPosition(int64_t block) : block_(static_cast<uint32_t>(block)) {}

  FASTCL_HOST_DEVICE int stage() const { return block_ % kStages; }
  FASTCL_HOST_DEVICE uint32_t parity() const { return block_ / kStages % 2; }
  FASTCL_HOST_DEVICE void next() { ++block_; }

 private:
  static_assert((int64_t{1} << 32) % (2 * kStages) == 0, "block_ may overflow");
  uint32_t block_;
};

// Where operands are in shared memory, one block of depth of either to a place. Up to kKept blocks of a consumer's rows
// of A are kept; where there are more, and where a walk changes rows with each tile (kKept = 0), stages have both
// operands.
template <int kKept>
struct Places {
  static constexpr int kCount = larger(2 * kStages, kConsumers* kKept + kStages);

  bool keeps_rows;

  FASTCL_HOST_DEVICE explicit Places(int blocks_of_depth) : keeps_rows(kKept > 0 && blocks_of_depth <= kKept) {}

  FASTCL_HOST_DEVICE int of_a(int consumer, int block, int stage) const {
    return keeps_rows ? consumer * kKept + block : 2 * stage;
  }
  FASTCL_HOST_DEVICE int of_b(int stage) const { return keeps_rows ? kConsumers * kKept + stage : 2 * stage + 1; }
};

// A consumer's rows of tiles, one after another; the barriers of rows that are kept have the parity of their number.
class TileRows {
 public:
  FASTCL_HOST_DEVICE bool begin() const { return begin_; }
  FASTCL_HOST_DEVICE uint32_t parity() const { return row_ % 2; }
  FASTCL_HOST_DEVICE void next_tile(bool ends_row) {
    begin_ = ends_row;
    row_ += ends_row;
  }

 private:
  bool begin_ = true;  // of a row, is the next tile
  uint32_t row_ = 0;
};

// A consumer's turns: consumer 0's first tile, consumer 1's first, consumer 0's second, ...
struct Turns {
  int consumer;
  int64_t others;  // tiles of the other consumer

  // Tiles before the consumer's n-th.
  FASTCL_HOST_DEVICE int64_t before(int64_t n) const { return n + (others < n + consumer ? others : n + consumer); }
  // Whether the turn before the consumer's n-th tile is the other one's, and the turn after it.
  FASTCL_HOST_DEVICE bool follows_other(int64_t n) const { return n + consumer > 0 && n + consumer - 1 < others; }
  FASTCL_HOST_DEVICE bool precedes_other(int64_t n) const { return n + consumer < others; }
};

// Consumers are numbered so that every block has one at work before any has two.
FASTCL_HOST_DEVICE int first_item(int block, int consumer, int blocks) { return block + consumer * blocks; }

// The tiles of some super-tiles: the first, and each that is `stride` further on.
class SuperTilesWalk {
 public:
  FASTCL_HOST_DEVICE SuperTilesWalk(const SuperAxis& rows, const SuperAxis& columns, bool symmetric, int first,
                                    int stride)
      : rows_(rows),
        columns_(columns),
        symmetric_(symmetric),
        item_(first),
        stride_(stride),
        at_(super_tile(first, columns, symmetric)),
        tile_(at_, rows, columns, symmetric) {}

  FASTCL_HOST_DEVICE int i() const { return tile_.i(); }
  FASTCL_HOST_DEVICE int j() const { return tile_.j(); }
  FASTCL_HOST_DEVICE SuperTile at() const { return at_; }
  FASTCL_HOST_DEVICE const SuperTileWalk& tile() const { return tile_; }
  FASTCL_HOST_DEVICE bool ends_row() const { return tile_.ends_row(); }
  FASTCL_HOST_DEVICE bool done() const { return item_ >= super_tiles(rows_, columns_, symmetric_); }
  FASTCL_HOST_DEVICE void next() {
    tile_.next();
    if (!tile_.done()) return;
    item_ += stride_;
    if (done()) return;
    at_ = super_tile(item_, columns_, symmetric_);
    tile_ = SuperTileWalk(at_, rows_, columns_, symmetric_);
  }

 private:
  const SuperAxis& rows_;
  const SuperAxis& columns_;
  bool symmetric_;
  int item_;
  int stride_;
  SuperTile at_;
  SuperTileWalk tile_;
};

// What the consumers of a block do in a forward sweep.
struct SweepWork {
  const SuperAxis& rows;
  const SuperAxis& columns;
  bool symmetric;
  int block;
  int blocks;

  FASTCL_HOST_DEVICE SuperTilesWalk walk(int consumer) const {
    return {rows, columns, symmetric, first_item(block, consumer, blocks), kConsumers * blocks};
  }
  FASTCL_HOST_DEVICE int64_t tiles(int consumer) const {
    int64_t sum = 0;
    const int items = super_tiles(rows, columns, symmetric);
    for (int item = first_item(block, consumer, blocks); item < items; item += kConsumers * blocks) {
      sum += tiles_of(super_tile(item, columns, symmetric), rows, columns, symmetric);
    }
    return sum;
  }
};

// Tiles of a panel: the first, and each that is `stride` further on.
class PanelWalk {
 public:
  FASTCL_HOST_DEVICE PanelWalk(const Panel& panel, int first, int stride)
      : panel_(panel), item_(first), stride_(stride) {
    find_tile();
  }

  FASTCL_HOST_DEVICE int i() const { return panel_.row_begin + tile_.r * kTile; }
  FASTCL_HOST_DEVICE int j() const { return panel_.column_begin + tile_.c * kTile; }
  FASTCL_HOST_DEVICE bool done() const { return item_ >= panel_tiles(panel_); }
  FASTCL_HOST_DEVICE bool ends_row() const { return true; }
  FASTCL_HOST_DEVICE void next() {
    item_ += stride_;
    find_tile();
  }

 private:
  FASTCL_HOST_DEVICE void find_tile() {
    if (!done()) tile_ = panel_tile(item_, panel_);
  }

  const Panel& panel_;
  int item_;
  int stride_;
  SuperTile tile_{0, 0};
};

// What the consumers of a block do for a panel of W.
struct PanelWork {
  const Panel& panel;
  int block;
  int blocks;

  FASTCL_HOST_DEVICE PanelWalk walk(int consumer) const {
    return {panel, first_item(block, consumer, blocks), kConsumers * blocks};
  }
  FASTCL_HOST_DEVICE int64_t tiles(int consumer) const {
    return larger(0, ceil_div(panel_tiles(panel) - first_item(block, consumer, blocks), kConsumers * blocks));
  }
};

}  // namespace fastcl::cuda::hopper
