// The CUDA kernels' own source on a CPU (cuda_emulation.h), in the engine's own order of launches, against the
// definition in double precision: ragged shapes, planted positives, rows that the fixed shift hurts, outputs that start
// as NaN.
//
// Prints a line for each case and exits with 1 where a result is wrong. Arguments: names of cases, all without.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/hopper_launch.h"
#include "../../csrc/cuda/launch.h"

namespace {

using namespace fastcl::cuda;
using fastcl::PairTerm;
using fastcl::Reduce;
using fastcl::Test;

constexpr double kSmallestNormal = std::numeric_limits<float>::min();

// On which side of S some log-sum-exps are far below the bound.
enum class Hurt { kNone, kRows, kColumns };

struct Case {
  const char* name;
  Terms rows;
  Terms columns;
  bool symmetric;
  int n, m, depth;
  int self_offset;
  float scale;
  Hurt hurt;
  int label_width = 0;
};

constexpr PairTerm kLse{Reduce::kLogSumExp, Test::kAbsent, Test::kAbsent};
constexpr PairTerm kNotSelf{Reduce::kLogSumExp, Test::kForbidden, Test::kAbsent};
constexpr PairTerm kNotTarget{Reduce::kLogSumExp, Test::kAbsent, Test::kForbidden};
constexpr PairTerm kNegatives{Reduce::kLogSumExp, Test::kForbidden, Test::kForbidden};
constexpr PairTerm kSelfLogit{Reduce::kSum, Test::kRequired, Test::kAbsent};
constexpr PairTerm kTargetLogit{Reduce::kSum, Test::kAbsent, Test::kRequired};
constexpr PairTerm kSumOfOthers{Reduce::kSum, Test::kForbidden, Test::kAbsent};
constexpr PairTerm kHardest{Reduce::kMax, Test::kForbidden, Test::kForbidden};
constexpr PairTerm kLargest{Reduce::kMax, Test::kAbsent, Test::kAbsent};

constexpr Terms kNtXent{3, {kNegatives, kTargetLogit, kHardest}};
constexpr Terms kFour{4, {kNotSelf, kNegatives, kSumOfOthers, kHardest}};
constexpr Terms kClipRows{3, {kNotSelf, kSelfLogit, kLargest}};
constexpr Terms kClipColumns{2, {kNotSelf, kHardest}};
constexpr Terms kOthers{1, {kNotSelf}};
constexpr Terms kInfoNce{3, {kNotTarget, kTargetLogit, kHardest}};
constexpr Terms kTargetColumns{2, {kNotTarget, kTargetLogit}};
constexpr Terms kOnlyLse{1, {kLse}};
constexpr Terms kNone{0, {}};

constexpr Test kAny = Test::kAbsent, kYes = Test::kRequired, kNo = Test::kForbidden;
// Reduction, self pair, target, label, id, above.
constexpr PairTerm kOtherLabels{Reduce::kLogSumExp, kAny, kAny, kNo, kAny, kAny};
constexpr PairTerm kPositives{Reduce::kLogSumExp, kNo, kAny, kYes, kAny, kAny};
constexpr PairTerm kSumOfPositives{Reduce::kSum, kNo, kAny, kYes, kAny, kAny};
constexpr PairTerm kHardestPositive{Reduce::kMax, kNo, kAny, kYes, kNo, kAny};
constexpr PairTerm kNotAbove{Reduce::kLogSumExp, kNo, kNo, kAny, kNo, kNo};
constexpr PairTerm kHardestNotAbove{Reduce::kMax, kNo, kNo, kAny, kAny, kNo};
constexpr PairTerm kSumAbove{Reduce::kSum, kAny, kAny, kNo, kAny, kYes};
constexpr PairTerm kSameIdAbove{Reduce::kLogSumExp, kAny, kAny, kAny, kYes, kYes};
constexpr PairTerm kTargetOfLabel{Reduce::kSum, kAny, kYes, kYes, kAny, kAny};
constexpr PairTerm kAbove{Reduce::kLogSumExp, kAny, kAny, kAny, kAny, kYes};

constexpr Terms kSupCon{4, {kOtherLabels, kPositives, kSumOfPositives, kHardestPositive}};
constexpr Terms kMargin{4, {kNotAbove, kTargetLogit, kHardestNotAbove, kNegatives}};
constexpr Terms kTaggedRows{4, {kNotAbove, kSumAbove, kTargetOfLabel, kHardestPositive}};
constexpr Terms kTaggedColumns{4, {kSameIdAbove, kSumAbove, kOtherLabels, kHardestNotAbove}};
constexpr Terms kOnlyAbove{1, {kAbove}};

// Tiles are 128 wide: 300 is three of them, which two super-tiles share; depths end within a chunk, a block and a
// stage.
constexpr Case kCases[] = {
    {"nt_xent", kNtXent, kNone, true, 300, 300, 40, 0, 10.0f, Hurt::kNone},
    {"nt_xent_hurt", kFour, kNone, true, 260, 260, 72, 0, 100.0f, Hurt::kRows},
    {"nt_xent_few", kInfoNce, kNone, true, 384, 384, 16, 0, 10.0f, Hurt::kNone},
    {"nt_xent_tiny", kNtXent, kNone, true, 3, 3, 5, 0, 10.0f, Hurt::kNone},
    {"clip", kClipRows, kClipColumns, false, 257, 390, 24, 0, 10.0f, Hurt::kNone},
    {"clip_shard_hurt", kClipRows, kClipColumns, false, 150, 300, 130, 137, 100.0f, Hurt::kRows},
    {"clip_whole", kClipRows, kOthers, false, 256, 384, 8, 30, 10.0f, Hurt::kNone},
    {"info_nce", kInfoNce, kNone, false, 290, 131, 17, -40, 15.0f, Hurt::kNone},
    {"targets", kInfoNce, kTargetColumns, false, 129, 385, 33, 200, 100.0f, Hurt::kRows},
    {"targets_hurt", kInfoNce, kTargetColumns, false, 140, 200, 100, 20, 100.0f, Hurt::kColumns},
    {"others_hurt", kOthers, kOnlyLse, false, 200, 290, 24, 40, 100.0f, Hurt::kRows},
    {"columns", kNone, kOnlyLse, false, 130, 129, 8, 0, 5.0f, Hurt::kNone},
    {"clip_deep", kClipRows, kClipColumns, false, 270, 260, 330, 3, 20.0f, Hurt::kNone},
    {"nt_xent_deep", kNtXent, kNone, true, 400, 400, 250, 0, 20.0f, Hurt::kNone},
    {"sup_con", kSupCon, kNone, true, 300, 300, 40, 0, 10.0f, Hurt::kNone, 1},
    {"sup_con_hurt", kSupCon, kNone, true, 260, 260, 72, 0, 100.0f, Hurt::kRows},
    {"margin", kMargin, kNone, true, 290, 290, 24, 0, 10.0f, Hurt::kNone},
    {"margin_hurt", kMargin, kNone, true, 150, 150, 330, 0, 100.0f, Hurt::kRows},
    {"clip_tags", kTaggedRows, kTaggedColumns, false, 257, 390, 24, 3, 10.0f, Hurt::kNone, 2},
    {"clip_tags_hurt", kTaggedRows, kTaggedColumns, false, 150, 300, 130, 137, 100.0f, Hurt::kRows},
    {"columns_hurt", kSupCon, kTaggedColumns, false, 140, 129, 17, 0, 100.0f, Hurt::kColumns},
    {"columns_above", kNone, kOnlyAbove, false, 130, 129, 8, 0, 5.0f, Hurt::kNone},
    {"tags_tiny", kTaggedRows, kTaggedColumns, false, 3, 2, 5, 0, 10.0f, Hurt::kNone},
    {"one", kOnlyLse, kOnlyLse, false, 1, 1, 1, 5, 5.0f, Hurt::kNone},
};

// Rows in a precision, with a pitch of whole chunks whose end holds NaN, and what the kernels should read of them.
struct Rows {
  std::vector<uint32_t> storage;
  Vectors vectors;
  std::vector<double> exact;
};

enum class Format { kBFloat16, kFloat16, kTf32, kFloat32 };

float rounded(float x, Format format, void* to) {
  switch (format) {
    case Format::kBFloat16: {
      const uint16_t bits = emulation::float_to_bfloat16(x);
      std::memcpy(to, &bits, 2);
      return emulation::bfloat16_to_float(bits);
    }
    case Format::kFloat16: {
      const uint16_t bits = emulation::float_to_half(x);
      std::memcpy(to, &bits, 2);
      return emulation::half_to_float(bits);
    }
    default:
      std::memcpy(to, &x, 4);
      return format == Format::kTf32 ? float_from_bits(round_to_tf32(bits_of_float(x))) : x;
  }
}

Rows make_rows(const std::vector<float>& x, int count, int depth, Format format) {
  const int bytes = format == Format::kTf32 || format == Format::kFloat32 ? 4 : 2;
  const int64_t pitch = ceil_div(depth * bytes, kChunkBytes) * kChunkBytes + kChunkBytes;
  Rows rows{std::vector<uint32_t>(count * pitch / 4 + 4, 0xffffffffu), {}, std::vector<double>(x.size())};
  // The address of the first is a multiple of 16 bytes as well.
  unsigned char* data = reinterpret_cast<unsigned char*>(rows.storage.data());
  data += (kChunkBytes - reinterpret_cast<uintptr_t>(data) % kChunkBytes) % kChunkBytes;
  for (int i = 0; i < count; ++i) {
    for (int d = 0; d < depth; ++d) {
      rows.exact[i * depth + d] = rounded(x[i * depth + d], format, data + i * pitch + d * bytes);
    }
  }
  rows.vectors = {data, pitch, count};
  return rows;
}

// Unit vectors anywhere, or all close to one direction but for `away` of them, which point the other way.
std::vector<float> unit_rows(int count, int depth, bool close, int away, std::mt19937& generator) {
  std::normal_distribution<float> normal;
  std::vector<float> x(count * depth);
  for (int i = 0; i < count; ++i) {
    double square = 0;
    for (int d = 0; d < depth; ++d) {
      float& value = x[i * depth + d];
      value = close ? 1.0f + 0.1f * normal(generator) : normal(generator);
      square += value * value;
    }
    const float sign = i % 67 == 5 && i / 67 < away ? -1.0f : 1.0f;
    for (int d = 0; d < depth; ++d) x[i * depth + d] *= sign / static_cast<float>(std::sqrt(square));
  }
  return x;
}

template <class Float>
std::vector<Float> poisoned(int64_t size) {
  return std::vector<Float>(size, std::numeric_limits<Float>::quiet_NaN());
}

// Labels and ids: some are neighbours, some differ in the high half alone, the first is nobody else's.
std::vector<uint64_t> tags(int count, std::mt19937& generator) {
  constexpr int64_t kHigh = int64_t{1} << 62, kMiddle = int64_t{1} << 40;
  constexpr int64_t kValues[] = {-kHigh, 1 - kHigh, -7, -6, 0, kMiddle, kMiddle + 2};
  std::uniform_int_distribution<int> any(0, 6);
  std::vector<uint64_t> x(count);
  for (uint64_t& value : x) value = static_cast<uint64_t>(kValues[any(generator)]);
  x[0] = uint64_t{1} << 50;
  return x;
}

class Check {
 public:
  Check(const Case& c, Format format, emulation::Order order, int most_blocks, uint32_t seed)
      : case_(c), format_(format), order_(order), most_blocks_(most_blocks), generator_(seed) {
    // Two rows away from all others would not be away from each other.
    const bool close = c.hurt != Hurt::kNone;
    std::vector<float> a = unit_rows(c.n, c.depth, close, c.hurt == Hurt::kRows ? c.symmetric ? 1 : 3 : 0, generator_);
    std::vector<float> b =
        c.symmetric ? a : unit_rows(c.m, c.depth, close, c.hurt == Hurt::kColumns ? 3 : 0, generator_);
    // Not an involution, not injective, some outside; planted: where a target is there, the row is near to it.
    std::uniform_int_distribution<int> any(-2, c.m + 2);
    target_.resize(c.n);
    const bool few = std::string(c.name) == "nt_xent_few";
    for (int i = 0; i < c.n; ++i) {
      // A few, in one tile alone and below the diagonal: no other reason for a mask to look at that tile's mirror
      // image.
      target_[i] = !few ? any(generator_) : i < 2 * kTile ? -1 : i * 7 % kTile;
      if (target_[i] >= c.m) target_[i] = -1;
      if (c.symmetric || target_[i] < 0 || i % 2 || target_[i] % 67 == 5) continue;
      for (int d = 0; d < c.depth; ++d) a[i * c.depth + d] = b[target_[i] * c.depth + d];
    }
    a_ = make_rows(a, c.n, c.depth, format);
    b_ = make_rows(b, c.m, c.depth, format);
    const double largest = std::max(c.n, c.m);
    shift_ = static_cast<float>(c.scale * (1 + std::ldexp(1.0, -7)) - (80.0 - std::log(largest)));
    flag_below_ = static_cast<float>(std::log(1e6 * largest * kSmallestNormal));
    s_.resize(int64_t{c.n} * c.m);
    for (int i = 0; i < c.n; ++i) {
      for (int j = 0; j < c.m; ++j) {
        double sum = 0;
        for (int d = 0; d < c.depth; ++d) sum += a_.exact[i * c.depth + d] * b_.exact[j * c.depth + d];
        s_[int64_t{i} * c.m + j] = c.scale * sum;
      }
    }
    row_labels_ = tags(c.n, generator_);
    row_ids_ = tags(c.n, generator_);
    row_threshold_ = thresholds(c.n, c.m, true);
    column_labels_ = c.symmetric ? row_labels_ : tags(c.m, generator_);
    column_ids_ = c.symmetric ? row_ids_ : tags(c.m, generator_);
    column_threshold_ = c.symmetric ? row_threshold_ : thresholds(c.m, c.n, false);
  }

