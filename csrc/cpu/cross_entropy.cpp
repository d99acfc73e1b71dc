// A softmax loss with its gradient: from one sweep where the loss looks along rows only, else from the statistics'
// sweep and the gradient's.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <thread>

#include "schedule.h"
#include "shared_operands.h"
#include "sweep.h"

namespace fastcl::cpu {
namespace {

constexpr int64_t kChunk = 1024;
// Rows whose matrix is too small for several threads to pay.
constexpr int64_t kSmall = int64_t{1} << 16;
// Raises the shift of the one-sweep form. Its weights are exp(shift - L) * gradient in one number, which must not
// underflow where a row's sum of exponentials is largest, exp(80).
constexpr float kRaise = 40.0f;

// Runs body(begin, end) over chunks of [0, count).
template <class Body>
void for_each_chunk(const Workers& workers, int64_t count, int64_t chunk, const Body& body) {
  const int64_t chunks = (count + chunk - 1) / chunk;
  if (chunks == 1) return body(0, count);
  workers.parallel_for(chunks, [&](int64_t c) { body(c * chunk, std::min(count, (c + 1) * chunk)); });
}

int64_t rows_in_chunk(const Matrix& matrix) { return std::max<int64_t>(16, kSmall / matrix.depth); }

// The loss from the statistics, and its gradient with respect to them: what the one-sweep form does row by row.
double evaluate(const Problem& problem, const Workers& workers, const CrossEntropy& head,
                const Vectors<float>& statistics, const Vectors<float>& incoming, float* positive) {
  const int64_t n = problem.a.rows;
  std::vector<double> losses(n);
  const auto find_sum = std::find_if(problem.row_terms.begin(), problem.row_terms.end(),
                                     [](const PairTerm& term) { return term.reduce == Reduce::kSum; });
  const int64_t sum = find_sum - problem.row_terms.begin();
  const bool external = head.positive != nullptr;
  const float* positives = external ? head.positive : statistics.rows + sum * n;
  std::vector<float> scratch(external && positive == nullptr ? n : 0);
  float* positive_gradient = !external ? incoming.rows + sum * n : positive != nullptr ? positive : scratch.data();
  for_each_chunk(workers, n, kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double weight = head.weights != nullptr ? head.weights[i] : 1.0;
      double loss = 0.0;
      double total = 0.0;
      const auto add = [&](const std::vector<PairTerm>& terms, const float* values, float* gradients) {
        for (size_t t = 0; t < terms.size(); ++t) {
          if (terms[t].reduce == Reduce::kMax) gradients[t * n + i] = 0.0f;
          if (terms[t].reduce != Reduce::kLogSumExp) continue;
          const double difference = static_cast<double>(values[t * n + i]) - positives[i];
          const double gradient = weight == 0.0 ? 0.0 : weight * sigmoid(difference);
          loss += weight == 0.0 ? 0.0 : weight * softplus(difference);
          total += gradient;
          gradients[t * n + i] = static_cast<float>(gradient);
        }
      };
      add(problem.row_terms, statistics.rows, incoming.rows);
      add(problem.column_terms, statistics.columns, incoming.columns);
      positive_gradient[i] = static_cast<float>(-total);
      losses[i] = loss;
    }
  });
  return std::accumulate(losses.begin(), losses.end(), 0.0);
}

double in_two_sweeps(const Problem& problem, const Workers& workers, const CrossEntropy& head,
                     const Vectors<float>& values, float* a, float* b, float* positive) {
  Sweep sweep = make_sweep(problem);
  const SharedOperands operands(workers, sweep, b != nullptr, a != nullptr);
  statistics(problem, sweep, workers, values);
  const int64_t rows = problem.row_terms.size() * problem.a.rows;
  std::vector<float> incoming(rows + problem.column_terms.size() * problem.b.rows);
  const Vectors<float> gradients{incoming.data(), incoming.data() + rows};
  const double loss = evaluate(problem, workers, head, values, gradients, positive);
  if (a != nullptr || b != nullptr) {
    gradient(problem, sweep, workers, {values.rows, values.columns}, {gradients.rows, gradients.columns}, a, b);
  }
  return loss;
}

