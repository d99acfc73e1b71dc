// In which order tiles are computed, where partial results go, and how large all of that is.
//
// S is cut into super-tiles, at most `most` in a row or column and chosen from its shape alone. One block walks
// super-tile (r, c) and is the only writer of slot c for the rows of r and of slot r for the columns of c: no atomics,
// and the bits don't depend on scheduling. A symmetric plan has only r <= c, and rows and columns share their slots.
#pragma once

#include "tile.h"

namespace fastcl::cuda {

constexpr int kMostSuperTiles = 32;

// Indices of rows and columns are 32 bits wide, also one tile beyond the last; whatever they are multiplied by is 64.
constexpr int64_t kMostRows = (int64_t{1} << 31) - 1 - kTile;

// The super-tiles of one axis.
struct SuperAxis {
  int count;  // rows or columns
  int side;   // of a super-tile, whole tiles
  int slots;  // super-tiles

  FASTCL_HOST_DEVICE int begin(int slot) const { return slot * side; }
  FASTCL_HOST_DEVICE int end(int slot) const { return slot + 1 == slots ? count : (slot + 1) * side; }
};

FASTCL_HOST_DEVICE SuperAxis super_axis(int64_t count, int64_t most) {
  const int64_t side = ceil_div(ceil_div(count, kTile), most) * kTile;
  return {static_cast<int>(count), static_cast<int>(side), static_cast<int>(ceil_div(count, side))};
}

struct SuperTile {
  int r;
  int c;
};

FASTCL_HOST_DEVICE int super_tiles(const SuperAxis& rows, const SuperAxis& columns, bool symmetric) {
  return symmetric ? rows.slots * (rows.slots + 1) / 2 : rows.slots * columns.slots;
}

// The super-tile of a block. Of a triangle those on the diagonal, half as large, come last.
FASTCL_HOST_DEVICE SuperTile super_tile(int block, const SuperAxis& columns, bool symmetric) {
  if (!symmetric) return {block / columns.slots, block % columns.slots};
  const int above = columns.slots * (columns.slots - 1) / 2;
  if (block >= above) return {block - above, block - above};
  int c = 1;
  while (block >= c) block -= c++;
  return {block, c};
}

// Whether no tile of the super-tile, walked as below, has written its slot for the columns of the tile row at i, or for
// the rows at i, before: what it writes replaces what is there. On the diagonal of a symmetric plan the columns of the
// tiles above come first.
FASTCL_HOST_DEVICE bool begins_columns(SuperTile at, const SuperAxis& rows, int i) { return i == rows.begin(at.r); }
FASTCL_HOST_DEVICE bool begins_rows(SuperTile at, const SuperAxis& rows, int i, bool symmetric) {
  return !symmetric || at.r != at.c || i == rows.begin(at.r);
}

// The tiles of a super-tile, row by row; of a symmetric plan those on and above the diagonal of S.
class SuperTileWalk {
 public:
  FASTCL_HOST_DEVICE SuperTileWalk(SuperTile at, const SuperAxis& rows, const SuperAxis& columns, bool symmetric)
      : symmetric_(symmetric),
        row_end_(rows.end(at.r)),
        column_begin_(columns.begin(at.c)),
        column_end_(columns.end(at.c)),
        i_(rows.begin(at.r)),
        j_(first_column()) {}

  FASTCL_HOST_DEVICE int i() const { return i_; }
  FASTCL_HOST_DEVICE int j() const { return j_; }
  FASTCL_HOST_DEVICE bool done() const { return i_ >= row_end_; }
  FASTCL_HOST_DEVICE bool ends_row() const { return j_ + kTile >= column_end_; }
  FASTCL_HOST_DEVICE void next() {
    if (ends_row()) {
      i_ += kTile;
      j_ = first_column();
    } else {
      j_ += kTile;
    }
  }

 private:
  FASTCL_HOST_DEVICE int first_column() const { return symmetric_ ? larger(i_, column_begin_) : column_begin_; }

  bool symmetric_;
  int row_end_;
  int column_begin_;
  int column_end_;
  int i_;
  int j_;
};

// How many these are.
FASTCL_HOST_DEVICE int64_t tiles_of(SuperTile at, const SuperAxis& rows, const SuperAxis& columns, bool symmetric) {
  const int64_t down = ceil_div(rows.end(at.r) - rows.begin(at.r), kTile);
  const int64_t across = ceil_div(columns.end(at.c) - columns.begin(at.c), kTile);
  return symmetric && at.r == at.c ? down * (down + 1) / 2 : down * across;
}

// All tiles of the rows from i on.
class RowWalk {
 public:
  FASTCL_HOST_DEVICE RowWalk(int i, int columns) : i_(i), j_(0), columns_(columns) {}

  FASTCL_HOST_DEVICE int i() const { return i_; }
  FASTCL_HOST_DEVICE int j() const { return j_; }
  FASTCL_HOST_DEVICE bool done() const { return j_ >= columns_; }
  FASTCL_HOST_DEVICE void next() { j_ += kTile; }

 private:
  int i_;
  int j_;
  int columns_;
};

class OneTile {
 public:
  FASTCL_HOST_DEVICE OneTile(int i, int j) : i_(i), j_(j), done_(false) {}

  FASTCL_HOST_DEVICE int i() const { return i_; }
  FASTCL_HOST_DEVICE int j() const { return j_; }
  FASTCL_HOST_DEVICE bool done() const { return done_; }
  FASTCL_HOST_DEVICE void next() { done_ = true; }

 private:
  int i_;
  int j_;
  bool done_;
};

// A block of W: rows [row_begin, row_end), columns [column_begin, column_end). `mirror` where it lies on a symmetric
// plan's diagonal, so that only tiles on and above the diagonal are computed and those above are written twice.
struct Panel {
  int row_begin;
  int row_end;
  int column_begin;
  int column_end;
  bool mirror;
};

FASTCL_HOST_DEVICE int tiles_down(const Panel& panel) {
  return static_cast<int>(ceil_div(panel.row_end - panel.row_begin, kTile));
}
FASTCL_HOST_DEVICE int tiles_across(const Panel& panel) {
  return static_cast<int>(ceil_div(panel.column_end - panel.column_begin, kTile));
}

FASTCL_HOST_DEVICE int panel_tiles(const Panel& panel) {
  const int across = tiles_across(panel);
  const int down = tiles_down(panel);
  return panel.mirror ? down * (down + 1) / 2 : down * across;
}

// The tile of a block, as tiles of the panel: in bands of 8, so that blocks in flight share rows of a and b in L2. A
// triangle is walked column by column.
FASTCL_HOST_DEVICE SuperTile panel_tile(int block, const Panel& panel) {
  constexpr int kBand = 8;
  const int across = tiles_across(panel);
  const int down = tiles_down(panel);
  if (panel.mirror) {
    int c = 0;
    while (block > c) block -= ++c;
    return {block, c};
  }
  const int band = block / (kBand * across);
  const int height = smaller(kBand, down - band * kBand);
  const int within = block - band * kBand * across;
  return {band * kBand + within % height, within / height};
}

// [terms, slots, count]: where a term's partial result for a row or column begins, and how many there are.
FASTCL_HOST_DEVICE int64_t partial_index(int term, int slot, int64_t index, int slots, int64_t count) {
  return (static_cast<int64_t>(term) * slots + slot) * count + index;
}

}  // namespace fastcl::cuda