  template <class Precision, bool kHopper>
  bool run() {
    const Plan plan = make_plan(case_.rows, case_.columns, case_.symmetric);
    const int bytes = Precision::kBytes;
    const Similarity similarity{
        {a_.vectors, b_.vectors, case_.depth * bytes},
        {case_.n, case_.m, case_.self_offset},
        &case_.scale,
        &shift_,
        plan.uses_target ? target_.data() : nullptr,
        tags_tested(case_.rows, row_labels_, row_ids_, row_threshold_),
        tags_tested(case_.symmetric ? case_.rows : case_.columns, column_labels_, column_ids_, column_threshold_),
        static_cast<uint64_t>(case_.label_width)};
    const auto launch = [&](auto kernel, int blocks, int threads, size_t shared_bytes, const auto& arguments) {
      emulation::launch(order_, kernel, blocks, threads, shared_bytes, arguments);
    };

    constexpr int kMost = 2;
    const Workspace sizes = workspace(plan, case_.n, case_.m, kMost);
    std::vector<float> row_partials = poisoned<float>(sizes.row_partials);
    std::vector<float> column_partials = poisoned<float>(sizes.column_partials);
    std::vector<float> rows = poisoned<float>(int64_t{plan.rows.count} * case_.n);
    std::vector<float> columns = poisoned<float>(case_.symmetric ? 0 : int64_t{plan.columns.count} * case_.m);
    const StatisticsCall call{similarity,  plan,          flag_below_, row_partials.data(), column_partials.data(),
                              rows.data(), columns.data()};
    const SweepArguments sweep = sweep_arguments(call, kMost);
    if constexpr (kHopper) {
      hopper::launch_sweep<Precision>(sweep, most_blocks_, hopper::emulation::Map(), launch);
    } else {
      launch_sweep<Precision>(sweep, launch);
    }
    launch_finish<Precision>(call, sweep, launch);
    bool same = true;
    if constexpr (kHopper) same = same_bits_with_more_blocks<Precision>(sweep, sizes);
    const std::vector<double> want_rows = judge(case_.rows, true);
    const std::vector<double> want_columns = case_.symmetric ? std::vector<double>() : judge(case_.columns, false);
    const double unit = std::max(10.0f, case_.scale);
    const double error = std::max(largest_error(rows, want_rows, unit), largest_error(columns, want_columns, unit));

    // The gradient at the statistics as they should be, so that its error is its own.
    std::vector<float> row_values(want_rows.begin(), want_rows.end());
    std::vector<float> column_values(want_columns.begin(), want_columns.end());
    const std::vector<float> row_incoming = incoming(row_values.size(), case_.n);
    const std::vector<float> column_incoming = incoming(column_values.size(), case_.m);
    const std::vector<double> want = judge_weights(row_values, row_incoming, column_values, column_incoming);
    const float multiplier = format_ == Format::kFloat16 ? 1024.0f : 1.0f;
    double weights_error = 0;
    const Statistics of_rows{row_values.data(), row_incoming.data()};
    const Statistics of_columns{column_values.data(), column_incoming.data()};
    for (const Panel& panel : panels()) {
      const int64_t down = ceil_div(panel.row_end - panel.row_begin, kTile) * kTile;
      const int64_t across = ceil_div(panel.column_end - panel.column_begin, kTile) * kTile;
      std::vector<uint32_t> out(down * across * bytes / 4 + 4, 0xffffffffu);
      unsigned char* data = reinterpret_cast<unsigned char*>(out.data());
      data += (kChunkBytes - reinterpret_cast<uintptr_t>(data) % kChunkBytes) % kChunkBytes;
      const WeightsArguments arguments{similarity,    plan,
                                       of_rows,       case_.symmetric ? of_rows : of_columns,
                                       flag_below_,   format_ == Format::kFloat16 ? &multiplier : nullptr,
                                       panel,         data,
                                       across * bytes};
      if constexpr (kHopper) {
        hopper::launch_weights<Precision>(arguments, most_blocks_, hopper::emulation::Map(), launch);
      } else {
        launch_weights<Precision>(arguments, launch);
      }
      weights_error = std::max(weights_error, panel_error(panel, data, across, bytes, multiplier, want));
    }

    // float32 sums and exponentials of logits up to `unit`, and what W is stored with.
    constexpr double kTolerance = 1e-6;
    const double stored = format_ == Format::kBFloat16 ? 0x1p-8 : format_ == Format::kFloat16 ? 0x1p-11 : 0.0;
    double gradient_error = 0;
    if constexpr (Precision::kBytes == 2 && !kHopper) {
      if (!plan.tests_tags && case_.depth <= kMostOwnDepth) {
        GradientArguments arguments{similarity,  plan,
                                    of_rows,     case_.symmetric ? of_rows : of_columns,
                                    flag_below_, format_ == Format::kFloat16 ? &multiplier : nullptr,
                                    nullptr};
        gradient_error = product_error<Precision>(arguments, want, stored + kTolerance * unit, launch);
        if (!case_.symmetric) {
          arguments = exchanged(arguments);
          gradient_error =
              std::max(gradient_error, product_error<Precision>(arguments, want, stored + kTolerance * unit, launch));
        }
      }
    }
    const bool right = same && error <= kTolerance && weights_error <= kTolerance * unit + stored &&
                       gradient_error <= 1 && (flagged_ > 0) == (case_.hurt != Hurt::kNone);
    static const char* const kFormats[] = {"bfloat16", "float16", "tf32", "tf32x3"};
    std::printf("%-15s %-8s %-6s statistics %.1e, weights %.1e, in registers %.2f, flagged %d%s\n", case_.name,
                kFormats[static_cast<int>(format_)], kHopper ? "hopper" : "", error, weights_error, gradient_error,
                flagged_, right ? "" : "  WRONG");
    return right;
  }

