// The functions of every pair, a row against a vector of columns at a time.
//
// A function makes outputs of the pairs, to be summed (or else, see pairs.h) along the row, and returns the gradient
// that these have with respect to S. Pairs that don't count make 0, or -inf of what is a maximum. A function of class
// logit makes the one number whose log-sum-exp along the row is wanted.
#pragma once

#include "exp2.h"
#include "masks.h"

namespace fastcl::cpu {
namespace {

// What functions are given of a strip's rows, and of a tile's columns.
struct PairRows {
  float squares[kStrip];
  float given[kMostGiven][kStrip];
  float incoming[kMostOutputs][kStrip];
  int32_t own[kStrip];  // columns of the own keys, within the tile
};

struct PairColumns {
  alignas(64) float squares[kMaxTile];
  alignas(64) float given[kMaxTile];
};

struct Pairs {
  const PairRows& rows;
  const PairColumns& columns;
  int r;
  int64_t c;
  Vector s;
  Vector guide;  // of the second S
  Lanes counts;  // not padding
  Lanes own;
  Lanes label;
  Lanes id;

  Vector squares() const { return load(columns.squares + c) + rows.squares[r]; }
  Vector row(int parameter) const { return broadcast(rows.given[parameter][r]); }
  Vector column() const { return load(columns.given + c); }
  float incoming(int output) const { return rows.incoming[output][r]; }

  Lanes positive() const { return without(both(counts, label), own); }
  Lanes negative() const { return without(without(counts, label), id); }
  Lanes candidate() const { return without(counts, without(id, own)); }
};

// The gradient with respect to S, and to the first of the further parameters.
struct PairSlopes {
  Vector s;
  Vector row;
  Vector column;

  explicit PairSlopes(Vector s = Vector{}, Vector row = Vector{}, Vector column = Vector{})
      : s(s), row(row), column(column) {}
};

inline Vector exponential(Vector x) { return exp2(x * kLog2E); }
inline Vector at_least_zero(Vector x) { return x < 0.0f ? Vector{} : x; }
inline Vector among(Lanes lanes, Vector x) { return select(lanes, x, broadcast(-INFINITY)); }
inline Vector count(Lanes lanes) { return only(lanes, broadcast(1.0f)); }

// Euclidean, or 1 - S. At a distance of 0 the slope is 0.
template <bool kEuclidean>
struct Distance {
  Vector d;

  explicit Distance(const Pairs& pairs) {
    d = kEuclidean ? square_root(at_least_zero(pairs.squares() - 2.0f * pairs.s)) : 1.0f - pairs.s;
  }

  Vector slope(Vector gradient) const { return kEuclidean ? only(differ(d, Vector{}), -gradient / d) : -gradient; }
};

template <bool kEuclidean>
struct Contrastive {
  static constexpr PairFunction kFunction = PairFunction::kContrastive;
  const float* margins;

  PairSlopes operator()(const Pairs& pairs, Vector* outputs) const {
    const Distance<kEuclidean> distance(pairs);
    const Vector pull = only(pairs.positive(), at_least_zero(distance.d - margins[0]));
    const Vector push = only(pairs.negative(), at_least_zero(margins[1] - distance.d));
    const Lanes far = differ(pull, Vector{});
    const Lanes close = differ(push, Vector{});
    outputs[0] = pull;
    outputs[1] = count(far);
    outputs[2] = push;
    outputs[3] = count(close);
    const Vector pulled = broadcast(pairs.incoming(0));
    const Vector pushed = broadcast(pairs.incoming(2));
    return PairSlopes(distance.slope(only(far, pulled) - only(close, pushed)));
  }
};

template <bool kEuclidean>
struct Negatives {
  static constexpr PairFunction kFunction = PairFunction::kNegatives;
  const float* margin;

  Vector logit(const Pairs& pairs) const { return among(pairs.negative(), *margin - Distance<kEuclidean>(pairs).d); }
};

// Given the log-sum-exp of the row.
template <bool kEuclidean>
struct NegativesSlope {
  static constexpr PairFunction kFunction = PairFunction::kNegativesSlope;
  const float* margin;

  PairSlopes operator()(const Pairs& pairs, Vector*) const {
    const Distance<kEuclidean> distance(pairs);
    const Vector share = exponential(*margin - distance.d - pairs.row(0));
    return PairSlopes(distance.slope(only(pairs.negative(), share * -pairs.incoming(0))));
  }
};

// Given what the rows and the columns have as log-sum-exps of their negatives.
template <bool kEuclidean>
struct Lifted {
  static constexpr PairFunction kFunction = PairFunction::kLifted;
  const float* margin;

