// What csrc/cuda decides on the host or by arithmetic alone, exhaustively for small sizes and at the largest ones:
// layouts, fragment maps, the order of tiles, slots, sizes, 64-bit addresses. Exits with 1 where one is wrong.
#include <algorithm>
#include <cstdio>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "../../csrc/cuda/engine.h"
#include "../../csrc/cuda/registers.h"
#include "cuda_layouts.h"

namespace {

using namespace fastcl::cuda;
using fastcl::PairTerm;
using fastcl::Reduce;
using fastcl::Test;
using Wide = __int128;

void operand_layout() {
  std::set<int> offsets;
  for (int row = 0; row < kTile; ++row) {
    for (int chunk = 0; chunk < kDepthChunks; ++chunk) offsets.insert(operand_offset(row, chunk));
  }
  check(offsets.size() == kTile * kDepthChunks && *offsets.rbegin() == kOperandBytes - kChunkBytes, "operand layout");
  for (int step = 0; step < kSteps; ++step) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      std::vector<int> left, right;
      for (int lane = 8 * matrix; lane < 8 * matrix + 8; ++lane) {
        left.push_back(operand_offset(left_row(lane), step * kStepChunks + left_chunk(lane)));
        right.push_back(operand_offset(right_row(lane), step * kStepChunks + right_chunk(lane)));
      }
      check(conflicts(left, kChunkBytes) == 0 && conflicts(right, kChunkBytes) == 0, "loads of operands meet a bank");
    }
  }
  for (int first = 0; first < kThreads; first += 8) {
    std::vector<int> copies;
    for (int thread = first; thread < first + 8; ++thread) {
      copies.push_back(operand_offset(thread / kDepthChunks, thread % kDepthChunks));
    }
    check(conflicts(copies, kChunkBytes) == 0, "copies of operands meet a bank");
  }
}

// Rows that lie whole in shared memory, and who holds what of a tile of them.
template <int kDepth>
void own_rows() {
  using Fragments = OwnRowsFragments<kDepth>;
  constexpr int kRows = tile_rows<Fragments>(), kColumns = tile_columns<Fragments>();
  constexpr int kChunks = GradientMemory<kDepth>::kRowBytes / kChunkBytes;
  std::set<int> offsets;
  for (int row = 0; row < kRows; ++row) {
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int offset = whole_row_offset<kDepth>(row, chunk);
      offsets.insert(offset);
      const int first = whole_row_offset<kDepth>(row, chunk % 2);
      check(chunks_further(first, chunk - chunk % 2) == offset, "chunks further on");
      check(whole_row_offset<kDepth>(row % 8, chunk) + (row & ~7) * kChunks * kChunkBytes == offset, "eight rows on");
    }
  }
  check(static_cast<int>(offsets.size()) == kRows * kChunks && *offsets.rbegin() == (kRows * kChunks - 1) * kChunkBytes,
        "whole rows");
  for (int chunk = 0; chunk < kChunks; chunk += kStepChunks) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      std::vector<int> left, right;
      for (int lane = 8 * matrix; lane < 8 * matrix + 8; ++lane) {
        left.push_back(whole_row_offset<kDepth>(left_row(lane), chunk + left_chunk(lane)));
        right.push_back(whole_row_offset<kDepth>(right_row(lane), chunk + right_chunk(lane)));
      }
      check(conflicts(left, kChunkBytes) == 0 && conflicts(right, kChunkBytes) == 0, "loads of whole rows meet a bank");
    }
  }
  for (int first = 0; first < Fragments::kThreads; first += 8) {
    std::vector<int> copies;
    for (int thread = first; thread < first + 8; ++thread) {
      copies.push_back(whole_row_offset<kDepth>(thread / kChunks, thread % kChunks));
    }
    check(conflicts(copies, kChunkBytes) == 0, "copies of whole rows meet a bank");
  }
  std::set<std::pair<int, int>> pairs;
  for (int thread = 0; thread < Fragments::kThreads; ++thread) {
    for (int u = 0; u < Fragments::kRows; ++u) {
      for (int v = 0; v < Fragments::kColumns; ++v) {
        pairs.insert({Fragments::row(thread, u), Fragments::column(thread, v)});
      }
    }
  }
  check(static_cast<int>(pairs.size()) == kRows * kColumns && pairs.rbegin()->first == kRows - 1,
        "one thread for each pair of a tile of whole rows");
}

