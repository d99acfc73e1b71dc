// A panel of S by a function of its pairs (pair_functions.h): numbers of its rows, W, and what W sums up to.
//
// A tile of S goes to shared memory, where two threads share a row: what is known of the row is in their registers, and
// what it comes to, too. A function is then written once in a loop and not once for each number of an accumulator, so
// that a kernel has all of them.
#pragma once

#include "pair_functions.h"
#include "product.h"
#include "staging.h"

namespace fastcl::cuda {

constexpr int kThreadsOfRow = kThreads / kTile;
static_assert(kThreadsOfRow == 2, "a row's threads merge by one shuffle, and what a warp reads falls on all banks");

// What is known of a tile's columns.
struct ColumnFacts : AxisTags {
  float params[kMostParams][kTile];
};

struct PairsMemory {
  alignas(128) unsigned char tile[kStages * kStageBytes];
  ColumnFacts columns;
  float column_sums[kThreadsOfRow][kTile];
};
static_assert(kTile * kTile * 4 <= kStages * kStageBytes, "a tile of S is staged where the operands were");

// Numbers of the staged tile, side by side.
struct alignas(kChunkBytes) Four {
  float at[4];
};

// A block's tile.
class PairTile {
 public:
  FASTCL_DEVICE PairTile(const PairsArguments& x, PairsMemory& memory, SuperTile at)
      : x_(x), memory_(memory), row0_(at.r * kTile), column0_(at.c * kTile) {}

  FASTCL_DEVICE void load_columns() {
    const int k = thread_index();
    if (k >= kTile) return;
    const int j = smaller(j0() + k, x_.operands.b.count - 1);
    if (x_.column_tags.labels != nullptr) memory_.columns.labels[k] = x_.column_tags.labels[j];
    if (x_.column_tags.ids != nullptr) memory_.columns.ids[k] = x_.column_tags.ids[j];
    for (int p = 0; p < kMostParams; ++p) memory_.columns.params[p][k] = x_.column_params.at(p, j);
  }

  // The staged products become W.
  template <class Function>
  FASTCL_DEVICE void evaluate() {
    const int part = thread_index() % kThreadsOfRow;
    const Row row(x_, row0_, column0_, thread_index() / kThreadsOfRow);
    Function function(x_, row.i);
    float weights = 0.0f;
#pragma unroll 1
    for (int column = 4 * part; column < kTile; column += 4 * kThreadsOfRow) {
      Four four = four_staged(row.in_tile, column);
#pragma unroll
      for (int l = 0; l < 4; ++l) {
        four.at[l] = has(row, column + l) ? function(pair(row, column + l, four.at[l])) : 0.0f;
        weights += four.at[l];
      }
      four_staged(row.in_tile, column) = four;
    }
    function.merge();
    weights += shuffle_xor(weights, 1);
    if (part != 0 || !row.inside) return;
    if constexpr (Function::kSums > 0) {
#pragma unroll
      for (int t = 0; t < Function::kSums; ++t) {
        if (t < x_.number_of_sums) x_.sums[row_slot(t, row)] = function.sums[t];
      }
    }
    if (x_.row_weights != nullptr) x_.row_weights[row_slot(0, row)] = weights;
  }

  // The sums of the staged numbers along columns.
  FASTCL_DEVICE void sum_columns(float* out) {
    sum_columns(out, [this](int row, int column) { return staged(row, column); });
  }

  // The gradients of the columns' parameter, from the staged products: each pair is looked at once more.
  FASTCL_DEVICE void sum_column_gradients() {
    sum_columns(x_.column_gradients, [this](int row_in_tile, int column) {
      const Row row(x_, row0_, column0_, row_in_tile);
      const PositivePairs function(x_, row.i);
      return has(row, column) ? function.column_gradient(pair(row, column, staged(row_in_tile, column))) : 0.0f;
    });
  }

  // W into the panel, row by row in whole chunks.
  template <class Precision>
  FASTCL_DEVICE void store() const {
    constexpr int kElements = kChunkBytes / Precision::kBytes;
    constexpr int kAcross = kTile / kElements;
    const float multiplier = x_.multiplier == nullptr ? 1.0f : *x_.multiplier;
    for (int k = thread_index(); k < kTile * kAcross; k += kThreads) {
      const int row = k / kAcross;
      const int column = k % kAcross * kElements;
      Chunk chunk;
#pragma unroll
      for (int l = 0; l < kElements; l += 4) {
        const Four four = four_staged(row, column + l);
        unsigned char* const to = reinterpret_cast<unsigned char*>(chunk.words) + l * Precision::kBytes;
        Precision::store(to, four.at[0] * multiplier, four.at[1] * multiplier);
        Precision::store(to + 2 * Precision::kBytes, four.at[2] * multiplier, four.at[3] * multiplier);
      }
      unsigned char* const to =
          x_.out + (int64_t{row0_} + row) * x_.out_pitch + (int64_t{column0_} + column) * Precision::kBytes;
      *reinterpret_cast<Chunk*>(to) = chunk;
    }
  }

 private:
  // What is known of a row of the tile; one over the edge repeats the last.
  struct Row {
    int in_tile;
    int in_panel;
    bool inside;
    int i;
    int64_t own;  // the column of its own key, which may lie outside of S
    uint64_t label;
    uint64_t id;
    float scale;
    float bias;
    const float* guide;  // from the tile's first column on