 private:
  // How many blocks share a persistent kernel's work, and in which order they run, must not matter.
  template <class Precision>
  bool same_bits_with_more_blocks(const SweepArguments& sweep, const Workspace& sizes) const {
    std::vector<float> row_partials = poisoned<float>(sizes.row_partials);
    std::vector<float> column_partials = poisoned<float>(sizes.column_partials);
    SweepArguments again = sweep;
    again.row_partials = row_partials.data();
    again.column_partials = case_.symmetric ? row_partials.data() : column_partials.data();
    const emulation::Order order{!order_.warps_descend, !order_.copies_are_late};
    hopper::launch_sweep<Precision>(again, most_blocks_ + 1, hopper::emulation::Map(),
                                    [&](auto kernel, int blocks, int threads, size_t bytes, const auto& arguments) {
                                      emulation::launch(order, kernel, blocks, threads, bytes, arguments);
                                    });
    const auto same = [](const std::vector<float>& x, const float* y) {
      return x.empty() || std::memcmp(x.data(), y, x.size() * sizeof(float)) == 0;
    };
    return same(row_partials, sweep.row_partials) && same(column_partials, sweep.column_partials);
  }

  double logit(int i, int j) const { return s_[int64_t{i} * case_.m + j]; }

  // In the widest gap of the middle half of a row's or column's logits, away from all roundings.
  std::vector<float> thresholds(int own_count, int other_count, bool of_rows) const {
    std::vector<float> x(own_count);
    for (int own = 0; own < own_count; ++own) {
      std::vector<double> logits(other_count);
      for (int other = 0; other < other_count; ++other) logits[other] = of_rows ? logit(own, other) : logit(other, own);
      std::sort(logits.begin(), logits.end());
      double widest = 0;
      x[own] = static_cast<float>(logits[0] + 1);
      for (int k = other_count / 4; k + 1 < other_count - other_count / 4; ++k) {
        if (logits[k + 1] - logits[k] <= widest) continue;
        widest = logits[k + 1] - logits[k];
        x[own] = static_cast<float>((logits[k] + logits[k + 1]) / 2);
      }
    }
    return x;
  }

