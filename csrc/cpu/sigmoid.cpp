// Value and gradient of a loss that asks a yes-or-no question of each pair, from one sweep.
#include <algorithm>
#include <numeric>

#include "product.h"
#include "schedule.h"
#include "shared_operands.h"
#include "sweep.h"

namespace fastcl::cpu {
namespace {

// Sums along an axis, and the copies that its lanes accumulate into.
std::vector<double> lane_sums(bool wanted, int64_t size, int64_t lanes) {
  return std::vector<double>(wanted ? size * lanes : 0);
}

double merged(const std::vector<double>& sums, int64_t size, int64_t at) {
  double total = 0.0;
  for (size_t i = at; i < sums.size(); i += size) total += sums[i];
  return total;
}

}  // namespace

double sigmoid_pairs(const Problem& problem, const Workers& workers, const Questions& questions, float* costs, float* a,
                     float* b, float* columns) {
  const Level& level = selected();
  Sweep sweep = make_sweep(problem);
  sweep.tests.uses_self = true;
  const SharedOperands operands(workers, sweep, b != nullptr, a != nullptr);
  const int64_t n = sweep.x.rows;
  const int64_t m = sweep.y.rows;
  const int64_t depth = sweep.x.depth;
  const Writes writes = b == nullptr && columns == nullptr ? Writes::kRows : Writes::kBoth;
  const int64_t short_axis = sizeof(float) * depth * (writes == Writes::kRows ? n : std::min(n, m));
  const Schedule schedule(row_blocks(sweep), column_blocks(sweep), writes, 1 + kLaneBytes / short_axis);
  Product product_a(a, n * depth, schedule.row_lanes(), workers);
  Product product_b(b, m * depth, schedule.column_lanes(), workers);
  std::vector<double> row_costs = lane_sums(costs != nullptr, n, schedule.row_lanes());
  std::vector<double> row_sums = lane_sums(true, n, schedule.row_lanes());
  std::vector<double> column_sums = lane_sums(columns != nullptr, m, schedule.column_lanes());
  const auto data = [](std::vector<double>& sums) { return sums.empty() ? nullptr : sums.data(); };
  const SigmoidPairs job{questions.shifts, questions.factors, questions.incoming, data(row_costs),
                         data(row_sums),   data(column_sums), product_a.lanes(),  product_b.lanes()};
  schedule.run(worth(workers, sweep), level.workspace_bytes(sweep),
               [&](const Task& task, void* memory) { level.sigmoid(sweep, job, task, memory); });
  product_a.merge();
  product_b.merge();
  for (int64_t i = 0; costs != nullptr && i < n; ++i) costs[i] = static_cast<float>(merged(row_costs, n, i));
  for (int64_t j = 0; columns != nullptr && j < m; ++j) columns[j] = static_cast<float>(merged(column_sums, m, j));
  return std::accumulate(row_sums.begin(), row_sums.end(), 0.0);
}

}  // namespace fastcl::cpu
