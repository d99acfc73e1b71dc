// The CPU engine without Torch or Python, on threads of its own, against the definition in double precision.
//
// Built by `make sanitize` under the address, undefined-behaviour and thread sanitizers: whatever two tasks of one
// round share, or a buffer's end, shows here. Exits with 1 where a result is wrong.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/engine.h"

namespace {

using fastcl::PairTerm;
using fastcl::Reduce;
using fastcl::Test;
using fastcl::cpu::Matrix;
using fastcl::cpu::Problem;
using fastcl::cpu::Workers;

Workers threads(int count) {
  return {count, [count](int64_t tasks, const std::function<void(int64_t)>& body) {
            std::atomic<int64_t> next{0};
            std::vector<std::thread> pool;
            for (int t = 0; t < count; ++t) {
              pool.emplace_back([&] {
                for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(task);
              });
            }
            for (std::thread& thread : pool) thread.join();
          }};
}

struct Case {
  int64_t n, m, depth;
  bool symmetric;
  float scale;
};

std::vector<float> random_rows(int64_t rows, int64_t depth, std::mt19937& generator) {
  std::normal_distribution<float> normal;
  std::vector<float> x(rows * depth);
  for (int64_t i = 0; i < rows; ++i) {
    double norm = 0;
    for (int64_t d = 0; d < depth; ++d) norm += std::pow(x[i * depth + d] = normal(generator), 2);
    for (int64_t d = 0; d < depth; ++d) x[i * depth + d] /= static_cast<float>(std::sqrt(norm));
  }
  return x;
}

Matrix matrix(const std::vector<float>& x, int64_t rows, int64_t depth) {
  return {x.data(), fastcl::cpu::Dtype::kFloat32, rows, depth, depth, 1};
}

// The largest difference between the engine and the definition, of the statistics and of the products.
double check(const Case& c, const Workers& workers) {
  std::mt19937 generator(7);
  const std::vector<float> a = random_rows(c.n, c.depth, generator);
  const std::vector<float> b = c.symmetric ? a : random_rows(c.m, c.depth, generator);
  std::vector<int64_t> target(c.n);
  for (int64_t i = 0; i < c.n; ++i) target[i] = (i * 7 + 3) % c.m;

  Problem problem{};
  problem.a = matrix(a, c.n, c.depth);
  problem.b = matrix(b, c.m, c.depth);
  problem.symmetric = c.symmetric;
  problem.scale = c.scale;
  const float largest = static_cast<float>(std::max(c.n, c.m));
  problem.shift = c.scale * (1 + 1.0f / 128) - (80 - std::log(largest));
  problem.flag_below = std::log(1e6f * largest * 1.17549435e-38f);
  problem.target = target.data();
  const PairTerm negatives{Reduce::kLogSumExp, Test::kForbidden, Test::kForbidden};
  problem.row_terms = {negatives, {Reduce::kSum, Test::kAbsent, Test::kRequired}};
  if (!c.symmetric) problem.column_terms = {negatives};

  std::vector<float> rows(2 * c.n, NAN), columns(c.symmetric ? 0 : c.m, NAN);
  fastcl::cpu::statistics(problem, workers, {rows.data(), columns.data()});
  std::vector<float> row_gradient(2 * c.n), column_gradient(columns.size());
  for (float& g : row_gradient) g = std::uniform_real_distribution<float>(0.5f, 1.5f)(generator) / largest;
  for (float& g : column_gradient) g = std::uniform_real_distribution<float>(0.5f, 1.5f)(generator) / largest;
  std::vector<float> product_a(c.n * c.depth, NAN), product_b(c.symmetric ? 0 : c.m * c.depth, NAN);
  fastcl::cpu::gradient(problem, workers, {rows.data(), columns.data()}, {row_gradient.data(), column_gradient.data()},
                        product_a.data(), c.symmetric ? nullptr : product_b.data());

  std::vector<double> logits(c.n * c.m), weights(c.n * c.m, 0.0), row_sum(c.n, 0.0), column_sum(c.m, 0.0);
  const auto negative = [&](int64_t i, int64_t j) { return i != j && target[i] != j; };
  for (int64_t i = 0; i < c.n; ++i) {
    for (int64_t j = 0; j < c.m; ++j) {
      double dot = 0;
      for (int64_t d = 0; d < c.depth; ++d) dot += double(a[i * c.depth + d]) * b[j * c.depth + d];
      logits[i * c.m + j] = c.scale * dot;
      if (!negative(i, j)) continue;
      row_sum[i] += std::exp(c.scale * dot);
      column_sum[j] += std::exp(c.scale * dot);
    }
  }
  double error = 0;
  const auto compare = [&](double got, double want) {
    if (!(got == want)) error = std::max(error, std::isnan(got - want) ? HUGE_VAL : std::abs(got - want));
  };
  for (int64_t i = 0; i < c.n; ++i) compare(rows[i], std::log(row_sum[i]));
  for (int64_t i = 0; i < c.n; ++i) compare(rows[c.n + i], logits[i * c.m + target[i]]);
  for (size_t j = 0; j < columns.size(); ++j) compare(columns[j], std::log(column_sum[j]));
  for (int64_t i = 0; i < c.n; ++i) {
    for (int64_t j = 0; j < c.m; ++j) {
      double& w = weights[i * c.m + j];
      const double e = std::exp(logits[i * c.m + j]);
      if (negative(i, j)) w += row_gradient[i] * e / row_sum[i];
      if (negative(i, j) && !c.symmetric) w += column_gradient[j] * e / column_sum[j];
      if (target[i] == j) w += row_gradient[c.n + i];
    }
  }
  for (int64_t i = 0; i < c.n; ++i) {
    for (int64_t d = 0; d < c.depth; ++d) {
      double want = 0;
      for (int64_t j = 0; j < c.m; ++j) {
        want += (weights[i * c.m + j] + (c.symmetric ? weights[j * c.m + i] : 0.0)) * b[j * c.depth + d];
      }
      compare(product_a[i * c.depth + d] * largest, want * largest);
    }
  }
  for (int64_t j = 0; j < c.m && !c.symmetric; ++j) {
    for (int64_t d = 0; d < c.depth; ++d) {
      double want = 0;
      for (int64_t i = 0; i < c.n; ++i) want += weights[i * c.m + j] * a[i * c.depth + d];
      compare(product_b[j * c.depth + d] * largest, want * largest);
    }
  }
  return error;
}

// The same for a softmax loss along the rows, whose panels several threads add to one product in turn.
double check_cross_entropy(const Case& c, const Workers& workers) {
  std::mt19937 generator(11);
  const std::vector<float> a = random_rows(c.n, c.depth, generator);
  const std::vector<float> b = random_rows(c.m, c.depth, generator);
  std::vector<int64_t> target(c.n);
  for (int64_t i = 0; i < c.n; ++i) target[i] = (i * 7 + 3) % c.m;

  Problem problem{};
  problem.a = matrix(a, c.n, c.depth);
  problem.b = matrix(b, c.m, c.depth);
  problem.scale = c.scale;
  const float largest = static_cast<float>(std::max(c.n, c.m));
  problem.shift = c.scale * (1 + 1.0f / 128) - (80 - std::log(largest));
  problem.flag_below = std::log(1e6f * largest * 1.17549435e-38f);
  problem.target = target.data();
  problem.row_terms = {{Reduce::kLogSumExp, Test::kAbsent, Test::kForbidden},
                       {Reduce::kSum, Test::kAbsent, Test::kRequired}};
  std::vector<float> rows(2 * c.n, NAN), product_a(c.n * c.depth, NAN), product_b(c.m * c.depth, NAN);
  const double loss = fastcl::cpu::cross_entropy(problem, workers, {nullptr, nullptr}, {rows.data(), nullptr},
                                                 product_a.data(), product_b.data(), nullptr);

  std::vector<double> want_a(c.n * c.depth, 0.0), want_b(c.m * c.depth, 0.0), logits(c.m);
  double want_loss = 0;
  for (int64_t i = 0; i < c.n; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < c.m; ++j) {
      double dot = 0;
      for (int64_t d = 0; d < c.depth; ++d) dot += double(a[i * c.depth + d]) * b[j * c.depth + d];
      logits[j] = c.scale * dot;
      sum += std::exp(logits[j]);
    }
    want_loss += std::log(sum) - logits[target[i]];
    for (int64_t j = 0; j < c.m; ++j) {
      const double w = std::exp(logits[j]) / sum - (j == target[i] ? 1.0 : 0.0);
      for (int64_t d = 0; d < c.depth; ++d) {
        want_a[i * c.depth + d] += w * b[j * c.depth + d];
        want_b[j * c.depth + d] += w * a[i * c.depth + d];
      }
    }
  }
  double error = std::abs(loss - want_loss) / (1 + std::abs(want_loss));
  const auto compare = [&](const std::vector<float>& got, const std::vector<double>& want) {
    for (size_t k = 0; k < want.size(); ++k) {
      const double difference = std::abs(got[k] - want[k]);
      error = std::isnan(difference) ? HUGE_VAL : std::max(error, difference);
    }
  };
  compare(product_a, want_a);
  compare(product_b, want_b);
  return error;
}

