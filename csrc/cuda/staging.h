// A tile in shared memory, from the registers of those who computed it and on its way to memory.
#pragma once

#include "tile.h"

namespace fastcl::cuda {

// Writes this thread's numbers as elements of `Precision`, the columns as rows where `kTransposed`. The team meets
// before and after.
template <class Precision, class Team, bool kTransposed>
FASTCL_DEVICE void stage_tile(const typename Team::Accumulators& numbers, unsigned char* staged) {
  constexpr int kBytes = Precision::kBytes;
  const int row = Team::row(Team::thread(), 0);
  const int column = Team::column(Team::thread(), 0);
  const int first = kTransposed ? staged_offset(column, row, kBytes) : staged_offset(row, column, kBytes);
  Team::sync();
#pragma unroll
  for (int u = 0; u < Team::kRows; ++u) {
    const int down = Team::row(0, u);
#pragma unroll
    for (int v = 0; v < Team::kColumns; v += 2) {
      const int across = Team::column(0, v);
      if (kTransposed) {
        Precision::store(staged + staged_offset_from(first, across, down, kBytes), numbers.at(u, v));
        Precision::store(staged + staged_offset_from(first, across + 1, down, kBytes), numbers.at(u, v + 1));
      } else {
        Precision::store(staged + staged_offset_from(first, down, across, kBytes), numbers.at(u, v),
                         numbers.at(u, v + 1));
      }
    }
  }
  Team::sync();
}

}  // namespace fastcl::cuda
