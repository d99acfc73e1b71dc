// The CPU engine without Torch or Python, on threads of its own, against the definition in double precision.
//
// Built by `make sanitize` under the address, undefined-behaviour and thread sanitizers: whatever two tasks of one
// round share, or a buffer's end, shows here. Exits with 1 where a result is wrong. `engine_check threads` is what is
// large enough for several threads, and nothing else.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
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

constexpr Test kNo = Test::kForbidden;
constexpr Test kAny = Test::kAbsent;
constexpr Test kYes = Test::kRequired;

// Terms of each kind for the tests: the self pair and the target, labels, ids, thresholds.
struct Terms {
  const char* name;
  std::vector<PairTerm> rows;
  std::vector<PairTerm> columns;
};

const Terms kTerms[] = {
    {"pairs",
     {{Reduce::kLogSumExp, kNo, kNo}, {Reduce::kSum, kAny, kYes}, {Reduce::kMax, kNo}},
     {{Reduce::kLogSumExp, kNo, kNo}}},
    {"labels",
     {{Reduce::kLogSumExp, kAny, kAny, kNo},
      {Reduce::kLogSumExp, kNo, kAny, kYes},
      {Reduce::kSum, kNo, kAny, kYes},
      {Reduce::kMax, kAny, kAny, kYes}},
     {{Reduce::kLogSumExp, kAny, kAny, kYes}, {Reduce::kSum, kAny, kNo, kNo}}},
    {"ids",
     {{Reduce::kLogSumExp, kNo, kAny, kAny, kNo}, {Reduce::kSum, kAny, kYes, kAny, kNo}, {Reduce::kSum}},
     {{Reduce::kLogSumExp, kAny, kNo, kAny, kNo}, {Reduce::kMax, kAny, kAny, kAny, kYes}}},
    {"thresholds",
     {{Reduce::kLogSumExp, kNo, kNo, kAny, kAny, kNo}, {Reduce::kSum, kAny, kAny, kNo, kNo, kYes}},
     {{Reduce::kLogSumExp, kNo, kAny, kAny, kAny, kNo}, {Reduce::kMax, kAny, kAny, kAny, kAny, kNo}}},
};

// What masks test about the rows of a matrix: labels of which two that are neighbours count as equal.
struct OwnTags {
  std::vector<int32_t> label, nearest, reach, id;
  std::vector<float> threshold;

  OwnTags(int64_t rows, int shift) : label(rows), nearest(rows), reach(rows), id(rows), threshold(rows, 0.0f) {
    constexpr int32_t kLabels = 9;
    for (int64_t i = 0; i < rows; ++i) {
      label[i] = static_cast<int32_t>((i * 5 + shift) % kLabels);
      nearest[i] = std::max(label[i] - 1, 0);
      reach[i] = std::min(label[i] + 1, kLabels - 1) - nearest[i];
      id[i] = static_cast<int32_t>(i * 7 % 11);
    }
  }

  fastcl::cpu::Tags tags() const { return {label.data(), nearest.data(), reach.data(), id.data(), threshold.data()}; }
};

// Moves a threshold away from all logits, so that no rounding decides.
void keep_apart(float& threshold, const std::vector<double>& logits, int64_t first, int64_t step, int64_t count,
                float scale) {
  const auto is_close = [&](int64_t k) { return std::abs(logits[first + k * step] - threshold) < 2e-5 * scale; };
  for (int64_t k = 0; k < count; ++k) {
    if (!is_close(k)) continue;
    threshold += 5e-5f * scale;
    k = -1;
  }
}

