// The Hopper path's tile of S and who holds what of it: blocks of depth in shared memory, where TMA writes and wgmma
// reads them, and the numbers of a warpgroup's threads. The counterpart of tile.h.
//
// A warpgroup has a tile of 128 x 128 for itself, as two products of 64 x 128. A block of depth is 128 bytes, which is
// what one pattern of the swizzle spans, and a step of a product 32 bytes of it.
#pragma once

#include "tile.h"

namespace fastcl::cuda::hopper {

constexpr int kWarpgroup = 4 * kLanes;
constexpr int kConsumers = 2;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;  // the first warpgroup is the producer

// Registers of a thread: together no more than the 65,536 / kThreads that all begin with.
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 65536 / kWarpgroup);

constexpr int kDepthBytes = 128;
constexpr int kStepBytes = 32;
constexpr int kSteps = kDepthBytes / kStepBytes;
constexpr int kOperandBytes = kTile * kDepthBytes;
constexpr int kStages = 4;
constexpr int kMostSharedBytes = 227 << 10;

constexpr int kProductRows = 64;
constexpr int kProductNumbers = kProductRows * kTile / kWarpgroup;

// Where a byte of a row of a block of depth lies: chunks of 16 bytes are permuted within eight rows, so that neither
// eight rows at one chunk nor one row's chunks meet a bank twice.
constexpr int kSwizzleRows = 8;
FASTCL_HOST_DEVICE constexpr int operand_offset(int row, int byte) {
  return row * kDepthBytes + (byte / kChunkBytes ^ row % kSwizzleRows) * kChunkBytes + byte % kChunkBytes;
}

// What wgmma takes in place of an operand (PTX manual, matrix descriptor): its first address in bits 0-13, the distance
// from eight rows to the next eight in bits 32-45, both in units of 16 bytes, and in bits 62-63 the swizzle over 128
// bytes. Bits 16-29 mean nothing with that swizzle. A step within the block of depth moves the address alone, for the
// hardware permutes address bits and the block begins at a multiple of 1,024.
FASTCL_HOST_DEVICE constexpr uint64_t matrix_descriptor(uint32_t shared_address) {
  constexpr uint64_t kSwizzle128 = 1;
  constexpr uint64_t kStride = kSwizzleRows * kDepthBytes / 16;
  return (shared_address & 0x3ffff) / 16 | uint64_t{1} << 16 | kStride << 32 | kSwizzle128 << 62;
}
FASTCL_HOST_DEVICE constexpr uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + bytes / 16; }

// The accumulator of a 64 x 128 product gives warp w of the warpgroup the rows from 16 w on, and lane l of it, eight
// columns at a time, the rows l / 4 and l / 4 + 8 at columns 2 (l % 4) and 2 (l % 4) + 1.
struct WarpgroupFragments {
  static constexpr int kThreads = kWarpgroup;
  static constexpr int kWarpsDown = 4;
  static constexpr int kWarpsAcross = 1;
  static constexpr int kRows = 4;
  static constexpr int kColumns = 32;
  static constexpr int kPartRows = 4;
  static constexpr int kPartColumns = 8;

  FASTCL_HOST_DEVICE static int down(int thread) { return thread / kLanes; }
  FASTCL_HOST_DEVICE static int across(int) { return 0; }
  FASTCL_HOST_DEVICE static int row(int thread, int u) {
    return u / 2 * kProductRows + thread / kLanes * 16 + u % 2 * 8 + lane_of(thread) / 4;
  }
  FASTCL_HOST_DEVICE static int column(int thread, int v) { return v / 2 * 8 + lane_of(thread) % 4 * 2 + v % 2; }

  // Which product, and which of a thread's numbers of it.
  FASTCL_HOST_DEVICE static constexpr int product(int u) { return u / 2; }
  FASTCL_HOST_DEVICE static constexpr int number(int u, int v) { return v / 2 * 4 + u % 2 * 2 + v % 2; }
};

}  // namespace fastcl::cuda::hopper