void super_axes() {
  const auto is_partition = [](int64_t count, int64_t most) {
    const SuperAxis axis = super_axis(count, most);
    int64_t at = 0;
    for (int slot = 0; slot < axis.slots; ++slot) {
      check(axis.begin(slot) == at && axis.end(slot) > at, "super-tiles are in order and none is empty");
      at = axis.end(slot);
    }
    check(at == count && axis.slots <= most && axis.side % kTile == 0, "super-tiles cover the axis");
  };
  for (int64_t most : {1, 2, 3, 32}) {
    for (int64_t count = 1; count <= 9000; count += count < 600 ? 1 : 97) is_partition(count, most);
    for (int64_t count = kMostRows - 300; count <= kMostRows; ++count) is_partition(count, most);
  }
}

// All walks of a sweep: each tile once, and each slot's first writer is told so, the others not.
void sweep_order(int n, int m, int most, bool symmetric) {
  const SuperAxis rows = super_axis(n, most), columns = super_axis(m, most);
  std::set<std::pair<int, int>> tiles;
  std::map<std::pair<int, int>, std::set<int>> row_blocks, column_blocks;
  std::map<std::pair<int, int>, int> row_writes, column_writes;
  auto& mirrored_blocks = symmetric ? row_blocks : column_blocks;
  auto& mirrored_writes = symmetric ? row_writes : column_writes;
  for (int block = 0; block < super_tiles(rows, columns, symmetric); ++block) {
    const SuperTile at = super_tile(block, columns, symmetric);
    check(at.r < rows.slots && at.c < columns.slots && (!symmetric || at.r <= at.c), "a block's super-tile");
    int row = -1;
    for (SuperTileWalk walk(at, rows, columns, symmetric); !walk.done(); walk.next()) {
      check(row == -1 || row == walk.i(), "a row of tiles ends where it says so");
      check(tiles.insert({walk.i(), walk.j()}).second, "a tile twice");
      check(walk.i() < n && walk.j() < m && (!symmetric || walk.i() <= walk.j()), "a tile outside");
      if (!symmetric || walk.i() < walk.j()) {
        check(begins_columns(at, rows, walk.i()) == (mirrored_writes[{at.r, walk.j()}]++ == 0), "first of the columns");
        mirrored_blocks[{at.r, walk.j()}].insert(block);
      }
      if (walk.ends_row()) {
        check(begins_rows(at, rows, walk.i(), symmetric) == (row_writes[{at.c, walk.i()}]++ == 0), "first of the rows");
        row_blocks[{at.c, walk.i()}].insert(block);
      }
      row = walk.ends_row() ? -1 : walk.i();
    }
    check(row == -1, "the last row of tiles ends");
  }
  const int down = static_cast<int>(ceil_div(n, kTile)), across = static_cast<int>(ceil_div(m, kTile));
  check(static_cast<int>(tiles.size()) == (symmetric ? down * (down + 1) / 2 : down * across), "all tiles");
  check(static_cast<int>(row_writes.size()) == down * columns.slots, "all slots of rows");
  check(symmetric || static_cast<int>(column_writes.size()) == across * rows.slots, "all slots of columns");
  for (const auto* blocks : {&row_blocks, &column_blocks}) {
    for (const auto& [slot, writers] : *blocks) check(writers.size() == 1, "one writer for each slot");
  }
}

void sweep_orders() {
  for (int most = 1; most <= 5; ++most) {
    for (int n = 1; n <= 9 * kTile; n += 61) {
      sweep_order(n, n, most, true);
      for (int m = 1; m <= 7 * kTile; m += 97) sweep_order(n, m, most, false);
    }
  }
  sweep_order(70 * kTile - 5, 70 * kTile - 5, kMostSuperTiles, true);
}

