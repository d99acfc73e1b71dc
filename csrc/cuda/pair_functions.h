// Functions of every single pair: what a pair adds to the numbers of its row, and its weight W in the gradient.
//
// Their definitions, over whole rows, are the panel functions of fastcl/losses. A function is made for one row and
// called with some of the row's pairs in the order of their columns; merge() takes in what the row's other pairs of
// this tile have come to, and then `sums` are the tile's numbers of the row. How tiles add up,
// fastcl/backends/cuda/panel_functions.py says. Functions that need to know a whole row first come twice: for its
// numbers, and for W.
#pragma once

#include "finish.h"

namespace fastcl::cuda {

struct Pair {
  float s;
  float guide;                // its logit in a second S, where there is one
  float params[kMostParams];  // the column's, 0 where there is none
  int column;
  bool is_own;  // the column is the row's own key
  bool same_label;
  bool same_id;
};

FASTCL_DEVICE float exp_fast(float x) { return exp2_fast(x * kLog2E); }

// Numbers of a row that are sums.
template <int kCount>
struct Sums {
  static constexpr int kSums = kCount;
  float sums[kCount] = {};

  FASTCL_DEVICE void merge() {
#pragma unroll
    for (float& sum : sums) sum += shuffle_xor(sum, 1);
  }
};

// Functions that have a weight alone.
struct NoSums {
  static constexpr int kSums = 0;
  FASTCL_DEVICE void merge() const {}
};

// softplus(x) and its slope sigmoid(x) share exp(-|x|), which neither overflows nor loses the smaller of two summands.
struct Softplus {
  float x;
  float e;

  FASTCL_DEVICE explicit Softplus(float logit) : x(logit), e(exp_fast(logit > 0.0f ? -logit : logit)) {}

  FASTCL_DEVICE float value() const { return (x < 0.0f ? 0.0f : x) + log1pf(e); }
  FASTCL_DEVICE float slope() const { return (x > 0.0f ? 1.0f : e) / (1.0f + e); }
};

// Whether each pair is a match (fastcl/losses/sigmoid.py).
struct Questions : Sums<1> {
  float factor;
  float incoming;

  FASTCL_DEVICE Questions(const PairsArguments& x, int i)
      : factor(x.row_params.at(0, i, 1.0f)), incoming(x.incoming.at(0, i)) {}

  FASTCL_DEVICE float operator()(const Pair& pair) {
    const bool yes = pair.is_own || pair.same_label;
    if (pair.same_id && !yes) return 0.0f;
    const float logit = pair.s - pair.params[0];
    const Softplus softplus(yes ? -logit : logit);
    const float share = yes ? 1.0f : factor;
    sums[0] += softplus.value() * share;
    return softplus.slope() * (yes ? -share : share) * incoming;
  }
};

// The distance of a pair (fastcl/losses/distances.py): Euclidean where rows and columns have squared norms as parameter
// kSquares, else 1 - S.
struct Distance {
  float value;
  float slope;  // d value / d S, negated; 0 where the distance is 0
};

template <int kSquares>
struct Metric {
  bool euclidean;
  float square;

  FASTCL_DEVICE Metric(const PairsArguments& x, int i)
      : euclidean(x.row_params.number > kSquares), square(x.row_params.at(kSquares, i)) {}

  FASTCL_DEVICE float squared(const Pair& pair) const {
    const float squared = square + pair.params[kSquares] - 2.0f * pair.s;
    return squared < 0.0f ? 0.0f : squared;
  }
  FASTCL_DEVICE Distance operator()(const Pair& pair) const {
    if (!euclidean) return {1.0f - pair.s, 1.0f};
    const float square = squared(pair);
    const float inverse = square == 0.0f ? 0.0f : inverse_square_root(square);
    return {square * inverse, inverse};
  }
};

FASTCL_DEVICE bool is_positive(const Pair& pair) { return pair.same_label && !pair.is_own; }
FASTCL_DEVICE bool is_negative(const Pair& pair) { return !pair.same_label && !pair.same_id; }

// Hinges and how many are active, of positives and of negatives (fastcl/losses/contrastive.py). A distance that isn't a
// number counts, so that it is seen.
struct Contrastive : Sums<4> {
  Metric<0> metric;
  float positive_margin;
  float negative_margin;
  float pulled;
  float pushed;