  // Labels and ids if any term of the plan tests them, thresholds if one along this side does.
  Tags tags_tested(const Terms& own, const std::vector<uint64_t>& labels, const std::vector<uint64_t>& ids,
                   const std::vector<float>& threshold) const {
    Tags tested{};
    for (const Terms* terms : {&case_.rows, &case_.columns}) {
      for (int t = 0; t < terms->count; ++t) {
        if (terms->at[t].label != Test::kAbsent) tested.labels = labels.data();
        if (terms->at[t].id != Test::kAbsent) tested.ids = ids.data();
      }
    }
    for (int t = 0; t < own.count; ++t) {
      if (own.at[t].above != Test::kAbsent) tested.threshold = threshold.data();
    }
    return tested;
  }

  bool admitted(const PairTerm& term, int i, int j, bool along_rows) const {
    const auto passes = [](Test test, bool outcome) {
      return test == Test::kAbsent || (test == Test::kRequired) == outcome;
    };
    // Exact, whatever the sign and the difference.
    const int64_t label = row_labels_[i], other = column_labels_[j];
    const uint64_t apart = label > other ? row_labels_[i] - column_labels_[j] : column_labels_[j] - row_labels_[i];
    const float threshold = along_rows ? row_threshold_[i] : column_threshold_[j];
    return passes(term.self_pair, i + case_.self_offset == j) && passes(term.target, target_[i] == j) &&
           passes(term.label, apart <= static_cast<uint64_t>(case_.label_width)) &&
           passes(term.id, row_ids_[i] == column_ids_[j]) && passes(term.above, logit(i, j) > threshold);
  }