double in_one_sweep(Sweep sweep, const Workers& workers, RowPanels job) {
  const Level& level = selected();
  const SharedOperands operands(workers, sweep, false, job.a != nullptr);
  std::vector<double> losses(sweep.x.rows);
  job.losses = losses.data();
  const int64_t tiles = job.b == nullptr ? 0 : (sweep.y.rows + sweep.tile - 1) / sweep.tile;
  // Panels that have added to each tile of columns: they take turns in their order, whatever the number of threads.
  std::vector<std::atomic<int64_t>> turns(tiles);
  const Schedule schedule(job.count, 1, Writes::kRows, 1);
  schedule.run(worth(workers, sweep), level.panel_bytes(sweep, job), [&](const Task& task, void* memory) {
    const int64_t panel = task.rows.begin;
    level.panel(sweep, job, panel, memory);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      while (turns[tile].load(std::memory_order_acquire) != panel) std::this_thread::yield();
      level.panel_columns(sweep, job, panel, tile, memory);
      turns[tile].store(panel + 1, std::memory_order_release);
    }
  });
  return std::accumulate(losses.begin(), losses.end(), 0.0);
}

// At most one term of each kind; its log-sum-exp over all pairs but a few or those that masks take, its sum over a few.
bool looks_along_rows_only(const Problem& problem) {
  if (problem.symmetric || !problem.column_terms.empty()) return false;
  int count[3] = {};
  for (const PairTerm& term : problem.row_terms) {
    if (++count[static_cast<int>(term.reduce)] > 1) return false;
    if (term.reduce == Reduce::kLogSumExp && !is_dense(term)) return false;
    if (term.reduce == Reduce::kSum && is_dense(term)) return false;
  }
  return count[static_cast<int>(Reduce::kLogSumExp)] == 1;
}

}  // namespace

double cross_entropy(const Problem& problem, const Workers& workers, const CrossEntropy& head,
                     Vectors<float> statistics, float* a, float* b, float* positive) {
  if (looks_along_rows_only(problem) && (a != nullptr || b != nullptr)) {
    Sweep sweep = make_sweep(problem);
    sweep.shift += kRaise;
    const int64_t count = panel_count(sweep, b != nullptr);
    if (count > 0) {
      const int64_t units = (sweep.x.rows + kPanelUnit - 1) / kPanelUnit;
      sweep.row_block = (units + count - 1) / count * kPanelUnit;
      const bool trust_empty = trusts_empty(problem, sweep.shift);
      return in_one_sweep(sweep, workers,
                          {count, head, statistics.rows, nullptr, a, b, positive, problem.flag_below, trust_empty});
    }
  }
  return in_two_sweeps(problem, workers, head, statistics, a, b, positive);
}

int64_t unit_pitch(const Matrix& matrix) {
  const int64_t size = matrix.dtype == Dtype::kFloat32 ? 4 : 2;
  return matrix.depth * size % 4096 == 0 ? matrix.depth + 64 / size : matrix.depth;
}

void normalize(const Matrix& matrix, const Workers& workers, void* unit, int64_t pitch, float* inverse) {
  const Level& level = selected();
  for_each_chunk(workers, matrix.rows, rows_in_chunk(matrix), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(matrix.depth);
    level.normalize(matrix, begin, end, unit, pitch, inverse, scratch.data());
  });
}

double finish(const Matrix& matrix, const Workers& workers, const float* inverse, float factor, float* product) {
  const Level& level = selected();
  std::vector<double> inner(matrix.rows);
  for_each_chunk(workers, matrix.rows, rows_in_chunk(matrix), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(matrix.depth);
    level.finish(matrix, inverse, factor, begin, end, product, inner.data(), scratch.data());
  });
  return std::accumulate(inner.begin(), inner.end(), 0.0);
}

}  // namespace fastcl::cpu
