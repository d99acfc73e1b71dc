// Forward: one sweep over S fills accumulators, which become the statistics; rows whose sum the fixed shift may have
// hurt (fastcl/backends/shift.py) are computed again with a running maximum.
#include <algorithm>
#include <cmath>
#include <limits>

#include "schedule.h"
#include "shared_operands.h"
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
  AxisValues(const std::vector<PairTerm>& terms, int64_t size, int64_t lanes, bool masked)
      : terms_(terms), size_(size), lanes_(lanes), masked_(masked) {
    values_.resize(lanes * accumulators().lane_size());
    const Accumulators into = accumulators();
    for (int64_t lane = 0; lane < lanes; ++lane) {
      for (int slot = 0; slot < into.slots; ++slot) {
        if (is_maximum(slot)) std::fill_n(into.dense(lane, slot), size, -kInfinity);
      }
      for (int t = 0; t < into.terms; ++t) {
        std::fill_n(into.exceptional(lane, t), size, empty_value(terms[t].reduce));
      }
    }
  }

  Accumulators accumulators() {
    const int terms = static_cast<int>(terms_.size());
    return {values_.data(), size_, masked_ ? terms : 2, terms};
  }

  void merge_lanes() {
    const Accumulators into = accumulators();
    for (int64_t lane = 1; lane < lanes_; ++lane) {
      for (int64_t i = 0; i < size_; ++i) {
        for (int slot = 0; slot < into.slots; ++slot) {
          double& value = into.dense(0, slot)[i];
          const double other = into.dense(lane, slot)[i];
          value = is_maximum(slot) ? absorb(Reduce::kMax, value, other) : value + other;
        }
        for (int t = 0; t < into.terms; ++t) {
          double& value = into.exceptional(0, t)[i];
          value = absorb(terms_[t].reduce, value, into.exceptional(lane, t)[i]);
        }
      }
    }
  }

  // What a term's dense pairs came to at i: the sum of exp(S - shift) for a log-sum-exp.
  double dense(int t, int64_t i) {
    const Accumulators from = accumulators();
    if (masked_) return from.dense(0, t)[i];
    // The exceptional pairs are all that a sum is over.
    return terms_[t].reduce == Reduce::kSum   ? 0.0
           : terms_[t].reduce == Reduce::kMax ? from.dense_max(0)[i]
                                              : from.dense_sum(0)[i];
  }

  // The value of a term at i from its dense pairs, for which a log-sum-exp takes the log of the sum of exp(S).
  double value(int t, int64_t i, double dense) {
    const double exceptional = accumulators().exceptional(0, t)[i];
    return is_dense(terms_[t]) ? absorb(terms_[t].reduce, exceptional, dense) : exceptional;
  }

 private:
  bool is_maximum(int slot) const { return masked_ ? terms_[slot].reduce == Reduce::kMax : slot == 1; }

  const std::vector<PairTerm>& terms_;
  int64_t size_;
  int64_t lanes_;
  bool masked_;
  std::vector<double> values_;
};

std::vector<double> run_again(const Level& level, Sweep sweep, const PairTerm& term, const Workers& workers,
                              const std::vector<int64_t>& flagged) {
  sweep.x_index = flagged.data();
  sweep.x_count = static_cast<int64_t>(flagged.size());
  sweep.symmetric = false;
  // Small blocks keep all threads busy, but each block packs all of y.
  const int64_t share = (sweep.x_count / (4 * workers.threads) + 48 - 1) / 48 * 48;
  sweep.row_block = std::clamp<int64_t>(share, 48, sweep.tile);
  std::vector<double> dense_log_sums(flagged.size());
  const Schedule schedule((sweep.x_count + sweep.row_block - 1) / sweep.row_block, 1, Writes::kRows, 1);
  schedule.run(worth(workers, sweep), level.workspace_bytes(sweep), [&](const Task& task, void* memory) {
    level.running(sweep, term, task, dense_log_sums.data(), memory);
  });
  return dense_log_sums;
}

// Writes the statistics of an axis. `sweep` has that axis as its x.
void finish(const Level& level, const Problem& problem, const Sweep& sweep, const Workers& workers,
            const std::vector<PairTerm>& terms, AxisValues& values, float* out) {
  const int64_t size = sweep.x.rows;
  const int count = static_cast<int>(terms.size());
  // The kernels shift by the product as it is rounded to float.
  const double shift = static_cast<float>(problem.shift * kLog2E) * kLn2;
  const bool trust_empty = trusts_empty(problem, problem.shift);
  std::vector<uint8_t> suspect(count * size, 0);
  const auto finish_chunk = [&](int64_t chunk) {
    for (int64_t i = chunk * kChunk; i < std::min(size, (chunk + 1) * kChunk); ++i) {
      for (int t = 0; t < count; ++t) {
        double dense = values.dense(t, i);
        if (terms[t].reduce == Reduce::kLogSumExp) dense = dense == 0.0 ? -kInfinity : shift + std::log(dense);
        const double value = values.value(t, i, dense);
        out[t * size + i] = static_cast<float>(value);
        if (is_dense_log_sum_exp(terms[t])) suspect[t * size + i] = is_suspect(problem, trust_empty, value);
      }
    }
  };
  values.merge_lanes();
  workers.parallel_for((size + kChunk - 1) / kChunk, finish_chunk);
  // All dense log-sum-exps of a sweep without masks have one dense sum, so that one sweep over the flagged rows is
  // enough.
  for (int t = 0; t < count; ++t) {
    if (!is_dense_log_sum_exp(terms[t])) continue;
    std::vector<int64_t> flagged;
    const auto in_pass = [&](int s) { return is_dense_log_sum_exp(terms[s]) && (s == t || !sweep.masked); };
    for (int64_t i = 0; i < size; ++i) {
      bool any = !std::isfinite(problem.shift);
      for (int s = t; s < count; ++s) any |= in_pass(s) && suspect[s * size + i];
      if (any) flagged.push_back(i);
    }
    if (!flagged.empty()) {
      const std::vector<double> dense = run_again(level, sweep, terms[t], workers, flagged);
      for (size_t f = 0; f < flagged.size(); ++f) {
        for (int s = t; s < count; ++s) {
          if (in_pass(s)) out[s * size + flagged[f]] = static_cast<float>(values.value(s, flagged[f], dense[f]));
        }
      }
    }
    if (!sweep.masked) break;
  }
}

}  // namespace

void statistics(const Problem& problem, const Workers& workers, Vectors<float> out) {
  Sweep sweep = make_sweep(problem);
  const SharedOperands operands(workers, sweep, false, false);
  statistics(problem, sweep, workers, out);
}

void statistics(const Problem& problem, const Sweep& sweep, const Workers& workers, Vectors<float> out) {
  const Level& level = selected();
  const bool columns_wanted = !problem.column_terms.empty();
  const Writes writes = problem.symmetric           ? Writes::kSymmetric
                        : !columns_wanted           ? Writes::kRows
                        : problem.row_terms.empty() ? Writes::kColumns
                                                    : Writes::kBoth;
  const Schedule schedule(row_blocks(sweep), column_blocks(sweep), writes, std::numeric_limits<int64_t>::max());
  AxisValues rows(problem.row_terms, sweep.x.rows, schedule.row_lanes(), sweep.masked);
  AxisValues columns(problem.column_terms, sweep.y.rows, schedule.column_lanes(), sweep.masked);
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
