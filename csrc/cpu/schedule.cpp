#include "schedule.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <thread>

namespace fastcl::cpu {
namespace {

// Enough tasks side by side for this many threads, where the shape allows it.
constexpr int64_t kWidth = 32;
// A block of two tiles packs its columns once for both and finds its rows closer, which is worth 3 to 4 %; but only
// half as many of them can be computed side by side.
constexpr int64_t kMaxBlocks = 40;

int64_t ceil_divide(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }

// Whether a sweep takes less time than it takes to wake other threads.
bool is_small(int64_t rows, int64_t columns, int64_t depth) {
  constexpr int64_t kSmall = int64_t{1} << 23;
  return rows * columns < kSmall / std::max<int64_t>(1, depth);
}

BlockRange one_block(int64_t block) { return {block, block + 1, 1}; }

}  // namespace

int64_t tile_size(int64_t rows, int64_t columns, int64_t depth) {
  // A large tile is read less often from beyond the second-level cache. A problem for several threads still needs
  // several of them.
  const int64_t largest = depth <= 1024 ? kMaxTile : kMaxTile / 2;
  const int64_t tiles = is_small(rows, columns, depth) ? 1 : 8;
  const int64_t wanted = ceil_divide(std::max(rows, columns), tiles * kTileUnit) * kTileUnit;
  return std::min(largest, wanted);
}

int64_t block_size(int64_t length, int64_t tile) {
  const int64_t tiles = ceil_divide(length, tile);
  return tile * std::max<int64_t>(1, ceil_divide(tiles, kMaxBlocks));
}

int64_t panel_count(const Sweep& sweep, bool kept) {
  constexpr int64_t kPanelBytes = int64_t{32} << 20;
  constexpr int64_t kLowest = 48;
  // Each panel packs all of y, so the fewer the better, as long as threads share them evenly.
  constexpr int64_t kEnough = 16;
  constexpr int64_t kEven = 4;
  constexpr int64_t kTooFew = 4;
  const int64_t rows = sweep.x.rows;
  const int64_t columns = sweep.y.rows;
  int64_t height = sweep.tile;
  if (kept) {
    const int64_t row_bytes = sizeof(float) * ceil_divide(columns, kMaxTile) * (kMaxTile + 16);
    height = std::min(height, kPanelBytes / row_bytes / kPanelUnit * kPanelUnit);
  }
  if (height < kLowest) return 0;
  const int64_t fewest = ceil_divide(rows, height);
  if (is_small(rows, columns, sweep.x.depth)) return fewest;
  const int64_t count = std::max(fewest, std::min(kEnough, ceil_divide(rows, kLowest)));
  return count < kTooFew ? 0 : ceil_divide(count, kEven) * kEven;
}

Workers worth(const Workers& workers, const Sweep& sweep) {
  Workers result = workers;
  if (is_small(sweep.x_count, sweep.y.rows, sweep.x.depth)) result.threads = 1;
  return result;
}

Schedule::Schedule(int64_t row_blocks, int64_t column_blocks, Writes writes, int64_t max_lanes) {
  switch (writes) {
    case Writes::kSymmetric:
      turns_.resize(row_blocks);
      add_tournament(row_blocks);
      break;
    case Writes::kRows:
      row_lanes_ = std::clamp<int64_t>(kWidth / row_blocks, 1, std::min(max_lanes, column_blocks));
      turns_.resize(row_blocks * row_lanes_);
      for (int64_t lane = 0; lane < row_lanes_; ++lane) {
        for (int64_t row = 0; row < row_blocks; ++row) {
          add({one_block(row), {lane, column_blocks, row_lanes_}, lane, 0}, lane * row_blocks + row, -1);
        }
      }
      break;
    case Writes::kColumns:
      column_lanes_ = std::clamp<int64_t>(kWidth / column_blocks, 1, std::min(max_lanes, row_blocks));
      turns_.resize(column_blocks * column_lanes_);
      for (int64_t lane = 0; lane < column_lanes_; ++lane) {
        for (int64_t column = 0; column < column_blocks; ++column) {
          add({{lane, row_blocks, column_lanes_}, one_block(column), 0, lane}, -1, lane * column_blocks + column);
        }
      }
      break;
    case Writes::kBoth:
      add_rectangle(row_blocks, column_blocks, max_lanes);
      break;
  }
}

void Schedule::add(const Task& task, int64_t row_slot, int64_t column_slot) {
  Entry entry{task, row_slot, 0, column_slot, 0};
  if (row_slot >= 0) entry.row_turn = turns_[row_slot]++;
  if (column_slot >= 0) entry.column_turn = turns_[column_slot]++;
  entries_.push_back(entry);
}

// The round-robin tournament: in a round every block meets another one, and after all rounds each has met each.
void Schedule::add_tournament(int64_t blocks) {
  const int64_t players = blocks + blocks % 2;
  for (int64_t round = 0; round + 1 < players; ++round) {
    for (int64_t table = 0; table < players / 2; ++table) {
      const int64_t circle = players - 1;
      const int64_t one = table == 0 ? circle : (round + table) % circle;
      const int64_t other = (round + circle - table) % circle;
      const int64_t row = std::min(one, other);
      const int64_t column = std::max(one, other);
      if (column < blocks) add({one_block(row), one_block(column), 0, 0}, row, column);
    }
  }
  for (int64_t block = 0; block < blocks; ++block) add({one_block(block), one_block(block), 0, 0}, block, -1);
}

// Cyclic rounds: in a round each row block meets another column block. Where one axis has few blocks, each of them is
// served by several lanes, lane p with the blocks p, p + lanes, p + 2 * lanes ... of the other axis.
void Schedule::add_rectangle(int64_t row_blocks, int64_t column_blocks, int64_t max_lanes) {
  const bool wide = row_blocks <= column_blocks;
  const int64_t few = std::min(row_blocks, column_blocks);
  const int64_t many = std::max(row_blocks, column_blocks);
  const int64_t lanes = std::clamp<int64_t>(kWidth / few, 1, std::min(max_lanes, many / few));
  (wide ? row_lanes_ : column_lanes_) = lanes;
  turns_.resize(lanes * few + many);
  const int64_t rounds = ceil_divide(many, lanes);
  for (int64_t round = 0; round < rounds; ++round) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      for (int64_t block = 0; block < few; ++block) {
        const int64_t other = lane + lanes * ((block + round) % rounds);
        if (other >= many) continue;
        const int64_t few_slot = lane * few + block;
        const int64_t many_slot = lanes * few + other;
        if (wide) {
          add({one_block(block), one_block(other), lane, 0}, few_slot, many_slot);
        } else {
          add({one_block(other), one_block(block), 0, lane}, many_slot, few_slot);
        }
      }
    }
  }
}