void panel_order() {
  for (int down = 1; down <= 20; ++down) {
    for (int across = 1; across <= 20; ++across) {
      for (bool mirror : {false, true}) {
        if (mirror && down != across) continue;
        const Panel panel{256, 256 + down * kTile - 3, 512, 512 + across * kTile - (mirror ? 3 : 7), mirror};
        std::set<std::pair<int, int>> tiles;
        for (int block = 0; block < panel_tiles(panel); ++block) {
          const SuperTile tile = panel_tile(block, panel);
          check(tile.r >= 0 && tile.r < down && tile.c >= 0 && tile.c < across, "a panel's tile outside");
          check(!mirror || tile.r <= tile.c, "a mirrored panel's tile below the diagonal");
          tiles.insert({tile.r, tile.c});
        }
        check(static_cast<int>(tiles.size()) == (mirror ? down * (down + 1) / 2 : down * across), "a panel's tiles");
      }
    }
  }
}

// Where products leave 32 bits.
void addresses() {
  static unsigned char byte;
  for (int64_t count : {int64_t{1}, int64_t{1000}, int64_t{1} << 22, kMostRows}) {
    for (int64_t pitch : {16, 2048, 65536}) {
      const Vectors x{&byte, pitch, static_cast<int>(count)};
      for (int64_t row : {int64_t{0}, count / 2, count - 1, count + kTile - 1}) {
        const Wide want = Wide{std::min(row, count - 1)} * pitch;
        const auto got =
            reinterpret_cast<intptr_t>(row_address(x, static_cast<int>(row))) - reinterpret_cast<intptr_t>(&byte);
        check(got == want, "a row's address");
      }
    }
    for (int term = 0; term < kMostTerms; ++term) {
      const Wide want = (Wide{term} * 32 + 31) * count + count - 1;
      check(partial_index(term, 31, count - 1, 32, count) == want, "a partial result's index");
    }
  }
  const Terms four{4, {}}, one{1, {}};
  const Workspace large = workspace(make_plan(four, one, false), kMostRows, 1000, kMostSuperTiles);
  check(large.row_partials == int64_t{4} * 8 * kMostRows && large.column_partials == int64_t{32} * 1000, "workspace");
  const Workspace triangle = workspace(make_plan(four, one, true), 4097, 4097, kMostSuperTiles);
  check(triangle.row_partials == int64_t{4} * 17 * 4097 && triangle.column_partials == 0, "a triangle's workspace");
}

// Tiles need not be square.
void self_pairs_of_tiles() {
  for (int offset = -9; offset <= 9; ++offset) {
    for (int j0 = 0; j0 <= 8; ++j0) {
      bool any = false;
      for (int i = 3; i < 3 + 5; ++i) any |= j0 <= i + offset && i + offset < j0 + 2;
      check(has_self_pair(Shape{20, 20, offset}, 3, j0, 5, 2) == any, "whether a tile has a self pair");
    }
  }
}

void farthest_self_pair() {
  const int last = static_cast<int>(kMostRows) - 1;
  const Shape large{last + 1, last + 1, -last};
  check(counts({Reduce::kSum, Test::kRequired, Test::kAbsent}, large, last, 0, -1), "the farthest self pair");
  check(has_self_pair(large, last / kTile * kTile, 0, kTile, kTile) &&
            !has_self_pair(large, 0, last / kTile * kTile, kTile, kTile),
        "the tile of the farthest self pair");
}

}  // namespace

int main() {
  fragment_maps<BlockFragments>();
  operand_layout();
  staged_layout<BlockFragments>();
  own_rows<64>();
  own_rows<128>();
  own_rows<256>();
  super_axes();
  sweep_orders();
  panel_order();
  addresses();
  counted_pairs_of<BlockFragments>();
  self_pairs_of_tiles();
  farthest_self_pair();
  return report();
}
