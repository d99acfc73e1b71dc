// In which order, and on which threads, the blocks of S are computed.
#pragma once

#include <vector>

#include "level.h"

namespace fastcl::cpu {

// Which axes a sweep accumulates along. A symmetric sweep visits the blocks on and above the diagonal, and both axes
// are the same accumulators.
enum class Writes { kRows, kColumns, kBoth, kSymmetric };

// The tasks of a sweep in an order that says everything about the result: an accumulator receives its tasks one after
// another in this order, whatever the number of threads. Neighbouring tasks write to different accumulators, so that
// threads that take them in turn seldom wait.
class Schedule {
 public:
  // max_lanes bounds the copies of the accumulators of an axis that is too short to occupy many threads.
  Schedule(int64_t row_blocks, int64_t column_blocks, Writes writes, int64_t max_lanes);

  int64_t row_lanes() const { return row_lanes_; }
  int64_t column_lanes() const { return column_lanes_; }

  // Runs body(task, workspace) for every task.
  void run(const Workers& workers, size_t workspace_bytes, const std::function<void(const Task&, void*)>& body) const;

 private:
  struct Entry {
    Task task;
    int64_t row_slot;  // accumulators the task writes, -1 for none, and the number of tasks that must precede it there
    int64_t row_turn;
    int64_t column_slot;
    int64_t column_turn;
  };

  void add(const Task& task, int64_t row_slot, int64_t column_slot);
  void add_tournament(int64_t blocks);
  void add_rectangle(int64_t row_blocks, int64_t column_blocks, int64_t max_lanes);
  std::vector<Entry> entries_;
  std::vector<int64_t> turns_;  // tasks planned so far for each accumulator
  int64_t row_lanes_ = 1;
  int64_t column_lanes_ = 1;
};

// Rows and columns of a tile, and rows in a block of tiles along an axis of this length: from the shape alone, so that
// results do not depend on the machine's load or threads.
int64_t tile_size(int64_t rows, int64_t columns, int64_t depth);
int64_t block_size(int64_t length, int64_t tile);

// The number of panels of whole rows (see panel_task.h), or 0 where they would be too low or too few to pay. `kept`
// says whether exp(S - shift) of a panel is kept.
int64_t panel_count(const Sweep& sweep, bool kept);

// `workers`, or one thread where the problem is too small for more to pay.
Workers worth(const Workers& workers, const Sweep& sweep);

}  // namespace fastcl::cpu