  std::vector<double> judge(const Terms& terms, bool along_rows) {
    std::vector<double> values;
    for (int t = 0; t < terms.count; ++t) {
      const PairTerm& term = terms.at[t];
      for (int own = 0; own < (along_rows ? case_.n : case_.m); ++own) {
        double sum = 0, largest = -INFINITY;
        for (int pass = 0; pass < 2; ++pass) {
          for (int other = 0; other < (along_rows ? case_.m : case_.n); ++other) {
            const int i = along_rows ? own : other;
            const int j = along_rows ? other : own;
            if (!admitted(term, i, j, along_rows)) continue;
            if (pass == 0) largest = std::max(largest, logit(i, j));
            if (pass == 1) sum += term.reduce == Reduce::kSum ? logit(i, j) : std::exp(logit(i, j) - largest);
          }
        }
        const double value = term.reduce == Reduce::kSum   ? sum
                             : term.reduce == Reduce::kMax ? largest
                             : sum == 0                    ? -INFINITY
                                                           : largest + std::log(sum);
        flagged_ += term.reduce == Reduce::kLogSumExp && value > -INFINITY && value - shift_ < flag_below_;
        values.push_back(value);
      }
    }
    return values;
  }

  std::vector<float> incoming(size_t size, int count) {
    std::normal_distribution<float> normal;
    std::vector<float> x(size);
    for (float& value : x) value = normal(generator_) / count;
    return x;
  }

