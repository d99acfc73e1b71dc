// The pair functions of fastcl/terms.py: which pairs a term admits, how it reduces them, and its slope.
//
// Shared by the CPU and the CUDA engines: no Torch headers, nothing but the C math library.
#pragma once

#include <cmath>
#include <cstdint>

// Internal linkage: the CPU engine compiles this file once for each instruction set, and the linker must not merge
// them.
#if defined(__CUDACC__)
#define FASTCL_PAIR_FUNCTION __host__ __device__ static inline
#else
#define FASTCL_PAIR_FUNCTION [[maybe_unused]] static inline
#endif

namespace fastcl {

enum class Reduce : int8_t { kLogSumExp = 0, kSum = 1, kMax = 2 };
enum class Test : int8_t { kForbidden = -1, kAbsent = 0, kRequired = 1 };

struct PairTerm {
  Reduce reduce;
  Test self_pair;
  Test target;
  Test label = Test::kAbsent;
  Test id = Test::kAbsent;
  Test above = Test::kAbsent;
};

FASTCL_PAIR_FUNCTION bool passes(Test test, bool outcome) {
  return test == Test::kAbsent || (test == Test::kRequired) == outcome;
}

FASTCL_PAIR_FUNCTION bool admits(const PairTerm& term, bool self_pair, bool target, bool label = false, bool id = false,
                                 bool above = false) {
  return passes(term.self_pair, self_pair) && passes(term.target, target) && passes(term.label, label) &&
         passes(term.id, id) && passes(term.above, above);
}

// A sparse term admits no more than the few pairs that a required test names; of a dense one, these tests leave all
// but a few.
FASTCL_PAIR_FUNCTION bool is_dense(const PairTerm& term) {
  return term.self_pair != Test::kRequired && term.target != Test::kRequired;
}

// log(exp(x) + exp(y)), also for two infinities of the same sign.
FASTCL_PAIR_FUNCTION double log_add_exp(double x, double y) {
  const double high = x > y ? x : y;
  const double low = x > y ? y : x;
  if (std::isnan(x) || std::isnan(y)) return x + y;
  return std::isinf(high) ? high : high + std::log1p(std::exp(low - high));
}

// Whether a term looks at more of a pair than whether it is the row itself or its target.
FASTCL_PAIR_FUNCTION bool tests_tags(const PairTerm& term) {
  return term.label != Test::kAbsent || term.id != Test::kAbsent || term.above != Test::kAbsent;
}

// The value of a term that has admitted no pair yet.
FASTCL_PAIR_FUNCTION double empty_value(Reduce reduce) { return reduce == Reduce::kSum ? 0.0 : -INFINITY; }

// The value of a term after one more pair, or after merging with another part of the same row.
FASTCL_PAIR_FUNCTION double absorb(Reduce reduce, double value, double logit) {
  switch (reduce) {
    case Reduce::kLogSumExp:
      return log_add_exp(value, logit);
    case Reduce::kSum:
      return value + logit;
    default:
      return std::isnan(value) || value > logit ? value : logit;
  }
}

// d value / d logit at an admitted pair.
FASTCL_PAIR_FUNCTION double slope(Reduce reduce, double value, double logit) {
  switch (reduce) {
    case Reduce::kLogSumExp:
      return value == -INFINITY ? 0.0 : std::exp(logit - value);
    case Reduce::kSum:
      return 1.0;
    default:
      return 0.0;
  }
}

// -log softmax of a positive whose negatives' log-sum-exp is greater by x, and its derivative.
FASTCL_PAIR_FUNCTION double softplus(double x) {
  return x > 0.0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}
FASTCL_PAIR_FUNCTION double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

}  // namespace fastcl
