// Values and gradients of a function of every pair, from one sweep.
#include <algorithm>

#include "product.h"
#include "schedule.h"
#include "shared_operands.h"
#include "sweep.h"

namespace fastcl::cpu {
namespace {

// The sums along an axis of all lanes, [lanes, slopes, size], or nothing where they are not wanted.
class LaneSums {
 public:
  LaneSums(float* out, int64_t size, int64_t lanes)
      : out_(out), size_(size), sums_(out == nullptr ? 0 : size * lanes) {}

  double* data() { return out_ == nullptr ? nullptr : sums_.data(); }

  void merge() const {
    for (int64_t i = 0; out_ != nullptr && i < size_; ++i) {
      double total = 0.0;
      for (size_t at = i; at < sums_.size(); at += size_) total += sums_[at];
      out_[i] = static_cast<float>(total);
    }
  }

 private:
  float* out_;
  int64_t size_;
  std::vector<double> sums_;
};

std::vector<double> empty_values(const PairShape& shape, int64_t rows, int64_t lanes) {
  std::vector<double> values;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    for (int k = 0; k < shape.outputs; ++k) values.insert(values.end(), rows, empty_value(shape.along[k]));
  }
  return values;
}

}  // namespace

void pair_panels(const Problem& problem, const Problem* guide, const Workers& workers, const PairOperands& operands,
                 const PairResults& results) {
  const Level& level = selected();
  const PairShape shape = shape_of(operands.function);
  Sweep sweep = make_sweep(problem);
  Sweep guide_sweep{};
  if (guide != nullptr) {
    guide_sweep = make_sweep(*guide);
    guide_sweep.tile = sweep.tile;
    guide_sweep.row_block = sweep.row_block;
    guide_sweep.column_block = sweep.column_block;
  }
  const SharedOperands shared(workers, sweep, results.b != nullptr, results.a != nullptr);
  const int64_t n = sweep.x.rows;
  const int64_t m = sweep.y.rows;
  const int64_t depth = sweep.x.depth;
  const Writes writes = results.b == nullptr && results.column_sums == nullptr ? Writes::kRows : Writes::kBoth;
  const int64_t short_axis = sizeof(float) * depth * (writes == Writes::kRows ? n : std::min(n, m));
  const Schedule schedule(row_blocks(sweep), column_blocks(sweep), writes, 1 + kLaneBytes / short_axis);
  Product product_a(results.a, n * depth, schedule.row_lanes(), workers);
  Product product_b(results.b, m * depth, schedule.column_lanes(), workers);
  std::vector<double> values = empty_values(shape, n, schedule.row_lanes());
  LaneSums row_sums(results.row_sums, shape.slopes * n, schedule.row_lanes());
  LaneSums column_sums(results.column_sums, shape.slopes * m, schedule.column_lanes());
  const PairJob job{operands,
                    shape,
                    guide == nullptr ? nullptr : &guide_sweep,
                    values.data(),
                    row_sums.data(),
                    column_sums.data(),
                    product_a.lanes(),
                    product_b.lanes()};
  const size_t workspace = level.workspace_bytes(sweep) + (guide == nullptr ? 0 : level.workspace_bytes(guide_sweep));
  schedule.run(worth(workers, sweep), workspace,
               [&](const Task& task, void* memory) { level.pairs(sweep, job, task, memory); });
  product_a.merge();
  product_b.merge();
  row_sums.merge();
  column_sums.merge();
  for (int64_t i = 0; shape.outputs > 0 && i < n; ++i) {
    for (int64_t lane = 1; lane < schedule.row_lanes(); ++lane) {
      absorb(shape, &values[i], n, &values[lane * shape.outputs * n + i], n);
    }
    for (int k = 0; results.values != nullptr && k < shape.outputs; ++k) {
      results.values[k * n + i] = static_cast<float>(values[k * n + i]);
    }
  }
}

}  // namespace fastcl::cpu