  PairSlopes operator()(const Pairs& pairs, Vector* outputs) const {
    const Distance<kEuclidean> distance(pairs);
    const Vector own = pairs.row(0);
    const Vector others = pairs.column();
    const Vector high = own > others ? own : others;
    const Vector low = own > others ? others : own;
    const Vector e = exponential(low - high);
    const Vector sum = high + (high == -INFINITY ? Vector{} : log1p(e));
    const Vector hinge = only(pairs.positive(), at_least_zero(sum + (distance.d - *margin)));
    outputs[0] = 0.5f * hinge * hinge;
    outputs[1] = count(pairs.positive());
    const Vector gradient = hinge * pairs.incoming(0);
    const Vector of_high = gradient / (1.0f + e);
    const Vector of_low = of_high * e;
    const Lanes active = differ(gradient, Vector{});
    return PairSlopes(distance.slope(gradient), only(active, own > others ? of_high : of_low),
                      only(active, own > others ? of_low : of_high));
  }
};

template <bool kEuclidean>
struct Hardest {
  static constexpr PairFunction kFunction = PairFunction::kHardest;

  PairSlopes operator()(const Pairs& pairs, Vector* outputs) const {
    const Distance<kEuclidean> distance(pairs);
    outputs[0] = among(pairs.positive(), distance.d);
    outputs[2] = among(pairs.negative(), -distance.d);
    return PairSlopes();
  }
};

template <bool kEuclidean>
struct Similarities {
  static constexpr PairFunction kFunction = PairFunction::kSimilarities;

  PairSlopes operator()(const Pairs& pairs, Vector* outputs) const {
    const Vector d = Distance<kEuclidean>(pairs).d;
    const Vector similarity = 1.0f - (kEuclidean ? 0.5f * d * d : d);
    outputs[0] = among(pairs.positive(), similarity);
    outputs[1] = among(pairs.negative(), similarity);
    outputs[2] = only(pairs.positive(), similarity);
    outputs[3] = count(pairs.positive());
    return PairSlopes();
  }
};

// Half of the squared distance.
inline Vector half_square(const Pairs& pairs) { return at_least_zero(0.5f * pairs.squares() - pairs.s); }

// The nearest negative's as a maximum.
struct Nearest {
  static constexpr PairFunction kFunction = PairFunction::kNearest;

  PairSlopes operator()(const Pairs& pairs, Vector* outputs) const {
    const Vector square = half_square(pairs);
    outputs[0] = only(pairs.positive(), square);
    outputs[1] = among(pairs.negative(), -square);
    return PairSlopes();
  }
};

// The logarithm of a negative's importance, up to the row's constant: factor * square^exponent.
template <bool kPower>
struct Importance {
  static constexpr PairFunction kFunction = kPower ? PairFunction::kPowerImportance : PairFunction::kImportance;
  const float* numbers;

  Vector of(Vector square) const { return (kPower ? exp2(log2(square) * numbers[1]) : square) * numbers[0]; }

  Vector logit(const Pairs& pairs) const { return among(pairs.negative(), of(half_square(pairs))); }
};

// Given the row's positive (half of its squared distance) and the log-sum-exp of its importances.
template <bool kPower>
struct Energy {
  static constexpr PairFunction kFunction = kPower ? PairFunction::kPowerEnergy : PairFunction::kEnergy;
  const float* numbers;

  PairSlopes operator()(const Pairs& pairs, Vector* outputs) const {
    const Vector square = half_square(pairs);
    const Vector logit = Importance<kPower>{numbers}.of(square);
    const Vector alpha = only(pairs.negative(), exponential(logit - pairs.row(1)));
    outputs[0] = only(pairs.negative(), alpha * (pairs.row(0) - square));
    return PairSlopes(alpha * pairs.incoming(0));
  }
};

struct Candidates {
  static constexpr PairFunction kFunction = PairFunction::kCandidates;

  Vector logit(const Pairs& pairs) const { return among(pairs.candidate(), pairs.s); }
};

// Given the log-sum-exps of both rows, S's and the guide's.
struct SoftTargets {
  static constexpr PairFunction kFunction = PairFunction::kSoftTargets;

  PairSlopes operator()(const Pairs& pairs, Vector* outputs) const {
    const Lanes candidate = pairs.candidate();
    const Vector target = only(candidate, exponential(pairs.guide - pairs.row(1)));
    outputs[0] = only(candidate, target * (pairs.row(0) - pairs.s));
    const Vector share = only(candidate, exponential(pairs.s - pairs.row(0)));
    return PairSlopes((share - target) * pairs.incoming(0));
  }
};

struct Squares {
  static constexpr PairFunction kFunction = PairFunction::kSquares;

  PairSlopes operator()(const Pairs& pairs, Vector* outputs) const {
    const Vector s = only(without(pairs.counts, pairs.id), pairs.s);
    outputs[0] = s * s;
    return PairSlopes(2.0f * pairs.incoming(0) * s);
  }
};

}  // namespace
}  // namespace fastcl::cpu