  double slope(const PairTerm& term, float value, int i, int j, bool along_rows) const {
    if (!admitted(term, i, j, along_rows) || term.reduce == Reduce::kMax) return 0;
    if (term.reduce == Reduce::kSum) return 1;
    return value == -INFINITY ? 0 : std::exp(logit(i, j) - value);
  }

  std::vector<double> judge_weights(const std::vector<float>& row_values, const std::vector<float>& row_incoming,
                                    const std::vector<float>& column_values,
                                    const std::vector<float>& column_incoming) const {
    std::vector<double> w(s_.size(), 0.0);
    for (int i = 0; i < case_.n; ++i) {
      for (int j = 0; j < case_.m; ++j) {
        double& weight = w[int64_t{i} * case_.m + j];
        for (int t = 0; t < case_.rows.count; ++t) {
          const PairTerm& term = case_.rows.at[t];
          weight += row_incoming[t * case_.n + i] * slope(term, row_values[t * case_.n + i], i, j, true);
          if (case_.symmetric)
            weight += row_incoming[t * case_.n + j] * slope(term, row_values[t * case_.n + j], j, i, true);
        }
        for (int t = 0; t < case_.columns.count; ++t) {
          weight += column_incoming[t * case_.m + j] *
                    slope(case_.columns.at[t], column_values[t * case_.m + j], i, j, false);
        }
      }
    }
    return w;
  }

