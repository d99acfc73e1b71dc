// Tiles of A @ B.T on Hopper: a producer fills the ring of stages by TMA, always as far ahead as it is long, and two
// consumers take turns to multiply by wgmma. So the exponentials of one tile are computed while the tensor cores work
// on the other one's. The counterpart of product.h.
#pragma once

#include "hopper_order.h"
#include "hopper_primitives.h"
#include "precision.h"

namespace fastcl::cuda::hopper {

// What a thread holds of a tile: the number at its u-th row and v-th column.
struct Accumulators {
  float products[kTile / kProductRows][kProductNumbers];

  FASTCL_DEVICE float& at(int u, int v) {
    return products[WarpgroupFragments::product(u)][WarpgroupFragments::number(u, v)];
  }
  FASTCL_DEVICE float at(int u, int v) const {
    return products[WarpgroupFragments::product(u)][WarpgroupFragments::number(u, v)];
  }
};

// Barriers by number: one for each consumer's threads, and one for each consumer's turn.
constexpr int kTeamBarrier = 1;
constexpr int kTurnBarrier = kTeamBarrier + kConsumers;

// A consumer's threads, which share a tile.
struct WarpgroupTeam : WarpgroupFragments {
  using Accumulators = hopper::Accumulators;

  FASTCL_DEVICE static int consumer() { return thread_index() / kWarpgroup - 1; }
  FASTCL_DEVICE static int thread() { return thread_index() % kWarpgroup; }
  FASTCL_DEVICE static void sync() { sync_some(kTeamBarrier + consumer(), kWarpgroup); }
  FASTCL_DEVICE static bool any(bool predicate) {
    return any_of_some(kTeamBarrier + consumer(), kWarpgroup, predicate);
  }
};

// As FrugalBlockTeam.
struct FrugalWarpgroupTeam : WarpgroupTeam {
  FASTCL_DEVICE static int thread() { return thread_index_anew() % kWarpgroup; }
};

// Stages, and rows of A that stay for a while. What is in a place belongs to the producer until `full`, then to a
// consumer until `empty`.
template <int kKept>
struct Ring {
  alignas(1024) unsigned char places[Places<kKept>::kCount][kOperandBytes];
  Barrier full[kStages];
  Barrier empty[kStages];
  Barrier rows_full[kConsumers];
  Barrier rows_empty[kConsumers];
};

// A and B, and how many blocks of depth and elements of one they have.
struct MappedOperands {
  TensorMap a;
  TensorMap b;
  int blocks_of_depth;
  int block_elements;
};

FASTCL_DEVICE void multiply_step(BFloat16, float (&c)[kProductNumbers], uint64_t a, uint64_t b, bool add) {
  multiply_bfloat16(c, a, b, add);
}
FASTCL_DEVICE void multiply_step(Float16, float (&c)[kProductNumbers], uint64_t a, uint64_t b, bool add) {
  multiply_float16(c, a, b, add);
}

// The producer's only thread at work.
template <int kKept>
class Loader {
 public:
  FASTCL_DEVICE Loader(const MappedOperands& x, Ring<kKept>& ring)
      : x_(x), ring_(ring), places_(x.blocks_of_depth), at_(0) {}

  template <class Walk>
  FASTCL_DEVICE void load_tile(int consumer, const Walk& walk, TileRows& rows) {
    if (places_.keeps_rows && rows.begin()) load_rows(consumer, walk.i(), rows.parity());
    for (int k = 0; k < x_.blocks_of_depth; ++k) {
      const int stage = at_.stage();
      Barrier& full = ring_.full[stage];
      wait(ring_.empty[stage], at_.parity() ^ 1);
      arrive_and_expect(full, places_.keeps_rows ? kOperandBytes : 2 * kOperandBytes);
      if (!places_.keeps_rows) load(x_.a, walk.i(), k, places_.of_a(consumer, k, stage), full);
      load(x_.b, walk.j(), k, places_.of_b(stage), full);
      at_.next();
    }
    rows.next_tile(walk.ends_row());
  }

 private:
  FASTCL_DEVICE void load_rows(int consumer, int i, uint32_t parity) {
    Barrier& full = ring_.rows_full[consumer];
    wait(ring_.rows_empty[consumer], parity ^ 1);
    arrive_and_expect(full, x_.blocks_of_depth * kOperandBytes);
    for (int k = 0; k < x_.blocks_of_depth; ++k) load(x_.a, i, k, places_.of_a(consumer, k, 0), full);
  }

  FASTCL_DEVICE void load(const TensorMap& map, int row, int block, int place, Barrier& full) {
    load_box(ring_.places[place], map, block * x_.block_elements, row, full);
  }

