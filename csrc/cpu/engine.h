// The CPU engine's interface: statistics of S = scale * A @ B.T and the products of its gradient, on raw pointers.
//
// Nothing here knows Torch. The meaning of a plan is in fastcl/terms.py, that of a term in pair_terms.h.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "../pair_terms.h"
#include "pairs.h"

namespace fastcl::cpu {

enum class Dtype : int8_t { kFloat32, kBFloat16, kFloat16 };

// A matrix in the caller's memory, with strides counted in elements.
struct Matrix {
  const void* data;
  Dtype dtype;
  int64_t rows;
  int64_t depth;
  int64_t row_stride;
  int64_t depth_stride;
};

// What masks test about each row of a matrix, null where no term does. Labels are ranks among all labels of the
// problem; those of the ranks [nearest, nearest + reach] are near enough to a row's own to count as equal.
struct Tags {
  const int32_t* label;
  const int32_t* nearest;
  const int32_t* reach;
  const int32_t* id;
  const float* threshold;
};

struct Problem {
  Matrix a;
  Matrix b;
  bool symmetric;            // b is a, and only the pairs on and above the diagonal are computed
  float scale;               //
  float shift;               // c in exp(S - c)
  float flag_below;          // a log-sum-exp L with L - c below this is not trusted
  float lowest = -INFINITY;  // no finite S - c is below this
  const int64_t* target;     // [a.rows] or null
  Tags a_tags;
  Tags b_tags;
  int64_t row0;  // global index of a's first row
  int64_t col0;
  std::vector<PairTerm> row_terms;
  std::vector<PairTerm> column_terms;
};

// How to run body(0) ... body(count - 1) on up to `threads` threads.
struct Workers {
  int threads;
  std::function<void(int64_t count, const std::function<void(int64_t)>& body)> parallel_for;
};

// Values or gradients of all terms: rows [row_terms, a.rows] and columns [column_terms, b.rows].
template <class Float>
struct Vectors {
  Float* rows;
  Float* columns;
};

void statistics(const Problem& problem, const Workers& workers, Vectors<float> out);

// a = W @ B [a.rows, depth] and b = W.T @ A [b.rows, depth], null where not wanted. Symmetric: a = (W + W.T) @ A.
void gradient(const Problem& problem, const Workers& workers, Vectors<const float> statistics,
              Vectors<const float> incoming, float* a, float* b);

// The loss that a plan's statistics stand for: each log-sum-exp L contributes weights[i] * softplus(L[i] -
// positive[i]).
struct CrossEntropy {
  const float* positive;  // [a.rows], or null: the plan's sum along rows is the positive
  const float* weights;   // [a.rows], or null: all 1
};

// The loss, the statistics and the products of the loss's gradient as above. `positive` gets the gradient with respect
// to head.positive. Null where not wanted.
double cross_entropy(const Problem& problem, const Workers& workers, const CrossEntropy& head,
                     Vectors<float> statistics, float* a, float* b, float* positive);

// Every pair as a yes-or-no question with the logit x = scale * <a, b> + shifts[j]. The row's own key (j = i + row0)
// and those of an equal label cost softplus(-x), others of an equal id nothing, all others factors[i] * softplus(x).
struct Questions {
  const float* shifts;    // [b.rows]
  const float* factors;   // [a.rows]
  const float* incoming;  // [a.rows], gradients with respect to the rows' costs; null where no gradient is wanted
};

// The rows' costs, the products of their gradient as above and the sums of W along columns, null where not wanted.
// Returns the sum of W. The problem has neither terms nor a target, and col0 = 0.
double sigmoid_pairs(const Problem& problem, const Workers& workers, const Questions& questions, float* costs, float* a,
                     float* b, float* columns);

// A function of every pair of S = scale * <a, b> + bias, whose outputs are summed (or else, see pairs.h) along rows;
// the formulas are in pair_functions.h.
struct PairOperands {
  PairFunction function;
  float bias;
  const float* numbers;      // [2]
  const float* row_squares;  // [a.rows], squared norms, or null where the distance is 1 - S
  const float* column_squares;
  const float* row_given;     // [row_given, a.rows] further parameters, as many as the function has
  const float* column_given;  // [column_given, b.rows]
  const float* incoming;      // [incoming, a.rows], the gradients of outputs; null where no gradient is wanted
};

// Null where not wanted. Sums of the gradient with respect to S are followed by those of the further parameter that the
// function differentiates, if there is one.
struct PairResults {
  float* values;       // [outputs, a.rows]
  float* a;            // products as above
  float* b;            //
  float* row_sums;     // [1 or 2, a.rows]
  float* column_sums;  // [1 or 2, b.rows]
};

// `guide` is a second problem over as many rows, for the functions that look at two similarities, or null. Problems
// have neither terms nor a target, and col0 = 0.
void pair_panels(const Problem& problem, const Problem* guide, const Workers& workers, const PairOperands& operands,
                 const PairResults& results);

// Each row of S as the anchor of triplets: another row p of its label, and a row n of another label (and another id). A
// triplet costs [d(p) - d(n) + margin]+; if semihard, only where d(n) > d(p).
struct Triplets {
  float bias;
  float margin;
  bool semihard;
  const float* row_squares;  // as in PairOperands
  const float* column_squares;
  const float* incoming;  // [a.rows], null where no gradient is wanted
};

// The sums of costs and the numbers of those that aren't 0 are the values [2, a.rows].
void all_triplets(const Problem& problem, const Workers& workers, const Triplets& triplets, const PairResults& results);

// The rows of a matrix scaled to unit length, `pitch` numbers of its type apart, and 1 / norm of each (see rows.h).
void normalize(const Matrix& matrix, const Workers& workers, void* unit, int64_t pitch, float* inverse);

// A good pitch for that: rows a multiple of 4 KB apart, which share a set of the first-level cache, get a line more.
int64_t unit_pitch(const Matrix& matrix);

// Turns a product into the gradient with respect to the matrix in place; `inverse` is null unless it was normalised.
// Returns the sum of product * row (of unit length), which is the gradient of the scale.
double finish(const Matrix& matrix, const Workers& workers, const float* inverse, float factor, float* product);

// The instruction-set levels this machine can run, best last, and the one in use: the best, or $FASTCL_CPU_LEVEL.
std::vector<std::string> available_levels();
std::string selected_level();

// Floating-point operations a second that the calling thread reaches in the multiply-adds of that level which serve
// operands of `dtype`, with nothing to load or store. Takes some 30 ms.
double peak_flops(Dtype dtype);

#ifdef FASTCL_COUNT_MULTIPLY_ADDS
// What the micro-kernel has done so far, for the test that holds the engine to its passes.
int64_t counted_multiply_adds();
#endif

}  // namespace fastcl::cpu
