// All triplets of a labelled batch with their gradient, from one sweep of panels of whole rows.
#include <algorithm>
#include <atomic>
#include <thread>

#include "schedule.h"
#include "shared_operands.h"
#include "sweep.h"

namespace fastcl::cpu {
namespace {

// Distances that a panel holds, where its columns leave it more than the fewest rows, and the most rows.
constexpr int64_t kDistances = int64_t{4} << 20;
constexpr int64_t kMostRows = 16 * kPanelUnit;

int64_t panel_rows(const Sweep& sweep) {
  const int64_t rows = std::min(kDistances / sweep.y.rows, std::min(kMostRows, sweep.tile));
  return std::max<int64_t>(1, rows / kPanelUnit) * kPanelUnit;
}

}  // namespace

void all_triplets(const Problem& problem, const Workers& workers, const Triplets& triplets,
                  const PairResults& results) {
  const Level& level = selected();
  Sweep sweep = make_sweep(problem);
  sweep.row_block = panel_rows(sweep);
  const SharedOperands shared(workers, sweep, results.b != nullptr, results.a != nullptr);
  const int64_t depth = sweep.x.depth;
  std::vector<double> column_sums(results.column_sums == nullptr ? 0 : sweep.y.rows);
  const TripletJob job{triplets,         results.values,
                       results.row_sums, results.column_sums == nullptr ? nullptr : column_sums.data(),
                       results.a,        results.b};
  if (results.a != nullptr) std::fill_n(results.a, sweep.x.rows * depth, 0.0f);
  if (results.b != nullptr) std::fill_n(results.b, sweep.y.rows * depth, 0.0f);
  const int64_t tiles = results.column_sums == nullptr ? 0 : (sweep.y.rows + sweep.tile - 1) / sweep.tile;
  // Panels that have added to each tile of columns: they take turns in their order, whatever the number of threads.
  std::vector<std::atomic<int64_t>> turns(tiles);
  const Schedule schedule(row_blocks(sweep), 1, Writes::kRows, 1);
  schedule.run(worth(workers, sweep), level.triplet_bytes(sweep), [&](const Task& task, void* memory) {
    const int64_t panel = task.rows.begin;
    level.triplets(sweep, job, panel, memory);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      while (turns[tile].load(std::memory_order_acquire) != panel) std::this_thread::yield();
      level.triplet_columns(sweep, job, panel, tile, memory);
      turns[tile].store(panel + 1, std::memory_order_release);
    }
  });
  for (size_t j = 0; j < column_sums.size(); ++j) results.column_sums[j] = static_cast<float>(column_sums[j]);
}

}  // namespace fastcl::cpu