// Sweeps of n * m * depth multiply-adds that a softmax loss takes with its gradient, counted in the micro-kernel.
double passes(bool symmetric, bool columns, bool frozen) {
  // A multiple of every tile, strip and panel, so that nothing is padding.
  constexpr int64_t n = 3072;
  constexpr int64_t depth = 32;
  std::mt19937 generator(13);
  const std::vector<float> a = random_rows(n, depth, generator);
  const std::vector<float> b = random_rows(n, depth, generator);
  Problem problem{};
  problem.a = matrix(a, n, depth);
  problem.b = symmetric ? problem.a : matrix(b, n, depth);
  problem.symmetric = symmetric;
  problem.scale = 5;
  problem.shift = problem.scale * (1 + 1.0f / 128) - (80 - std::log(static_cast<float>(n)));
  problem.flag_below = std::log(1e6f * n * 1.17549435e-38f);
  std::vector<int64_t> target(n);
  for (int64_t i = 0; i < n; ++i) target[i] = (i + n / 2) % n;
  problem.target = target.data();
  const PairTerm negatives{Reduce::kLogSumExp, Test::kForbidden, Test::kForbidden};
  problem.row_terms = {negatives, {Reduce::kSum, Test::kAbsent, Test::kRequired}};
  if (columns) problem.column_terms = {negatives};
  std::vector<float> rows(2 * n), column(n), product_a(n * depth), product_b(n * depth);
  const int64_t before = fastcl::cpu::counted_multiply_adds();
  fastcl::cpu::cross_entropy(problem, threads(2), {nullptr, nullptr}, {rows.data(), column.data()}, product_a.data(),
                             symmetric || frozen ? nullptr : product_b.data(), nullptr);
  return static_cast<double>(fastcl::cpu::counted_multiply_adds() - before) / (static_cast<double>(n) * n * depth);
}