  FASTCL_DEVICE Contrastive(const PairsArguments& x, int i)
      : metric(x, i),
        positive_margin(x.constants[0]),
        negative_margin(x.constants[1]),
        pulled(x.incoming.at(0, i)),
        pushed(x.incoming.at(2, i)) {}

  FASTCL_DEVICE float operator()(const Pair& pair) {
    const Distance distance = metric(pair);
    if (is_positive(pair) && !(distance.value <= positive_margin)) {
      sums[0] += distance.value - positive_margin;
      sums[1] += 1.0f;
      return -pulled * distance.slope;
    }
    if (is_negative(pair) && !(distance.value >= negative_margin)) {
      sums[2] += negative_margin - distance.value;
      sums[3] += 1.0f;
      return pushed * distance.slope;
    }
    return 0.0f;
  }
};

// Half the squared hinges of positive pairs and their number (fastcl/losses/lifted_structure.py). Parameter 0 is the
// log-sum-exp of negatives: the third sum is the gradient of the row's, and column_gradient() is the column's.
struct PositivePairs : Sums<3> {
  Metric<1> metric;
  float margin;
  float own;
  float incoming;

  FASTCL_DEVICE PositivePairs(const PairsArguments& x, int i)
      : metric(x, i), margin(x.constants[0]), own(x.row_params.at(0, i)), incoming(x.incoming.at(0, i)) {}

  FASTCL_DEVICE float operator()(const Pair& pair) {
    if (!is_positive(pair)) return 0.0f;
    sums[1] += 1.0f;
    const Distance distance = metric(pair);
    const float both = of_both(pair);
    const float hinge = both + (distance.value - margin);
    if (hinge <= 0.0f) return 0.0f;
    sums[0] += 0.5f * hinge * hinge;
    const float gradient = hinge * incoming;
    sums[2] += exp_fast(own - both) * gradient;
    return -gradient * distance.slope;
  }

  FASTCL_DEVICE float column_gradient(const Pair& pair) const {
    if (!is_positive(pair)) return 0.0f;
    const float both = of_both(pair);
    const float hinge = both + (metric(pair).value - margin);
    return hinge <= 0.0f ? 0.0f : exp_fast(pair.params[0] - both) * hinge * incoming;
  }

  FASTCL_DEVICE float of_both(const Pair& pair) const {
    const float high = own < pair.params[0] ? pair.params[0] : own;
    const float low = own < pair.params[0] ? own : pair.params[0];
    return high == -kInfinity ? high : high + log1pf(exp_fast(low - high));
  }
};

// A sum of exponentials below a maximum of its own, and numbers weighted by them.
struct Softmax {
  float largest = -kInfinity;  // in base 2
  float total = 0.0f;
  float weighted = 0.0f;

  FASTCL_DEVICE void add(float logit, float number) {
    const float x = logit * kLog2E;
    if (x <= largest) {
      const float share = exp2_fast(x - largest);
      total += share;
      weighted += share * number;
    } else {
      const float shrink = exp2_fast(largest - x);
      total = total * shrink + 1.0f;
      weighted = weighted * shrink + number;
      largest = x;
    }
  }

  FASTCL_DEVICE void merge() {
    const float theirs = shuffle_xor(largest, 1);
    const float high = theirs > largest ? theirs : largest;
    const float shrink = exp2_fast(largest - (high == -kInfinity ? 0.0f : high));
    largest = high;
    total *= shrink;
    weighted *= shrink;
    total += shuffle_xor(total, 1);
    weighted += shuffle_xor(weighted, 1);
  }

  FASTCL_DEVICE float log_sum() const { return shifted_log(total, largest); }
  FASTCL_DEVICE float mean() const { return total == 0.0f ? 0.0f : weighted / total; }
};

// The log-sum-exp of a margin minus negatives' distances.
struct Negatives {
  static constexpr int kSums = 1;
  Metric<0> metric;
  float margin;
  Softmax softmax;
  float sums[kSums];

  FASTCL_DEVICE Negatives(const PairsArguments& x, int i) : metric(x, i), margin(x.constants[0]) {}

  FASTCL_DEVICE float operator()(const Pair& pair) {
    if (is_negative(pair)) softmax.add(margin - metric(pair).value, 0.0f);
    return 0.0f;
  }
  FASTCL_DEVICE void merge() {
    softmax.merge();
    sums[0] = softmax.log_sum();
  }
};

struct NegativesWeights : NoSums {
  Metric<0> metric;
  float margin;
  float lse;
  float incoming;

