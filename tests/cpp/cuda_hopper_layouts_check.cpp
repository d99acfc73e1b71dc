// What the Hopper path decides by arithmetic alone: layouts, descriptors, the accumulator's map, the phases of the
// ring, turns, and which consumer has which tiles. Exits with 1 where one is wrong.
#include <algorithm>
#include <cstdio>
#include <deque>
#include <map>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "../../csrc/cuda/hopper_order.h"
#include "cuda_layouts.h"

namespace {

using namespace fastcl::cuda;
using hopper::WarpgroupFragments;

// TMA's swizzle over 128 bytes, and wgmma's: bits 4-6 of an address are XORed with bits 7-9.
int swizzled(int address) { return address ^ (address >> 7 & 7) << 4; }

void operand_layout() {
  std::set<int> offsets;
  for (int row = 0; row < kTile; ++row) {
    for (int byte = 0; byte < hopper::kDepthBytes; ++byte) {
      const int offset = hopper::operand_offset(row, byte);
      check(offset == swizzled(row * hopper::kDepthBytes + byte), "the swizzle of an operand");
      offsets.insert(offset);
    }
  }
  check(offsets.size() == hopper::kOperandBytes && *offsets.rbegin() == hopper::kOperandBytes - 1, "operand layout");
  for (int row = 0; row < kTile; row += 8) {
    for (int chunk = 0; chunk < hopper::kDepthBytes / kChunkBytes; ++chunk) {
      std::vector<int> rows;
      for (int k = 0; k < 8; ++k) rows.push_back(hopper::operand_offset(row + k, chunk * kChunkBytes));
      check(conflicts(rows, kChunkBytes) == 0, "eight rows of an operand meet a bank");
    }
  }
}

// The fields of a descriptor, and that what the hardware reads by them is what TMA wrote.
void descriptors() {
  for (int stage = 0; stage < 2 * hopper::kStages; ++stage) {
    const int origin = stage * hopper::kOperandBytes;
    const uint64_t whole = hopper::matrix_descriptor(origin);
    for (int product = 0; product < kTile / hopper::kProductRows; ++product) {
      for (int step = 0; step < hopper::kSteps; ++step) {
        const int bytes = product * hopper::kProductRows * hopper::kDepthBytes + step * hopper::kStepBytes;
        const uint64_t descriptor = hopper::advance(whole, bytes);
        const int first = static_cast<int>(descriptor & 0x3fff) * 16;
        const int stride = static_cast<int>(descriptor >> 32 & 0x3fff) * 16;
        check(first == origin + bytes && stride == 1024, "a descriptor's address and stride");
        check(descriptor >> 62 == 1 && (descriptor >> 46 & 0xffff) == 0, "a descriptor's swizzle and base");
        check((descriptor >> 14 & 3) == 0 && (descriptor >> 30 & 3) == 0, "a descriptor's unused bits");
        for (int row = 0; row < hopper::kProductRows; ++row) {
          for (int byte = 0; byte < hopper::kStepBytes; ++byte) {
            const int read = swizzled(first + row / 8 * stride + row % 8 * hopper::kDepthBytes + byte);
            const int written =
                hopper::operand_offset(product * hopper::kProductRows + row, step * hopper::kStepBytes + byte);
            check(read == origin + written, "what a product reads");
          }
        }
      }
    }
  }
  const uint64_t last = hopper::matrix_descriptor(hopper::kMostSharedBytes / 1024 * 1024);
  check((last & 0x3fff) * 16 == hopper::kMostSharedBytes / 1024 * 1024, "the last address");
}

// What is in shared memory at a time lies in places of its own.
template <int kKept>
void places() {
  for (int blocks = 1; blocks <= kKept + 2; ++blocks) {
    const hopper::Places<kKept> places(blocks);
    check(places.keeps_rows == (blocks <= kKept), "which rows are kept");
    std::set<int> taken;
    int count = 0;
    for (int stage = 0; stage < hopper::kStages; ++stage) {
      taken.insert(places.of_b(stage));
      if (!places.keeps_rows) taken.insert(places.of_a(0, 0, stage));
      count += places.keeps_rows ? 1 : 2;
    }
    for (int consumer = 0; places.keeps_rows && consumer < hopper::kConsumers; ++consumer) {
      for (int block = 0; block < blocks; ++block, ++count) taken.insert(places.of_a(consumer, block, 1));
    }
    check(static_cast<int>(taken.size()) == count, "two operands in one place");
    check(*taken.begin() >= 0 && *taken.rbegin() < places.kCount, "a place beyond the last");
  }
}

// By the PTX manual, register r of warp w, with g = lane / 4 and t = lane % 4, has row 16 w + g + 8 (r / 2 % 2) and
// column 8 (r / 4) + 2 t + r % 2.
void accumulators() {
  for (int thread = 0; thread < hopper::kWarpgroup; ++thread) {
    std::set<std::pair<int, int>> numbers;
    for (int u = 0; u < WarpgroupFragments::kRows; ++u) {
      for (int v = 0; v < WarpgroupFragments::kColumns; ++v) {
        const int product = WarpgroupFragments::product(u), r = WarpgroupFragments::number(u, v);
        const int lane = thread % 32;
        check(WarpgroupFragments::row(thread, u) == product * 64 + thread / 32 * 16 + lane / 4 + r / 2 % 2 * 8,
              "a row");
        check(WarpgroupFragments::column(thread, v) == r / 4 * 8 + lane % 4 * 2 + r % 2, "a column");
        numbers.insert({product, r});
      }
    }
    check(numbers.size() == 2 * hopper::kProductNumbers && numbers.rbegin()->second == hopper::kProductNumbers - 1,
          "one place for each number");
  }
}

// A barrier with phases, as mbarrier is: whether one of a parity is over.
struct Phases {
  int done = 0;
  bool over(uint32_t parity) const { return static_cast<uint32_t>(done) % 2 != parity; }
};

// The producer and two consumers, whose steps are taken in any order that barriers and turns allow. A consumer releases
// a block one step after it has begun with the next one, as the kernels do.
void ring(int64_t first_tiles, int64_t second_tiles, int blocks, std::mt19937& generator) {
  const int64_t tiles[] = {first_tiles, second_tiles};
  struct Filled {
    int consumer;
    int64_t tile;
    int block;
  };
  std::vector<Filled> order;
  for (int64_t n = 0; n < std::max(tiles[0], tiles[1]); ++n) {
    for (int c = 0; c < 2; ++c) {
      for (int b = 0; n < tiles[c] && b < blocks; ++b) order.push_back({c, n, b});
    }
  }
  Phases full[hopper::kStages], empty[hopper::kStages];
  int held[hopper::kStages];  // the place in `order` of what is in a stage and not released, or -1
  std::fill(held, held + hopper::kStages, -1);
  hopper::RingPosition producer(0);
  size_t produced = 0;
  struct Consumer {
    int64_t tile = 0;
    int block = 0;
    bool has_turn = false;
    std::vector<int> unreleased;
    int turns_given = 0;
    int turns_taken = 0;
  } consumers[2];
  const auto release = [&](Consumer& consumer) {
    const int stage = consumer.unreleased.front();
    consumer.unreleased.erase(consumer.unreleased.begin());
    held[stage] = -1;
    ++empty[stage].done;
  };
  for (int idle = 0; idle < 1000;) {
    ++idle;
    const int who = static_cast<int>(generator() % 3);
    if (who == 2) {
      if (produced == order.size() || !empty[producer.stage()].over(producer.parity() ^ 1)) continue;
      check(held[producer.stage()] == -1, "a stage is overwritten before it is released");
      held[producer.stage()] = static_cast<int>(produced++);
      ++full[producer.stage()].done;
      producer.next();
      idle = 0;
      continue;
    }
    Consumer& consumer = consumers[who];
    const hopper::Turns turns{who, tiles[1 - who]};
    if (consumer.tile == tiles[who]) continue;
    if (consumer.block == 0 && !consumer.has_turn) {
      if (turns.follows_other(consumer.tile)) {
        if (consumers[1 - who].turns_given == consumer.turns_taken) continue;
        ++consumer.turns_taken;
      }
      consumer.has_turn = true;
      idle = 0;
      continue;
    }
    if (consumer.block < blocks) {
      hopper::RingPosition at(turns.before(consumer.tile) * blocks);
      for (int k = 0; k < consumer.block; ++k) at.next();
      if (!full[at.stage()].over(at.parity())) continue;
      const int place = held[at.stage()];
      check(place >= 0 && order[place].consumer == who && order[place].tile == consumer.tile &&
                order[place].block == consumer.block,
            "a consumer finds its own block");
      consumer.unreleased.push_back(at.stage());
      if (consumer.unreleased.size() > 1) release(consumer);
      if (++consumer.block == blocks && turns.precedes_other(consumer.tile)) ++consumer.turns_given;
    } else {
      release(consumer);
      consumer.block = 0;
      consumer.has_turn = false;
      ++consumer.tile;
    }
    idle = 0;
  }
  for (int c = 0; c < 2; ++c) {
    check(consumers[c].tile == tiles[c], "a consumer does all of its tiles");
    check(consumers[c].turns_given == consumers[1 - c].turns_taken, "each turn that is given is taken");
  }
  check(produced == order.size(), "all blocks are loaded");
}

void rings() {
  std::mt19937 generator(1);
  for (int64_t first = 0; first <= 5; ++first) {
    for (int64_t second = 0; second <= 5; ++second) {
      for (int blocks : {1, 2, 3, 4, 5, 9}) ring(first, second, blocks, generator);
    }
  }
  ring(100, 37, 3, generator);
  // Where the position leaves 32 bits.
  const int64_t far = (int64_t{1} << 32) * 5 + 3;
  const hopper::RingPosition at(far), before(far % (2 * hopper::kStages));
  check(at.stage() == before.stage() && at.parity() == before.parity(), "a position far along");
}

// Each super-tile is walked by one consumer, whole and in order, and each consumer knows how many tiles the other has.
void sweep_work(int n, int m, int most, bool symmetric, int blocks) {
  const SuperAxis rows = super_axis(n, most), columns = super_axis(m, most);
  const int items = super_tiles(rows, columns, symmetric);
  std::map<std::pair<int, int>, std::deque<std::pair<int, int>>> left;
  for (int item = 0; item < items; ++item) {
    const SuperTile at = super_tile(item, columns, symmetric);
    auto& tiles = left[{at.r, at.c}];
    for (SuperTileWalk walk(at, rows, columns, symmetric); !walk.done(); walk.next()) {
      tiles.push_back({walk.i(), walk.j()});
    }
    check(static_cast<int64_t>(tiles.size()) == tiles_of(at, rows, columns, symmetric), "tiles of a super-tile");
  }
  std::map<std::pair<int, int>, int> owners;
  for (int block = 0; block < blocks; ++block) {
    const hopper::SweepWork work{rows, columns, symmetric, block, blocks};
    for (int consumer = 0; consumer < hopper::kConsumers; ++consumer) {
      int64_t count = 0;
      hopper::TileRows rows;
      uint32_t parity = 1;
      int i = -1;
      for (auto walk = work.walk(consumer); !walk.done(); walk.next(), ++count) {
        check(rows.begin() || walk.i() == i, "rows of A change where a row of tiles begins");
        check(!rows.begin() || rows.parity() != parity, "rows of tiles alternate in parity");
        if (rows.begin()) parity = rows.parity();
        i = walk.i();
        rows.next_tile(walk.ends_row());
        auto& tiles = left[{walk.at().r, walk.at().c}];
        check(!tiles.empty() && tiles.front() == std::make_pair(walk.i(), walk.j()), "tiles come in their order");
        if (!tiles.empty()) tiles.pop_front();
        const int me = block * hopper::kConsumers + consumer;
        check(owners.emplace(std::make_pair(walk.at().r, walk.at().c), me).first->second == me, "one owner");
      }
      check(count == work.tiles(consumer), "how many tiles a consumer has");
    }
  }
  for (const auto& [at, tiles] : left) check(tiles.empty(), "every tile of a sweep");
}

void panel_work(const Panel& panel, int blocks) {
  std::set<std::pair<int, int>> tiles;
  int64_t all = 0;
  for (int block = 0; block < blocks; ++block) {
    const hopper::PanelWork work{panel, block, blocks};
    for (int consumer = 0; consumer < hopper::kConsumers; ++consumer) {
      int64_t count = 0;
      for (auto walk = work.walk(consumer); !walk.done(); walk.next(), ++count) tiles.insert({walk.i(), walk.j()});
      check(count == work.tiles(consumer), "how many tiles of a panel a consumer has");
      all += count;
    }
  }
  check(all == panel_tiles(panel) && static_cast<int64_t>(tiles.size()) == all, "each tile of a panel once");
}

void work() {
  for (int blocks : {1, 2, 3, 7, 132}) {
    for (int most : {1, 2, 5}) {
      for (int n = 1; n <= 9 * kTile; n += 173) {
        sweep_work(n, n, most, true, blocks);
        for (int m = 1; m <= 7 * kTile; m += 211) sweep_work(n, m, most, false, blocks);
      }
    }
    sweep_work(70 * kTile - 5, 70 * kTile - 5, kMostSuperTiles, true, blocks);
    panel_work({256, 1500, 128, 3000, false}, blocks);
    panel_work({256, 1500, 256, 1500, true}, blocks);
  }
}

}  // namespace

int main() {
  fragment_maps<WarpgroupFragments>();
  staged_layout<WarpgroupFragments>();
  counted_pairs_of<WarpgroupFragments>();
  operand_layout();
  descriptors();
  accumulators();
  places<0>();
  places<1>();
  places<4>();
  rings();
  work();
  return report();
}