// The floors, and the part of the diagonal's tiles that whole strips and panels take beyond the triangle.
int check_passes(const std::string& level) {
  struct Expected {
    const char* name;
    bool symmetric, columns, frozen;
    double passes, padding;
  };
  const Expected plans[] = {{"NT-Xent", true, false, false, 2, 0.05},
                            {"CLIP", false, true, false, 4, 0},
                            {"InfoNCE", false, false, false, 3, 0},
                            {"InfoNCE with frozen keys", false, false, true, 2, 0}};
  int failures = 0;
  for (const Expected& plan : plans) {
    const double counted = passes(plan.symmetric, plan.columns, plan.frozen);
    if (counted < plan.passes - 1e-9 || counted > plan.passes + plan.padding + 1e-9) {
      std::printf("%s: %s takes %g passes, expected %g\n", level.c_str(), plan.name, counted, plan.passes);
      ++failures;
    }
  }
  return failures;
}

}  // namespace

int main() {
  const Case cases[] = {{1, 1, 3, true, 10},
                        {1, 7, 1, false, 10},
                        {37, 37, 5, true, 10},
                        {600, 600, 9, true, 5},
                        {330, 520, 17, false, 5},
                        {700, 40, 24, false, 20},
                        {300, 300, 8, true, 200},
                        {60, 110, 700, false, 200},
                        // large enough for several threads
                        {900, 900, 24, true, 5},
                        {900, 1100, 24, false, 5}};
  int failures = 0;
  for (const std::string& level : fastcl::cpu::available_levels()) {
    setenv("FASTCL_CPU_LEVEL", level.c_str(), 1);
    for (const Case& c : cases) {
      for (int count : {1, 3}) {
        double error = check(c, threads(count));
        if (!c.symmetric) error = std::max(error, check_cross_entropy(c, threads(count)));
        const bool wrong = !(error < 1e-3);
        failures += wrong;
        if (wrong) {
          std::printf("%s: n=%ld m=%ld depth=%ld symmetric=%d threads=%d: error %g\n", level.c_str(), long(c.n),
                      long(c.m), long(c.depth), c.symmetric, count, error);
        }
      }
    }
    failures += check_passes(level);
    std::printf("%s: done\n", level.c_str());
  }
  return failures != 0;
}