  FASTCL_DEVICE NegativesWeights(const PairsArguments& x, int i)
      : metric(x, i), margin(x.constants[0]), lse(x.found.at(0, i)), incoming(x.incoming.at(0, i)) {}

  FASTCL_DEVICE float operator()(const Pair& pair) const {
    if (!is_negative(pair)) return 0.0f;
    const Distance distance = metric(pair);
    return exp_fast(margin - distance.value - lse) * incoming * distance.slope;
  }
};

// Half the squared distance, and how important a negative at it is (fastcl/losses/alpha_cl.py).
struct Importance {
  PairFunction rule;
  float square;
  float tau;
  float power;

  FASTCL_DEVICE Importance(const PairsArguments& x, int i, PairFunction softmax, PairFunction uniform)
      : rule(x.function == softmax   ? PairFunction::kEnergySoftmax
             : x.function == uniform ? PairFunction::kEnergyUniform
                                     : PairFunction::kEnergyPower),
        square(x.row_params.at(0, i)),
        tau(x.constants[0]),
        power(x.constants[1]) {}

  FASTCL_DEVICE float squared(const Pair& pair) const {
    const float squared = 0.5f * (square + pair.params[0]) - pair.s;
    return squared < 0.0f ? 0.0f : squared;
  }
  FASTCL_DEVICE float logit(float squared) const {
    if (rule == PairFunction::kEnergyUniform) return 0.0f;
    const float x = rule == PairFunction::kEnergySoftmax ? squared : exp2_fast(0.5f * power * log2f(squared));
    return -x / tau;
  }
};

// The log-sum-exp of negatives' logits, and the mean of their distances under its softmax.
struct Energy {
  static constexpr int kSums = 2;
  Importance importance;
  Softmax softmax;
  float sums[kSums];

  FASTCL_DEVICE Energy(const PairsArguments& x, int i)
      : importance(x, i, PairFunction::kEnergySoftmax, PairFunction::kEnergyUniform) {}

  FASTCL_DEVICE float operator()(const Pair& pair) {
    if (!is_negative(pair)) return 0.0f;
    const float squared = importance.squared(pair);
    softmax.add(importance.logit(squared), squared);
    return 0.0f;
  }
  FASTCL_DEVICE void merge() {
    softmax.merge();
    sums[0] = softmax.log_sum();
    sums[1] = softmax.mean();
  }
};

struct EnergyWeights : NoSums {
  Importance importance;
  float lse;
  float incoming;

  FASTCL_DEVICE EnergyWeights(const PairsArguments& x, int i)
      : importance(x, i, PairFunction::kEnergySoftmaxWeights, PairFunction::kEnergyUniformWeights),
        lse(x.found.at(0, i)),
        incoming(x.incoming.at(0, i)) {}

  FASTCL_DEVICE float operator()(const Pair& pair) const {
    if (!is_negative(pair)) return 0.0f;
    return exp_fast(importance.logit(importance.squared(pair)) - lse) * incoming;
  }
};

// The log-sum-exps of S and of the guide, and the mean of S under the guide's softmax (fastcl/losses/distillation.py).
struct SoftTargets {
  static constexpr int kSums = 3;
  Softmax logits;
  Softmax guide;
  float sums[kSums];

  FASTCL_DEVICE SoftTargets(const PairsArguments&, int) {}

  FASTCL_DEVICE static bool drops(const Pair& pair) { return pair.same_id && !pair.is_own; }

  FASTCL_DEVICE float operator()(const Pair& pair) {
    if (drops(pair)) return 0.0f;
    logits.add(pair.s, 0.0f);
    guide.add(pair.guide, pair.s);
    return 0.0f;
  }
  FASTCL_DEVICE void merge() {
    logits.merge();
    guide.merge();
    sums[0] = logits.log_sum();
    sums[1] = guide.log_sum();
    sums[2] = guide.mean();
  }
};

struct SoftTargetsWeights : NoSums {
  float lse;
  float lse_of_guide;
  float incoming;

  FASTCL_DEVICE SoftTargetsWeights(const PairsArguments& x, int i)
      : lse(x.found.at(0, i)), lse_of_guide(x.found.at(1, i)), incoming(x.incoming.at(0, i)) {}