    FASTCL_DEVICE Row(const PairsArguments& x, int row0, int column0, int row)
        : in_tile(row),
          in_panel(row0 + row),
          inside(in_panel < x.panel.row_end - x.panel.row_begin),
          i(smaller(x.panel.row_begin + in_panel, x.panel.row_end - 1)),
          own((x.row0 == nullptr ? 0 : *x.row0) + i),
          label(x.row_tags.labels == nullptr ? 0 : x.row_tags.labels[i]),
          id(x.row_tags.ids == nullptr ? 0 : x.row_tags.ids[i]),
          scale(*x.scale),
          bias(*x.bias),
          guide(x.guide == nullptr
                    ? nullptr
                    : x.guide + int64_t{in_panel} * (x.panel.column_end - x.panel.column_begin) + column0) {}
  };

  FASTCL_DEVICE int j0() const { return x_.panel.column_begin + column0_; }

  FASTCL_DEVICE Four& four_staged(int row, int column) const {
    return *reinterpret_cast<Four*>(memory_.tile + staged_offset(row, column, 4));
  }
  FASTCL_DEVICE float staged(int row, int column) const {
    return *reinterpret_cast<const float*>(memory_.tile + staged_offset(row, column, 4));
  }

  FASTCL_DEVICE bool has(const Row& row, int column) const { return row.inside && j0() + column < x_.panel.column_end; }

  FASTCL_DEVICE Pair pair(const Row& row, int column, float product) const {
    const ColumnFacts& columns = memory_.columns;
    const int j = j0() + column;
    Pair pair;
    pair.s = product * row.scale + row.bias;
    pair.guide = row.guide == nullptr ? 0.0f : row.guide[column];
#pragma unroll
    for (int p = 0; p < kMostParams; ++p) pair.params[p] = columns.params[p][column];
    pair.column = j;
    pair.is_own = j == row.own;
    pair.same_label = x_.row_tags.labels != nullptr && row.label == columns.labels[column];
    pair.same_id = x_.row_tags.ids != nullptr && row.id == columns.ids[column];
    return pair;
  }

  FASTCL_DEVICE int64_t row_slot(int number, const Row& row) const {
    return partial_index(number, column0_ / kTile, row.in_panel, tiles_across(x_.panel),
                         x_.panel.row_end - x_.panel.row_begin);
  }

  // What number(row, column) comes to along the columns of the tile. The block meets after the last of them.
  template <class Number>
  FASTCL_DEVICE void sum_columns(float* out, Number number) {
    constexpr int kRows = kTile / kThreadsOfRow;
    const int column = thread_index() % kTile;
    const int part = thread_index() / kTile;
    float sum = 0.0f;
#pragma unroll 4
    for (int row = part * kRows; row < (part + 1) * kRows; ++row) sum += number(row, column);
    memory_.column_sums[part][column] = sum;
    sync_threads();
    const int width = x_.panel.column_end - x_.panel.column_begin;
    if (part != 0 || column0_ + column >= width) return;
    out[partial_index(0, row0_ / kTile, column0_ + column, tiles_down(x_.panel), width)] =
        memory_.column_sums[0][column] + memory_.column_sums[1][column];
  }

  const PairsArguments& x_;
  PairsMemory& memory_;
  const int row0_;  // in the panel
  const int column0_;
};

// Calls call(type) with the function's.
template <class Function>
struct TypeOf {
  using Type = Function;
};
template <class Call>
FASTCL_DEVICE void for_function(PairFunction function, Call call) {
  switch (function) {
    case PairFunction::kQuestions:
      return call(TypeOf<Questions>());
    case PairFunction::kContrastive:
      return call(TypeOf<Contrastive>());
    case PairFunction::kPositivePairs:
      return call(TypeOf<PositivePairs>());
    case PairFunction::kNegatives:
      return call(TypeOf<Negatives>());
    case PairFunction::kNegativesWeights:
      return call(TypeOf<NegativesWeights>());
    case PairFunction::kEnergySoftmax:
    case PairFunction::kEnergyUniform:
    case PairFunction::kEnergyPower:
      return call(TypeOf<Energy>());
    case PairFunction::kEnergySoftmaxWeights:
    case PairFunction::kEnergyUniformWeights:
    case PairFunction::kEnergyPowerWeights:
      return call(TypeOf<EnergyWeights>());
    case PairFunction::kSoftTargets:
      return call(TypeOf<SoftTargets>());
    case PairFunction::kSoftTargetsWeights:
      return call(TypeOf<SoftTargetsWeights>());
    case PairFunction::kSimilarities:
      return call(TypeOf<Similarities>());
    case PairFunction::kNearest:
      return call(TypeOf<Nearest>());
    case PairFunction::kHardest:
      return call(TypeOf<Hardest>());
  }
}

// A block has one tile of the panel. The function is an argument and not a template's, the same for all threads.
template <class Precision>
FASTCL_KERNEL(kThreads, Precision::kBlocksPerSm)
pairs_kernel(FASTCL_PARAMETER(PairsArguments) x) {
  PairsMemory& memory = *reinterpret_cast<PairsMemory*>(shared_memory());
  const SuperTile at = panel_tile(block_index(), x.panel);
  const OneTile walk(x.panel.row_begin + at.r * kTile, x.panel.column_begin + at.c * kTile);
  PairTile tile(x, memory, at);
  tile.load_columns();
  for_each_tile<Precision>(x.operands, walk, memory.tile, [&](const OneTile&, Accumulators& products) {
    stage_tile<SinglePrecision, BlockTeam, false>(products, memory.tile);
    if (x.column_gradients != nullptr) tile.sum_column_gradients();
    for_function(x.function, [&](auto type) { tile.template evaluate<typename decltype(type)::Type>(); });
    if (x.out == nullptr && x.column_weights == nullptr) return;
    sync_threads();
    if (x.column_weights != nullptr) tile.sum_columns(x.column_weights);
    if (x.out != nullptr) tile.template store<Precision>();
  });
}

}  // namespace fastcl::cuda
