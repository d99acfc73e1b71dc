// Forward: one sweep over S fills accumulators, which become the statistics; rows whose sum the fixed shift may have
// hurt (fastcl/backends/shift.py) are computed again with a running maximum.
#include <algorithm>
#include <cmath>
#include <limits>

#include "schedule.h"
#include "sweep.h"

namespace fastcl::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLn2 = 0.693147180559945309417;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr int64_t kChunk = 2048;

bool is_dense_log_sum_exp(const PairTerm& term) { return term.reduce == Reduce::kLogSumExp && is_dense(term); }

// The accumulators of an axis with their lanes.
class AxisValues {
 public:
  AxisValues(const std::vector<PairTerm>& terms, int64_t size, int64_t lanes)
      : terms_(terms), size_(size), lanes_(lanes), values_(lanes * (2 + terms.size()) * size) {
    const Accumulators into = accumulators();
    for (int64_t lane = 0; lane < lanes; ++lane) {
      std::fill_n(into.dense_max(lane), size, -kInfinity);
      for (int t = 0; t < into.terms; ++t) {
        std::fill_n(into.exceptional(lane, t), size, empty_value(terms[t].reduce));
      }
    }
  }

  Accumulators accumulators() { return {values_.data(), size_, static_cast<int>(terms_.size())}; }

  void merge_lanes() {
    const Accumulators into = accumulators();
    for (int64_t lane = 1; lane < lanes_; ++lane) {
      for (int64_t i = 0; i < size_; ++i) {
        into.dense_sum(0)[i] += into.dense_sum(lane)[i];
        into.dense_max(0)[i] = absorb(Reduce::kMax, into.dense_max(0)[i], into.dense_max(lane)[i]);
        for (int t = 0; t < into.terms; ++t) {
          double& value = into.exceptional(0, t)[i];
          value = absorb(terms_[t].reduce, value, into.exceptional(lane, t)[i]);
        }
      }
    }
  }

  // The value of a term at i, with the log of the dense pairs' sum given.
  double value(int t, int64_t i, double dense_log_sum) {
    const Accumulators from = accumulators();
    const double exceptional = from.exceptional(0, t)[i];
    if (!is_dense(terms_[t]) || terms_[t].reduce == Reduce::kSum) return exceptional;
    return absorb(terms_[t].reduce, exceptional,
                  terms_[t].reduce == Reduce::kLogSumExp ? dense_log_sum : from.dense_max(0)[i]);
  }

 private:
  const std::vector<PairTerm>& terms_;
  int64_t size_;
  int64_t lanes_;
  std::vector<double> values_;
};

void run_again(const Level& level, Sweep sweep, const Workers& workers, const std::vector<int64_t>& flagged,
               std::vector<double>& dense_log_sums) {
  sweep.x_index = flagged.data();
  sweep.x_count = static_cast<int64_t>(flagged.size());
  sweep.symmetric = false;
  // Small blocks keep all threads busy, but each block packs all of y.
  const int64_t share = (sweep.x_count / (4 * workers.threads) + 48 - 1) / 48 * 48;
  sweep.row_block = std::clamp<int64_t>(share, 48, sweep.tile);
  dense_log_sums.resize(flagged.size());
  const Schedule schedule((sweep.x_count + sweep.row_block - 1) / sweep.row_block, 1, Writes::kRows, 1);
  schedule.run(worth(workers, sweep), level.workspace_bytes(sweep),
               [&](const Task& task, void* memory) { level.running(sweep, task, dense_log_sums.data(), memory); });
}

// Writes the statistics of an axis. `sweep` has that axis as its x.
void finish(const Level& level, const Problem& problem, const Sweep& sweep, const Workers& workers,
            const std::vector<PairTerm>& terms, AxisValues& values, float* out) {
  const int64_t size = sweep.x.rows;
  const int count = static_cast<int>(terms.size());
  const bool has_dense = std::any_of(terms.begin(), terms.end(), is_dense_log_sum_exp);
  const double* sums = values.accumulators().dense_sum(0);
  // The kernels shift by the product as it is rounded to float.
  const double shift = static_cast<float>(problem.shift * kLog2E) * kLn2;
  std::vector<uint8_t> suspect(size, 0);
  const auto finish_chunk = [&](int64_t chunk) {
    for (int64_t i = chunk * kChunk; i < std::min(size, (chunk + 1) * kChunk); ++i) {
      const double dense = sums[i] == 0.0 ? -kInfinity : shift + std::log(sums[i]);
      for (int t = 0; t < count; ++t) {
        const double value = values.value(t, i, dense);
        out[t * size + i] = static_cast<float>(value);
        if (is_dense_log_sum_exp(terms[t]) && value - problem.shift < problem.flag_below) suspect[i] = 1;
      }
    }
  };
  values.merge_lanes();
  workers.parallel_for((size + kChunk - 1) / kChunk, finish_chunk);
  if (!has_dense) return;
  std::vector<int64_t> flagged;
  for (int64_t i = 0; i < size; ++i) {
    if (suspect[i] || !std::isfinite(problem.shift)) flagged.push_back(i);
  }
  if (flagged.empty()) return;
  std::vector<double> dense;
  run_again(level, sweep, workers, flagged, dense);
  for (size_t f = 0; f < flagged.size(); ++f) {
    for (int t = 0; t < count; ++t) {
      if (!is_dense_log_sum_exp(terms[t])) continue;
      out[t * size + flagged[f]] = static_cast<float>(values.value(t, flagged[f], dense[f]));
    }
  }
}

}  // namespace

void statistics(const Problem& problem, const Workers& workers, Vectors<float> out) {
  const Level& level = selected();
  const Sweep sweep = make_sweep(problem);
  const bool columns_wanted = !problem.column_terms.empty();
  const Writes writes = problem.symmetric           ? Writes::kSymmetric
                        : !columns_wanted           ? Writes::kRows
                        : problem.row_terms.empty() ? Writes::kColumns
                                                    : Writes::kBoth;
  const Schedule schedule(row_blocks(sweep), column_blocks(sweep), writes, std::numeric_limits<int64_t>::max());
  AxisValues rows(problem.row_terms, sweep.x.rows, schedule.row_lanes());
  AxisValues columns(problem.column_terms, sweep.y.rows, schedule.column_lanes());
  const Accumulators into_rows = rows.accumulators();
  const Accumulators into_columns = problem.symmetric ? into_rows : columns.accumulators();
  schedule.run(worth(workers, sweep), level.workspace_bytes(sweep),
               [&](const Task& task, void* memory) { level.statistics(sweep, into_rows, into_columns, task, memory); });
  if (!problem.row_terms.empty()) {
    finish(level, problem, sweep, workers, problem.row_terms, rows, out.rows);
  }
  if (columns_wanted) {
    finish(level, problem, transposed(sweep), workers, problem.column_terms, columns, out.columns);
  }
}

}  // namespace fastcl::cpu
