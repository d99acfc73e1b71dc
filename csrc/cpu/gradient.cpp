// Backward: the factors of W along each axis from the statistics, then one sweep that accumulates the products.
#include <algorithm>
#include <cmath>
#include <limits>

#include "product.h"
#include "schedule.h"
#include "shared_operands.h"
#include "sweep.h"

namespace fastcl::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// exp(shift - L) would lose precision beyond; only statistics merged from other shards come near.
constexpr double kLargestExcess = 80.0;

// An axis' dense terms as the sweep wants them: for an empty row L = -inf, which weighs nothing.
struct AxisFactors {
  std::vector<float> ratios;
  std::vector<float> values;
  std::vector<uint8_t> flagged;
  std::vector<DenseSlope> dense;

  AxisFactors(const Problem& problem, const std::vector<PairTerm>& terms, int64_t size, const float* statistics,
              const float* incoming)
      : ratios(terms.size() * size), values(terms.size() * size), flagged(size, !std::isfinite(problem.shift)) {
    constexpr float kLog2E = 1.44269504088896340736f;
    const double shift = static_cast<float>(problem.shift * kLog2E) * 0.693147180559945309417;
    for (size_t t = 0; t < terms.size(); ++t) {
      if (terms[t].reduce == Reduce::kMax || !is_dense(terms[t])) continue;
      float* ratio = &ratios[t * size];
      float* value = &values[t * size];
      dense.push_back({static_cast<int>(t), incoming + t * size, ratio, value});
      for (int64_t i = 0; terms[t].reduce == Reduce::kLogSumExp && i < size; ++i) {
        const float l = statistics[t * size + i];
        const bool empty = l == -kInfinity;
        ratio[i] = empty ? 0.0f : static_cast<float>(std::exp(shift - l));
        value[i] = empty ? kInfinity : l;
        const double excess = l - problem.shift;
        if (!empty && (excess < problem.flag_below || excess > kLargestExcess)) flagged[i] = 1;
      }
    }
  }

  AxisGradient axis(int64_t size, const float* statistics, const float* incoming, const LaneProduct& product) const {
    return {dense.data(), static_cast<int>(dense.size()), statistics, incoming, flagged.data(), size, product};
  }
};

}  // namespace

void gradient(const Problem& problem, const Workers& workers, Vectors<const float> statistics,
              Vectors<const float> incoming, float* a, float* b) {
  if (a == nullptr && b == nullptr) return;
  Sweep sweep = make_sweep(problem);
  const SharedOperands operands(workers, sweep, b != nullptr, a != nullptr);
  gradient(problem, sweep, workers, statistics, incoming, a, b);
}

void gradient(const Problem& problem, const Sweep& sweep, const Workers& workers, Vectors<const float> statistics,
              Vectors<const float> incoming, float* a, float* b) {
  const Level& level = selected();
  const int64_t n = sweep.x.rows;
  const int64_t m = sweep.y.rows;
  const int64_t depth = sweep.x.depth;
  const Writes writes = problem.symmetric ? Writes::kSymmetric
                        : b == nullptr    ? Writes::kRows
                        : a == nullptr    ? Writes::kColumns
                                          : Writes::kBoth;
  const int64_t short_axis = sizeof(float) * depth * (b == nullptr ? n : a == nullptr ? m : std::min(n, m));
  const Schedule schedule(row_blocks(sweep), column_blocks(sweep), writes, 1 + kLaneBytes / short_axis);
  Product product_a(a, n * depth, schedule.row_lanes(), workers);
  Product product_b(b, m * depth, schedule.column_lanes(), workers);
  const AxisFactors row_factors(problem, problem.row_terms, n, statistics.rows, incoming.rows);
  const AxisFactors column_factors(problem, problem.column_terms, m, statistics.columns, incoming.columns);
  const AxisGradient rows = row_factors.axis(n, statistics.rows, incoming.rows, product_a.lanes());
  const AxisGradient columns =
      problem.symmetric ? rows : column_factors.axis(m, statistics.columns, incoming.columns, product_b.lanes());
  schedule.run(worth(workers, sweep), level.workspace_bytes(sweep),
               [&](const Task& task, void* memory) { level.gradient(sweep, rows, columns, task, memory); });
  product_a.merge();
  product_b.merge();
}

}  // namespace fastcl::cpu