// The largest difference between the engine and the definition, of the statistics and of the products.
double check(const Case& c, const Terms& terms, const Workers& workers) {
  std::mt19937 generator(7);
  const std::vector<float> a = random_rows(c.n, c.depth, generator);
  const std::vector<float> b = c.symmetric ? a : random_rows(c.m, c.depth, generator);
  std::vector<int64_t> target(c.n);
  for (int64_t i = 0; i < c.n; ++i) target[i] = (i * 7 + 3) % c.m;
  std::vector<double> logits(c.n * c.m);
  for (int64_t i = 0; i < c.n; ++i) {
    for (int64_t j = 0; j < c.m; ++j) {
      double dot = 0;
      for (int64_t d = 0; d < c.depth; ++d) dot += double(a[i * c.depth + d]) * b[j * c.depth + d];
      logits[i * c.m + j] = c.scale * dot;
    }
  }
  OwnTags of_a(c.n, 0);
  OwnTags of_b = c.symmetric ? of_a : OwnTags(c.m, 2);
  for (int64_t i = 0; i < c.n; ++i) keep_apart(of_a.threshold[i], logits, i * c.m, 1, c.m, c.scale);
  for (int64_t j = 0; j < c.m; ++j) keep_apart(of_b.threshold[j], logits, j, c.m, c.n, c.scale);

  Problem problem{};
  problem.a = matrix(a, c.n, c.depth);
  problem.b = matrix(b, c.m, c.depth);
  problem.symmetric = c.symmetric;
  problem.scale = c.scale;
  const float largest = static_cast<float>(std::max(c.n, c.m));
  problem.shift = c.scale * (1 + 1.0f / 128) - (80 - std::log(largest));
  problem.flag_below = std::log(1e6f * largest * 1.17549435e-38f);
  problem.lowest = -c.scale - problem.shift;
  problem.target = target.data();
  problem.a_tags = of_a.tags();
  problem.b_tags = of_b.tags();
  problem.row_terms = terms.rows;
  if (!c.symmetric) problem.column_terms = terms.columns;

  const int64_t row_terms = problem.row_terms.size();
  const int64_t column_terms = problem.column_terms.size();
  std::vector<float> rows(row_terms * c.n, NAN), columns(column_terms * c.m, NAN);
  fastcl::cpu::statistics(problem, workers, {rows.data(), columns.data()});
  std::vector<float> row_gradient(rows.size()), column_gradient(columns.size());
  for (float& g : row_gradient) g = std::uniform_real_distribution<float>(0.5f, 1.5f)(generator) / largest;
  for (float& g : column_gradient) g = std::uniform_real_distribution<float>(0.5f, 1.5f)(generator) / largest;
  std::vector<float> product_a(c.n * c.depth, NAN), product_b(c.symmetric ? 0 : c.m * c.depth, NAN);
  fastcl::cpu::gradient(problem, workers, {rows.data(), columns.data()}, {row_gradient.data(), column_gradient.data()},
                        product_a.data(), c.symmetric ? nullptr : product_b.data());

  double error = 0;
  const auto compare = [&](double got, double want) {
    if (!(got == want)) error = std::max(error, std::isnan(got - want) ? HUGE_VAL : std::abs(got - want));
  };
  std::vector<double> weights(c.n * c.m, 0.0);
  const auto passes = [](Test test, bool outcome) { return test == kAny || (test == kYes) == outcome; };
  // A term's values along one axis against the engine's, and its share in W.
  const auto judge = [&](const PairTerm& term, bool along_rows, const float* got, const float* gradient) {
    const int64_t size = along_rows ? c.n : c.m;
    const int64_t others = along_rows ? c.m : c.n;
    for (int64_t own = 0; own < size; ++own) {
      double value = term.reduce == Reduce::kMax ? -HUGE_VAL : 0.0;
      const auto for_each_pair = [&](const auto& visit) {
        for (int64_t other = 0; other < others; ++other) {
          const int64_t i = along_rows ? own : other;
          const int64_t j = along_rows ? other : own;
          const double logit = logits[i * c.m + j];
          const float threshold = along_rows ? of_a.threshold[i] : of_b.threshold[j];
          if (passes(term.self_pair, i == j) && passes(term.target, target[i] == j) &&
              passes(term.label, std::abs(of_a.label[i] - of_b.label[j]) <= 1) &&
              passes(term.id, of_a.id[i] == of_b.id[j]) && passes(term.above, logit > threshold)) {
            visit(logit, weights[i * c.m + j]);
          }
        }
      };
      for_each_pair([&](double logit, double&) {
        value = term.reduce == Reduce::kMax   ? std::max(value, logit)
                : term.reduce == Reduce::kSum ? value + logit
                                              : value + std::exp(logit);
      });
      const bool is_log = term.reduce == Reduce::kLogSumExp;
      // The rounding of a sum's logits adds up.
      const double size_of_sum = term.reduce == Reduce::kSum ? std::sqrt(double(others)) : 1.0;
      compare(got[own] / size_of_sum, (is_log ? std::log(value) : value) / size_of_sum);
      if (term.reduce == Reduce::kMax) continue;
      for_each_pair(
          [&](double logit, double& weight) { weight += gradient[own] * (is_log ? std::exp(logit) / value : 1.0); });
    }
  };
  for (int64_t t = 0; t < row_terms; ++t) {
    judge(problem.row_terms[t], true, rows.data() + t * c.n, row_gradient.data() + t * c.n);
  }
  for (int64_t t = 0; t < column_terms; ++t) {
    judge(problem.column_terms[t], false, columns.data() + t * c.m, column_gradient.data() + t * c.m);
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

// The same for a softmax loss along the rows, whose panels several threads add to one product in turn; with other rows
// of a row's id left out where `ids`.
double check_cross_entropy(const Case& c, bool ids, const Workers& workers) {
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
  const OwnTags of_a(c.n, 0), of_b(c.m, 0);
  problem.a_tags = of_a.tags();
  problem.b_tags = of_b.tags();
  problem.row_terms = {{Reduce::kLogSumExp, kAny, kNo, kAny, ids ? kNo : kAny}, {Reduce::kSum, kAny, kYes}};
  const auto counts = [&](int64_t i, int64_t j) { return !ids || j == target[i] || of_a.id[i] != of_b.id[j]; };
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
      if (counts(i, j)) sum += std::exp(logits[j]);
    }
    want_loss += std::log(sum) - logits[target[i]];
    for (int64_t j = 0; j < c.m; ++j) {
      if (!counts(i, j)) continue;
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

// The largest difference, relative to what is wanted or to `size`; NaN is infinitely far.
double difference(const std::vector<float>& got, const std::vector<double>& want, double size) {
  double error = 0;
  for (size_t k = 0; k < want.size(); ++k) {
    const double difference = std::abs(got[k] - want[k]) / (size + std::abs(want[k]));
    error = std::isnan(difference) ? HUGE_VAL : std::max(error, difference);
  }
  return error;
}

// The same for questions of every pair; labels that are neighbours answer yes, and other pairs of equal ids are left
// out, where `tags`.
double check_sigmoid(const Case& c, bool tags, const Workers& workers) {
  std::mt19937 generator(17);
  const std::vector<float> a = random_rows(c.n, c.depth, generator);
  const std::vector<float> b = random_rows(c.m, c.depth, generator);
  std::vector<float> shifts(c.m), factors(c.n), incoming(c.n);
  for (float& x : shifts) x = std::uniform_real_distribution<float>(-3.0f, 1.0f)(generator);
  for (float& x : factors) x = std::uniform_real_distribution<float>(0.5f, 1.5f)(generator);
  for (float& x : incoming) x = std::uniform_real_distribution<float>(0.5f, 1.5f)(generator) / c.n;
  Problem problem{};
  problem.a = matrix(a, c.n, c.depth);
  problem.b = matrix(b, c.m, c.depth);
  problem.scale = c.scale;
  problem.row0 = 2;
  const OwnTags of_a(c.n, 0), of_b(c.m, 2);
  if (tags) {
    problem.a_tags = of_a.tags();
    problem.b_tags = of_b.tags();
  }
  std::vector<float> costs(c.n, NAN), columns(c.m, NAN), product_a(c.n * c.depth, NAN), product_b(c.m * c.depth, NAN);
  const double sum = fastcl::cpu::sigmoid_pairs(problem, workers, {shifts.data(), factors.data(), incoming.data()},
                                                costs.data(), product_a.data(), product_b.data(), columns.data());

  std::vector<double> want_costs(c.n, 0.0), want_columns(c.m, 0.0), want_a(c.n * c.depth, 0.0),
      want_b(c.m * c.depth, 0.0);
  double want_sum = 0;
  for (int64_t i = 0; i < c.n; ++i) {
    for (int64_t j = 0; j < c.m; ++j) {
      const bool yes = j == i + 2 || (tags && std::abs(of_a.label[i] - of_b.label[j]) <= 1);
      if (!yes && tags && of_a.id[i] == of_b.id[j]) continue;
      double logit = shifts[j];
      for (int64_t d = 0; d < c.depth; ++d) logit += c.scale * double(a[i * c.depth + d]) * b[j * c.depth + d];
      const double factor = yes ? 1.0 : factors[i];
      want_costs[i] += factor * fastcl::softplus(yes ? -logit : logit);
      const double w = incoming[i] * (yes ? -fastcl::sigmoid(-logit) : factor * fastcl::sigmoid(logit));
      want_sum += w;
      want_columns[j] += w;
      for (int64_t d = 0; d < c.depth; ++d) {
        want_a[i * c.depth + d] += w * b[j * c.depth + d];
        want_b[j * c.depth + d] += w * a[i * c.depth + d];
      }
    }
  }
  return std::max({std::abs(sum - want_sum) / c.m, difference(costs, want_costs, c.m),
                   difference(columns, want_columns, 1), difference(product_a, want_a, 1),
                   difference(product_b, want_b, 1)});
}

// The same for positive pairs of the lifted structure loss, whose parameters have gradients too.
double check_pairs(const Case& c, bool euclidean, const Workers& workers) {
  std::mt19937 generator(23);
  const std::vector<float> a = random_rows(c.n, c.depth, generator);
  const std::vector<float> b = random_rows(c.m, c.depth, generator);
  const std::vector<float> ones(std::max(c.n, c.m), 1.0f);
  std::vector<float> own(c.n), others(c.m), incoming(c.n);
  for (float& x : own) x = std::uniform_real_distribution<float>(-1.0f, 1.0f)(generator);
  for (float& x : others) x = std::uniform_real_distribution<float>(-1.0f, 1.0f)(generator);
  for (float& x : incoming) x = std::uniform_real_distribution<float>(0.5f, 1.5f)(generator) / c.n;
  Problem problem{};
  problem.a = matrix(a, c.n, c.depth);
  problem.b = matrix(b, c.m, c.depth);
  problem.scale = 0.9f;  // so that no distance is close to 0
  problem.row0 = 2;
  const OwnTags of_a(c.n, 0), of_b(c.m, 2);
  problem.a_tags = of_a.tags();
  problem.b_tags = of_b.tags();
  const float numbers[] = {0.2f, 0.0f};
  const float* squares = euclidean ? ones.data() : nullptr;
  std::vector<float> values(2 * c.n, NAN), rows(2 * c.n, NAN), columns(2 * c.m, NAN), product_a(c.n * c.depth, NAN),
      product_b(c.m * c.depth, NAN);
  fastcl::cpu::pair_panels(problem, nullptr, workers,
                           {fastcl::cpu::PairFunction::kLifted, 0.05f, numbers, squares, squares, own.data(),
                            others.data(), incoming.data()},
                           {values.data(), product_a.data(), product_b.data(), rows.data(), columns.data()});

  std::vector<double> want_values(2 * c.n, 0.0), want_rows(2 * c.n, 0.0), want_columns(2 * c.m, 0.0),
      want_a(c.n * c.depth, 0.0), want_b(c.m * c.depth, 0.0);
  for (int64_t i = 0; i < c.n; ++i) {
    for (int64_t j = 0; j < c.m; ++j) {
      if (j == i + 2 || std::abs(of_a.label[i] - of_b.label[j]) > 1) continue;
      double s = 0.05;
      for (int64_t d = 0; d < c.depth; ++d) s += problem.scale * double(a[i * c.depth + d]) * b[j * c.depth + d];
      const double distance = euclidean ? std::sqrt(2 - 2 * s) : 1 - s;
      const double both = fastcl::log_add_exp(own[i], others[j]);
      const double hinge = std::max(0.0, both + distance - numbers[0]);
      const double w = -incoming[i] * hinge / (euclidean ? distance : 1.0);
      want_values[i] += 0.5 * hinge * hinge;
      want_values[c.n + i] += 1;
      want_rows[i] += w;
      want_columns[j] += w;
      want_rows[c.n + i] += incoming[i] * hinge * std::exp(own[i] - both);
      want_columns[c.m + j] += incoming[i] * hinge * std::exp(others[j] - both);
      for (int64_t d = 0; d < c.depth; ++d) {
        want_a[i * c.depth + d] += w * b[j * c.depth + d];
        want_b[j * c.depth + d] += w * a[i * c.depth + d];
      }
    }
  }
  return std::max({difference(values, want_values, c.m), difference(rows, want_rows, 1),
                   difference(columns, want_columns, 1), difference(product_a, want_a, 1),
                   difference(product_b, want_b, 1)});
}

// Sweeps that the questions take with their gradients, or without.
double passes_of_sigmoid(bool tags, bool gradients) {
  constexpr int64_t n = 3072;
  constexpr int64_t depth = 32;
  std::mt19937 generator(19);
  const std::vector<float> a = random_rows(n, depth, generator);
  const std::vector<float> b = random_rows(n, depth, generator);
  const std::vector<float> shifts(n, -2.0f), ones(n, 1.0f);
  Problem problem{};
  problem.a = matrix(a, n, depth);
  problem.b = matrix(b, n, depth);
  problem.scale = 5;
  const OwnTags own(n, 0);
  if (tags) problem.a_tags = problem.b_tags = own.tags();
  std::vector<float> costs(n), product_a(n * depth), product_b(n * depth);
  const int64_t before = fastcl::cpu::counted_multiply_adds();
  fastcl::cpu::sigmoid_pairs(problem, threads(2), {shifts.data(), ones.data(), gradients ? ones.data() : nullptr},
                             costs.data(), gradients ? product_a.data() : nullptr,
                             gradients ? product_b.data() : nullptr, nullptr);
  return static_cast<double>(fastcl::cpu::counted_multiply_adds() - before) / (static_cast<double>(n) * n * depth);
}

// A softmax loss for whose passes there is a floor.
struct Loss {
  const char* name;
  bool symmetric, columns, frozen;
  Test id;  // of a negative
  double passes, padding;
};

// Sweeps of n * m * depth multiply-adds that it takes with its gradient, counted in the micro-kernel.
double passes(const Loss& loss) {
  // A multiple of every tile, strip and panel, so that nothing is padding.
  constexpr int64_t n = 3072;
  constexpr int64_t depth = 32;
  std::mt19937 generator(13);
  const std::vector<float> a = random_rows(n, depth, generator);
  const std::vector<float> b = random_rows(n, depth, generator);
  Problem problem{};
  problem.a = matrix(a, n, depth);
  problem.b = loss.symmetric ? problem.a : matrix(b, n, depth);
  problem.symmetric = loss.symmetric;
  problem.scale = 5;
  problem.shift = problem.scale * (1 + 1.0f / 128) - (80 - std::log(static_cast<float>(n)));
  problem.flag_below = std::log(1e6f * n * 1.17549435e-38f);
  problem.lowest = -problem.scale - problem.shift;
  std::vector<int64_t> target(n);
  for (int64_t i = 0; i < n; ++i) target[i] = (i + n / 2) % n;
  problem.target = target.data();
  OwnTags tags(n, 0);
  // Where a pair's ids have to be equal, no row has a negative: what is empty is not computed again.
  if (loss.id == kYes) std::iota(tags.id.begin(), tags.id.end(), 0);
  problem.a_tags = problem.b_tags = tags.tags();
  const PairTerm negatives{Reduce::kLogSumExp, kNo, kNo, kAny, loss.id};
  problem.row_terms = {negatives, {Reduce::kSum, kAny, kYes}};
  if (loss.columns) problem.column_terms = {negatives};
  std::vector<float> rows(2 * n), column(n), product_a(n * depth), product_b(n * depth);
  const int64_t before = fastcl::cpu::counted_multiply_adds();
  fastcl::cpu::cross_entropy(problem, threads(2), {nullptr, nullptr}, {rows.data(), column.data()}, product_a.data(),
                             loss.symmetric || loss.frozen ? nullptr : product_b.data(), nullptr);
  return static_cast<double>(fastcl::cpu::counted_multiply_adds() - before) / (static_cast<double>(n) * n * depth);
}

// The floors, and the part of the diagonal's tiles that whole strips and panels take beyond the triangle.
int check_passes(const std::string& level) {
  const Loss losses[] = {{"NT-Xent", true, false, false, kAny, 2, 0.05},
                         {"NT-Xent with ids", true, false, false, kNo, 2, 0.05},
                         {"NT-Xent without negatives", true, false, false, kYes, 2, 0.05},
                         {"CLIP", false, true, false, kAny, 4, 0},
                         {"CLIP with ids", false, true, false, kNo, 4, 0},
                         {"InfoNCE", false, false, false, kAny, 3, 0},
                         {"InfoNCE with ids", false, false, false, kNo, 3, 0},
                         {"InfoNCE without negatives", false, false, false, kYes, 3, 0},
                         {"InfoNCE with frozen keys", false, false, true, kAny, 2, 0}};
  int failures = 0;
  const auto judge = [&](const char* name, double counted, double floor, double padding) {
    if (counted >= floor - 1e-9 && counted <= floor + padding + 1e-9) return;
    std::printf("%s: %s takes %g passes, expected %g\n", level.c_str(), name, counted, floor);
    ++failures;
  };
  for (const Loss& loss : losses) judge(loss.name, passes(loss), loss.passes, loss.padding);
  for (const bool tags : {false, true}) {
    judge("SigLIP", passes_of_sigmoid(tags, true), 3, 0);
    judge("SigLIP's value", passes_of_sigmoid(tags, false), 1, 0);
  }
  return failures;
}

}  // namespace

int main(int argc, char** argv) {
  const bool only_threads = argc > 1 && std::string(argv[1]) == "threads";
  const Case cases[] = {{1, 1, 3, true, 10},      {1, 7, 1, false, 10},       {37, 37, 5, true, 10},
                        {600, 600, 9, true, 5},   {330, 520, 17, false, 5},   {700, 40, 24, false, 20},
                        {300, 300, 8, true, 200}, {60, 110, 700, false, 200}, {900, 900, 24, true, 5},
                        {900, 1100, 24, false, 5}};
  int failures = 0;
  for (const std::string& level : fastcl::cpu::available_levels()) {
    setenv("FASTCL_CPU_LEVEL", level.c_str(), 1);
    for (const Case& c : cases) {
      const int count = c.n < 300 ? 1 : 3;
      if (only_threads && count == 1) continue;
      const auto report = [&](const char* what, double error) {
        if (error < 1e-3) return;
        ++failures;
        std::printf("%s: n=%ld m=%ld depth=%ld symmetric=%d threads=%d, %s: error %g\n", level.c_str(), long(c.n),
                    long(c.m), long(c.depth), c.symmetric, count, what, error);
      };
      for (const Terms& terms : kTerms) report(terms.name, check(c, terms, threads(count)));
      for (const bool ids : {false, true}) {
        if (c.symmetric) continue;
        report("cross entropy", check_cross_entropy(c, ids, threads(count)));
        report("sigmoid", check_sigmoid(c, ids, threads(count)));
        report("pairs", check_pairs(c, ids, threads(count)));
      }
    }
    if (!only_threads) failures += check_passes(level);
    std::printf("%s: done\n", level.c_str());
  }
  return failures != 0;
}