  // Two rows of panels; of a symmetric plan one on the diagonal, one beside it, and the last one.
  std::vector<Panel> panels() const {
    const int height = case_.n > 2 * kTile ? 2 * kTile : kTile;
    std::vector<Panel> panels;
    for (int i = 0; i < case_.n; i += height) {
      const int end = std::min(i + height, case_.n);
      if (case_.symmetric) panels.push_back({i, end, i, end, true});
      for (int j = case_.symmetric ? end : 0; j < case_.m; j += height) {
        panels.push_back({i, end, j, std::min(j + height, case_.m), false});
      }
    }
    return panels;
  }

  double panel_error(const Panel& panel, const unsigned char* data, int64_t pitch, int bytes, float multiplier,
                     const std::vector<double>& want) const {
    double largest = 0, error = 0;
    for (double w : want) largest = std::max(largest, std::fabs(w));
    for (int i = panel.row_begin; i < panel.row_end; ++i) {
      for (int j = panel.column_begin; j < panel.column_end; ++j) {
        const unsigned char* at = data + ((i - panel.row_begin) * pitch + j - panel.column_begin) * bytes;
        uint32_t bits = 0;
        std::memcpy(&bits, at, bytes);
        const double got = (format_ == Format::kBFloat16  ? emulation::bfloat16_to_float(bits)
                            : format_ == Format::kFloat16 ? emulation::half_to_float(bits)
                                                          : float_from_bits(bits)) /
                           multiplier;
        const double difference = std::fabs(got - want[int64_t{i} * case_.m + j]) / largest;
        error = std::isnan(difference) ? INFINITY : std::max(error, difference);
      }
    }
    return error;
  }