void Schedule::run(const Workers& workers, size_t workspace_bytes,
                   const std::function<void(const Task&, void*)>& body) const {
  constexpr size_t kAlignment = 64;
  const int64_t count = static_cast<int64_t>(entries_.size());
  const int64_t threads = std::clamp<int64_t>(workers.threads, 1, count);
  const size_t bytes = (workspace_bytes + kAlignment - 1) / kAlignment * kAlignment;
  const auto release = [](char* p) { ::operator delete(p, std::align_val_t{kAlignment}); };
  const std::unique_ptr<char, decltype(release)> memory(
      static_cast<char*>(::operator new(bytes * threads, std::align_val_t{kAlignment})), release);
  std::atomic<int64_t> next{0};
  std::vector<std::atomic<int64_t>> done(turns_.size());
  const auto await = [&](int64_t slot, int64_t turn) {
    while (slot >= 0 && done[slot].load(std::memory_order_acquire) != turn) std::this_thread::yield();
  };
  const auto pass_on = [&](int64_t slot, int64_t turn) {
    if (slot >= 0) done[slot].store(turn + 1, std::memory_order_release);
  };
  // Tasks are taken in order, so the ones a thread waits for are running or done: no deadlock.
  const auto work = [&](int64_t worker) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
      const Entry& entry = entries_[i];
      await(entry.row_slot, entry.row_turn);
      await(entry.column_slot, entry.column_turn);
      body(entry.task, memory.get() + worker * bytes);
      pass_on(entry.row_slot, entry.row_turn);
      pass_on(entry.column_slot, entry.column_turn);
    }
  };
  if (threads == 1) {
    work(0);
  } else {
    workers.parallel_for(threads, work);
  }
}

}  // namespace fastcl::cpu