  const MappedOperands& x_;
  Ring<kKept>& ring_;
  const Places<kKept> places_;
  RingPosition at_;
};

template <int kKept, class Work>
FASTCL_DEVICE void produce(const MappedOperands& x, const Work& work, Ring<kKept>& ring) {
  prefetch(x.a);
  prefetch(x.b);
  auto first = work.walk(0);
  auto second = work.walk(1);
  TileRows first_rows, second_rows;
  Loader<kKept> loader(x, ring);
  while (!first.done() || !second.done()) {
    if (!first.done()) {
      loader.load_tile(0, first, first_rows);
      first.next();
    }
    if (!second.done()) {
      loader.load_tile(1, second, second_rows);
      second.next();
    }
  }
}

// Once each warp of a consumer has read a place.
FASTCL_DEVICE void release(Barrier& empty) {
  if (lane_of(thread_index()) == 0) arrive(empty);
}

// Starts a tile's products and returns the stage of the last, under way when this returns; all others are released.
template <class Precision, int kKept>
FASTCL_DEVICE int multiply_tile(RingPosition at, int blocks_of_depth, Ring<kKept>& ring, Accumulators& sums) {
  const Places<kKept> places(blocks_of_depth);
  const int consumer = WarpgroupTeam::consumer();
  int before = 0;
  for (int k = 0; k < blocks_of_depth; ++k) {
    const int stage = at.stage();
    wait(ring.full[stage], at.parity());
    const uint64_t a = matrix_descriptor(shared_address(ring.places[places.of_a(consumer, k, stage)]));
    const uint64_t b = matrix_descriptor(shared_address(ring.places[places.of_b(stage)]));
    begin_products();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int p = 0; p < kTile / kProductRows; ++p) {
        multiply_step(Precision(), sums.products[p], advance(a, p * kProductRows * kDepthBytes + step * kStepBytes),
                      advance(b, step * kStepBytes), k > 0 || step > 0);
      }
    }
    commit_products();
    if (k > 0) {
      wait_for_products<1>();
      release(ring.empty[before]);
    }
    before = stage;
    at.next();
  }
  return before;
}

// Calls consume(walk, sums) with each tile's products. Between two calls, and before the first, the consumer's threads
// have met.
template <class Precision, int kKept, class Work, class Consume>
FASTCL_DEVICE void consume_tiles(int blocks_of_depth, const Work& work, Ring<kKept>& ring, Consume consume) {
  const int consumer = WarpgroupTeam::consumer();
  const bool keeps_rows = Places<kKept>(blocks_of_depth).keeps_rows;
  const Turns turns{consumer, work.tiles(1 - consumer)};
  TileRows rows;
  int64_t n = 0;
  for (auto walk = work.walk(consumer); !walk.done(); walk.next()) {
    Accumulators sums;
    if (keeps_rows && rows.begin()) wait(ring.rows_full[consumer], rows.parity());
    if (turns.follows_other(n)) sync_some(kTurnBarrier + consumer, kConsumers * kWarpgroup);
    const RingPosition at(turns.before(n) * blocks_of_depth);
    const int last = multiply_tile<Precision>(at, blocks_of_depth, ring, sums);
    // The other one's products queue up behind these.
    if (turns.precedes_other(n)) arrive_at_some(kTurnBarrier + 1 - consumer, kConsumers * kWarpgroup);
    wait_for_products<0>();
#pragma unroll
    for (auto& product : sums.products) {
#pragma unroll
      for (float& x : product) settle(x);
    }
    release(ring.empty[last]);
    if (keeps_rows && walk.ends_row()) release(ring.rows_empty[consumer]);
    rows.next_tile(walk.ends_row());
    WarpgroupTeam::sync();
    consume(walk, sums);
    ++n;
  }
}

template <int kKept>
FASTCL_DEVICE void init(Ring<kKept>& ring) {
  if (thread_index() == 0) {
    constexpr int kWarps = kWarpgroup / kLanes;
    for (Barrier& full : ring.full) init(full, 1);
    for (Barrier& full : ring.rows_full) init(full, 1);
    for (Barrier& empty : ring.empty) init(empty, kWarps);
    for (Barrier& empty : ring.rows_empty) init(empty, kWarps);
    publish_barriers();
  }
  sync_threads();
}

// All of a block: `make_consume()` is called by consumers alone.
template <class Precision, int kKept, class Work, class MakeConsume>
FASTCL_DEVICE void for_each_tile(const MappedOperands& x, const Work& work, Ring<kKept>& ring,
                                 MakeConsume make_consume) {
  init(ring);
  if (thread_index() < kWarpgroup) {
    give_registers<kProducerRegisters>();
    if (thread_index() == 0) produce(x, work, ring);
  } else {
    take_registers<kConsumerRegisters>();
    consume_tiles<Precision>(x.blocks_of_depth, work, ring, make_consume());
  }
}

}  // namespace fastcl::cuda::hopper