  FASTCL_DEVICE float operator()(const Pair& pair) const {
    if (SoftTargets::drops(pair)) return 0.0f;
    return (exp_fast(pair.s - lse) - exp_fast(pair.guide - lse_of_guide)) * incoming;
  }
};

// The squares of S (fastcl/losses/spectral.py).
struct Squares : Sums<1> {
  float incoming;

  FASTCL_DEVICE Squares(const PairsArguments& x, int i) : incoming(x.incoming.at(0, i)) {}

  FASTCL_DEVICE float operator()(const Pair& pair) {
    if (pair.same_id) return 0.0f;
    sums[0] += pair.s * pair.s;
    return 2.0f * pair.s * incoming;
  }
};

// The largest similarity of a positive and of a negative, the positives' sum and number (fastcl/losses/distances.py).
struct Similarities {
  static constexpr int kSums = 4;
  Metric<0> metric;
  float sums[kSums] = {-kInfinity, -kInfinity, 0.0f, 0.0f};

  FASTCL_DEVICE Similarities(const PairsArguments& x, int i) : metric(x, i) {}

  FASTCL_DEVICE float operator()(const Pair& pair) {
    const float similarity = metric.euclidean ? 1.0f - 0.5f * metric.squared(pair) : pair.s;
    if (is_positive(pair)) {
      sums[0] = Largest()(sums[0], similarity);
      sums[2] += similarity;
      sums[3] += 1.0f;
    } else if (is_negative(pair)) {
      sums[1] = Largest()(sums[1], similarity);
    }
    return 0.0f;
  }
  FASTCL_DEVICE void merge() {
#pragma unroll
    for (int t = 0; t < kSums; ++t) {
      const float theirs = shuffle_xor(sums[t], 1);
      sums[t] = t < 2 ? Largest()(sums[t], theirs) : sums[t] + theirs;
    }
  }
};

// The sum of positives' halved squared distances, and the nearest negative's, negated (fastcl/losses/alpha_cl.py).
struct Nearest {
  static constexpr int kSums = 2;
  Importance importance;
  float sums[kSums] = {0.0f, -kInfinity};

  FASTCL_DEVICE Nearest(const PairsArguments& x, int i)
      : importance(x, i, PairFunction::kEnergySoftmax, PairFunction::kEnergyUniform) {}

  FASTCL_DEVICE float operator()(const Pair& pair) {
    if (is_positive(pair)) sums[0] += importance.squared(pair);
    if (is_negative(pair)) sums[1] = Largest()(sums[1], -importance.squared(pair));
    return 0.0f;
  }
  FASTCL_DEVICE void merge() {
    sums[0] += shuffle_xor(sums[0], 1);
    sums[1] = Largest()(sums[1], shuffle_xor(sums[1], 1));
  }
};

// The farthest positive and the nearest negative (fastcl/losses/triplet.py): how far, negated for the negative, and in
// which column. Of equal ones the first counts, and whatever isn't a number wins.
struct Hardest {
  static constexpr int kSums = 4;
  Metric<0> metric;
  float sums[kSums] = {-kInfinity, -1.0f, -kInfinity, -1.0f};

  FASTCL_DEVICE Hardest(const PairsArguments& x, int i) : metric(x, i) {}

  FASTCL_DEVICE float operator()(const Pair& pair) {
    // What grows with the distance serves as well, and is exact.
    const float distance = metric.euclidean ? metric.squared(pair) : -pair.s;
    if (is_positive(pair)) offer(0, distance, pair.column);
    if (is_negative(pair)) offer(2, -distance, pair.column);
    return 0.0f;
  }
  FASTCL_DEVICE void merge() {
#pragma unroll
    for (int t = 0; t < kSums; t += 2) {
      const float value = shuffle_xor(sums[t], 1);
      const float column = shuffle_xor(sums[t + 1], 1);
      if (value == sums[t] ? column < sums[t + 1] : sums[t] == sums[t] && !(value < sums[t])) {
        sums[t] = value;
        sums[t + 1] = column;
      }
    }
  }

  FASTCL_DEVICE void offer(int t, float value, int column) {
    if (sums[t] != sums[t] || value <= sums[t]) return;
    sums[t] = value;
    sums[t + 1] = static_cast<float>(column);
  }
};

}  // namespace fastcl::cuda
