// A tile of S and who holds what of it: blocks of depth in shared memory, numbers in registers, sums across lanes.
//
// 8 warps share a tile of 128 x 128, 2 down and 4 across; each computes 64 x 32 as products of 16 x 8. All maps are in
// bytes where they concern operands, so that they serve every type: a block of depth is 64 bytes, a step of a product
// 32 bytes of it, two chunks of 16 bytes.
#pragma once

#include "platform.h"

namespace fastcl::cuda {

constexpr int kTile = 128;
constexpr int kLanes = 32;
constexpr int kWarpsDown = 2;
constexpr int kWarpsAcross = 4;
constexpr int kThreads = kLanes * kWarpsDown * kWarpsAcross;
constexpr int kWarpRows = kTile / kWarpsDown;
constexpr int kWarpColumns = kTile / kWarpsAcross;
constexpr int kProductRows = 16;
constexpr int kProductColumns = 8;
constexpr int kProductsDown = kWarpRows / kProductRows;
constexpr int kProductsAcross = kWarpColumns / kProductColumns;

constexpr int kChunkBytes = 16;
constexpr int kDepthBytes = 64;
constexpr int kDepthChunks = kDepthBytes / kChunkBytes;
constexpr int kStepChunks = 2;
constexpr int kSteps = kDepthChunks / kStepChunks;
constexpr int kOperandBytes = kTile * kDepthBytes;
constexpr int kStageBytes = 2 * kOperandBytes;
constexpr int kStages = 4;

FASTCL_HOST_DEVICE int lane_of(int thread) { return thread % kLanes; }
FASTCL_HOST_DEVICE int warp_down(int thread) { return thread / kLanes / kWarpsAcross; }
FASTCL_HOST_DEVICE int warp_across(int thread) { return thread / kLanes % kWarpsAcross; }

// The threads that share a tile and who of them holds what: here a block's, by mma.sync. Reductions, masks and weights
// are written for any such type (the other one is in hopper_tile.h). A thread holds the numbers at kRows rows and
// kColumns columns, and forms weights of kPartRows x kPartColumns of them at a time.
struct BlockFragments {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kWarpsDown = cuda::kWarpsDown;
  static constexpr int kWarpsAcross = cuda::kWarpsAcross;
  static constexpr int kRows = 2 * kProductsDown;
  static constexpr int kColumns = 2 * kProductsAcross;
  static constexpr int kPartRows = 2;
  static constexpr int kPartColumns = kColumns;

  FASTCL_HOST_DEVICE static int down(int thread) { return warp_down(thread); }
  FASTCL_HOST_DEVICE static int across(int thread) { return warp_across(thread); }

  // The u-th row and the v-th column of the tile that a thread holds numbers of. The accumulator of a 16 x 8 product
  // gives lane l the rows l / 4 and l / 4 + 8 at columns 2 (l % 4) and 2 (l % 4) + 1.
  FASTCL_HOST_DEVICE static int row(int thread, int u) {
    return warp_down(thread) * kWarpRows + u / 2 * kProductRows + u % 2 * 8 + lane_of(thread) / 4;
  }
  FASTCL_HOST_DEVICE static int column(int thread, int v) {
    return warp_across(thread) * kWarpColumns + v / 2 * kProductColumns + lane_of(thread) % 4 * 2 + v % 2;
  }
};

// The rows and columns of the tile that a team shares, by what an accumulator of a product gives a lane.
template <class Fragments>
FASTCL_HOST_DEVICE constexpr int tile_rows() {
  return Fragments::kWarpsDown * Fragments::kRows * 8;
}
template <class Fragments>
FASTCL_HOST_DEVICE constexpr int tile_columns() {
  return Fragments::kWarpsAcross * Fragments::kColumns * 4;
}

// After a sum across lanes (reduce.h) lane l has those of kRows / 4 of its rows from this one on, and of kColumns / 8
// of its columns.
template <class Fragments>
FASTCL_HOST_DEVICE int row_after_sum(int lane) {
  return lane % 4 * (Fragments::kRows / 4);
}
template <class Fragments>
FASTCL_HOST_DEVICE int column_after_sum(int lane) {
  return lane / 4 * (Fragments::kColumns / 8);
}

// Where a chunk of a row of an operand's block of depth lies. Eight consecutive rows at one chunk, which is what a
// warp loads at a time, fall on all 32 banks.
FASTCL_HOST_DEVICE int operand_offset(int row, int chunk) {
  return row * kDepthBytes + (chunk ^ (row >> 1 & (kDepthChunks - 1))) * kChunkBytes;
}

// The row and the chunk that a lane points ldmatrix.x4 at, so that its four registers are those of the operand A of a
// product (16 rows) or those of the operands B of two products side by side (16 rows of B).
FASTCL_HOST_DEVICE int left_row(int lane) { return lane % 16; }
FASTCL_HOST_DEVICE int left_chunk(int lane) { return lane / 16; }
FASTCL_HOST_DEVICE int right_row(int lane) { return lane / 16 * 8 + lane % 8; }
FASTCL_HOST_DEVICE int right_chunk(int lane) { return lane / 8 % 2; }

// Where an element of a tile of W lies on its way to memory: rows in chunks, so permuted that neither what a warp
// writes from its accumulators nor what it reads along a row meets a bank twice.
FASTCL_HOST_DEVICE int staged_offset(int row, int column, int element_bytes) {
  const int chunk = column * element_bytes / kChunkBytes;
  const int within = column * element_bytes % kChunkBytes;
  return row * kTile * element_bytes + (chunk ^ (row * element_bytes / 2 & 7)) * kChunkBytes + within;
}

// The same for an element so many rows and columns from the one at `origin`, where these numbers and the origin's have
// no bit in common: as all elements of a thread from its first one. Few operations, most of them at compile time.
FASTCL_HOST_DEVICE int staged_offset_from(int origin, int rows, int columns, int element_bytes) {
  return (origin ^ staged_offset(rows & 7, columns, element_bytes)) + staged_offset(rows & ~7, 0, element_bytes);
}

}  // namespace fastcl::cuda