  // Of W @ B, or of W.T @ A, where each weight may be wrong by `tolerance` times itself, and all of a row by 1e-6 of
  // the largest: relative to that.
  template <class Precision, class Launch>
  double product_error(GradientArguments arguments, const std::vector<double>& want, double tolerance, Launch launch) {
    const Rows& others = arguments.exchanged ? a_ : b_;
    const int count = arguments.exchanged ? case_.m : case_.n;
    std::vector<float> out = poisoned<float>(int64_t{count} * case_.depth);
    arguments.out = out.data();
    launch_gradient<Precision>(arguments, launch);
    double largest = 0, error = 0;
    for (double w : want) largest = std::max(largest, std::fabs(w));
    for (int own = 0; own < count; ++own) {
      for (int d = 0; d < case_.depth; ++d) {
        double sum = 0, allowed = 0;
        for (int other = 0; other < others.vectors.count; ++other) {
          const double w = want[arguments.exchanged ? int64_t{other} * case_.m + own : int64_t{own} * case_.m + other];
          const double x = others.exact[int64_t{other} * case_.depth + d];
          sum += w * x;
          allowed += (std::fabs(w) * tolerance + largest * 1e-6) * std::fabs(x);
        }
        const double difference = std::fabs(out[int64_t{own} * case_.depth + d] - sum) / allowed;
        error = std::isnan(difference) ? INFINITY : std::max(error, difference);
      }
    }
    return error;
  }

  static double largest_error(const std::vector<float>& got, const std::vector<double>& want, double unit) {
    double error = 0;
    for (size_t k = 0; k < want.size(); ++k) {
      const double difference =
          got[k] == want[k] ? 0.0 : std::fabs(got[k] - want[k]) / std::max(unit, std::fabs(want[k]));
      error = std::isnan(difference) ? INFINITY : std::max(error, difference);
    }
    return error;
  }

  const Case& case_;
  const Format format_;
  const emulation::Order order_;
  const int most_blocks_;  // of a persistent kernel
  std::mt19937 generator_;
  std::vector<int32_t> target_;
  std::vector<uint64_t> row_labels_, row_ids_, column_labels_, column_ids_;
  std::vector<float> row_threshold_, column_threshold_;
  Rows a_;
  Rows b_;
  std::vector<double> s_;
  float shift_ = 0;
  float flag_below_ = 0;
  int flagged_ = 0;
};

}  // namespace

int main(int count, char** names) {
  bool right = true;
  uint32_t seed = 1;
  for (const Case& c : kCases) {
    const bool wanted =
        count == 1 || std::any_of(names + 1, names + count, [&](const char* n) { return c.name == std::string(n); });
    for (int f = 0; wanted && f < 6; ++f) {
      const bool hopper = f >= 4;
      const Format format = static_cast<Format>(f % 4);
      // Each case meets each order of turns and of copies in some precision.
      const emulation::Order order{(f + seed) % 2 == 1, (f + seed) / 2 % 2 == 1};
      Check check(c, format, order, 1 + seed % 3, seed * 10 + f);
      if (hopper) {
        right &= format == Format::kBFloat16 ? check.run<BFloat16, true>() : check.run<Float16, true>();
      } else {
        right &= format == Format::kBFloat16  ? check.run<BFloat16, false>()
                 : format == Format::kFloat16 ? check.run<Float16, false>()
                 : format == Format::kTf32    ? check.run<Tf32, false>()
                                              : check.run<Tf32x3, false>();
      }
    }
    ++seed;
  }
  return right ? 0 : 1;
}
