// The only file that knows Torch: the operators of fastcl_cpu, through PyTorch's stable ABI, and the module fastcl._C
// whose import registers them.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/engine.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace cpu = fastcl::cpu;

cpu::Matrix matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.is_cpu(), name, " must be a matrix on the CPU");
  cpu::Dtype dtype = cpu::Dtype::kFloat32;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      break;
    case ScalarType::BFloat16:
      dtype = cpu::Dtype::kBFloat16;
      break;
    case ScalarType::Half:
      dtype = cpu::Dtype::kFloat16;
      break;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
  return {tensor.const_data_ptr(), dtype, tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

using OptionalTensors = std::vector<std::optional<Tensor>>;

template <class Number>
const Number* vector_of(const Tensor& tensor, ScalarType type, int64_t vectors, int64_t size, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous() && tensor.numel() == vectors * size &&
                      tensor.size(tensor.dim() - 1) == size,
                  name, " must be contiguous, with an entry for each row");
  return tensor.const_data_ptr<Number>();
}

// From labels int32 [3, size], ids int32 [size] and thresholds float32 [size], where given; see
// fastcl/backends/cpu/binding.py.
cpu::Tags make_tags(const std::optional<Tensor>* tags, int64_t size) {
  cpu::Tags result{};
  if (tags[0].has_value()) {
    result.label = vector_of<int32_t>(*tags[0], ScalarType::Int, 3, size, "labels");
    result.nearest = result.label + size;
    result.reach = result.nearest + size;
  }
  if (tags[1].has_value()) result.id = vector_of<int32_t>(*tags[1], ScalarType::Int, 1, size, "ids");
  if (tags[2].has_value()) result.threshold = vector_of<float>(*tags[2], ScalarType::Float, 1, size, "threshold");
  return result;
}

// A problem without terms; `tags` are those of the rows and of the columns, or none.
cpu::Problem make_operands(const Tensor& a, const Tensor& b, double scale, const OptionalTensors& tags, int64_t row0,
                           int64_t col0) {
  cpu::Problem problem{};
  problem.a = matrix(a, "a");
  problem.b = matrix(b, "b");
  STD_TORCH_CHECK(problem.a.dtype == problem.b.dtype, "a and b must have one dtype");
  STD_TORCH_CHECK(problem.a.depth == problem.b.depth, "a and b must have rows of one length");
  STD_TORCH_CHECK(problem.a.rows > 0 && problem.b.rows > 0 && problem.a.depth > 0, "a and b must not be empty");
  problem.scale = static_cast<float>(scale);
  problem.row0 = row0;
  problem.col0 = col0;
  STD_TORCH_CHECK(tags.empty() || tags.size() == 6, "tags must be three of the rows and three of the columns");
  if (!tags.empty()) {
    problem.a_tags = make_tags(&tags[0], problem.a.rows);
    problem.b_tags = make_tags(&tags[3], problem.b.rows);
  }
  return problem;
}

// `terms` is int64 [T, 7]: reduce, axis (0 row, 1 column) and the tests of a mask; see
// fastcl/backends/term_codes.py.
cpu::Problem make_problem(const Tensor& a, const std::optional<Tensor>& b, double scale, double shift,
                          double flag_below, double lowest, const std::optional<Tensor>& target,
                          const OptionalTensors& tags, int64_t row0, int64_t col0, const Tensor& terms,
                          bool symmetric) {
  cpu::Problem problem = make_operands(a, b.has_value() ? *b : a, scale, tags, row0, col0);
  STD_TORCH_CHECK(!symmetric || (!b.has_value() && row0 == col0), "a symmetric plan has one operand");
  problem.symmetric = symmetric;
  problem.shift = static_cast<float>(shift);
  problem.flag_below = static_cast<float>(flag_below);
  problem.lowest = static_cast<float>(lowest);
  if (target.has_value()) {
    STD_TORCH_CHECK(target->dim() == 1 && target->size(0) == problem.a.rows && target->is_contiguous() &&
                        target->scalar_type() == ScalarType::Long,
                    "target must be a contiguous int64 vector with an entry for each row of a");
    problem.target = target->const_data_ptr<int64_t>();
  }
  STD_TORCH_CHECK(terms.dim() == 2 && terms.size(1) == 7 && terms.is_contiguous(), "terms must be [T, 7]");
  const int64_t* codes = terms.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < terms.size(0); ++t, codes += 7) {
    const auto test = [&](int at) { return static_cast<fastcl::Test>(codes[at]); };
    const fastcl::PairTerm term{static_cast<fastcl::Reduce>(codes[0]), test(2), test(3), test(4), test(5), test(6)};
    const cpu::Tags& others = symmetric ? problem.a_tags : problem.b_tags;
    const auto check = [](fastcl::Test tested, bool given, const char* name) {
      STD_TORCH_CHECK(tested == fastcl::Test::kAbsent || given, "the plan needs ", name);
    };
    check(term.target, target.has_value(), "a target");
    check(term.label, problem.a_tags.label != nullptr && others.label != nullptr, "labels");
    check(term.id, problem.a_tags.id != nullptr && others.id != nullptr, "ids");
    check(term.above, (codes[1] == 0 ? problem.a_tags : others).threshold != nullptr, "a threshold");
    (codes[1] == 0 ? problem.row_terms : problem.column_terms).push_back(term);
  }
  STD_TORCH_CHECK(!symmetric || problem.column_terms.empty(), "a symmetric plan has row terms only");
  return problem;
}

cpu::Workers workers() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t count, const std::function<void(int64_t)>& body) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(i);
            });
          }};
}

Tensor new_float(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, {&size, 1}, ScalarType::Float);
}

Tensor new_scalar(const Tensor& like, double value) {
  Tensor scalar = torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(), ScalarType::Float);
  *scalar.mutable_data_ptr<float>() = static_cast<float>(value);
  return scalar;
}

Tensor new_float(const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns};
  return torch::stable::new_empty(like, {sizes, 2}, ScalarType::Float);
}

const float* vectors(const Tensor& tensor, size_t terms, int64_t size, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == static_cast<int64_t>(terms) && tensor.size(1) == size &&
                      tensor.is_contiguous(),
                  name, " must be contiguous and have the shape of the plan's statistics");
  return tensor.const_data_ptr<float>();
}

std::tuple<Tensor, Tensor> statistics(Tensor a, std::optional<Tensor> b, double scale, double shift, double flag_below,
                                      double lowest, std::optional<Tensor> target, OptionalTensors tags, int64_t row0,
                                      int64_t col0, Tensor terms, bool symmetric) {
  const cpu::Problem problem =
      make_problem(a, b, scale, shift, flag_below, lowest, target, tags, row0, col0, terms, symmetric);
  Tensor rows = new_float(a, problem.row_terms.size(), problem.a.rows);
  Tensor columns = new_float(a, problem.column_terms.size(), problem.b.rows);
  cpu::statistics(problem, workers(), {rows.mutable_data_ptr<float>(), columns.mutable_data_ptr<float>()});
  return {rows, columns};
}

std::tuple<Tensor, Tensor> gradient(Tensor a, std::optional<Tensor> b, double scale, double shift, double flag_below,
                                    double lowest, std::optional<Tensor> target, OptionalTensors tags, int64_t row0,
                                    int64_t col0, Tensor terms, bool symmetric, Tensor rows, Tensor columns,
                                    Tensor grad_rows, Tensor grad_columns, bool needs_a, bool needs_b) {
  const cpu::Problem problem =
      make_problem(a, b, scale, shift, flag_below, lowest, target, tags, row0, col0, terms, symmetric);
  needs_b = needs_b && !symmetric;
  const size_t row_terms = problem.row_terms.size();
  const size_t column_terms = problem.column_terms.size();
  const int64_t n = problem.a.rows;
  const int64_t m = problem.b.rows;
  Tensor product_a = new_float(a, needs_a ? n : 0, needs_a ? problem.a.depth : 0);
  Tensor product_b = new_float(a, needs_b ? m : 0, needs_b ? problem.a.depth : 0);
  cpu::gradient(problem, workers(), {vectors(rows, row_terms, n, "rows"), vectors(columns, column_terms, m, "columns")},
                {vectors(grad_rows, row_terms, n, "grad_rows"), vectors(grad_columns, column_terms, m, "grad_columns")},
                needs_a ? product_a.mutable_data_ptr<float>() : nullptr,
                needs_b ? product_b.mutable_data_ptr<float>() : nullptr);
  return {product_a, product_b};
}

const float* optional_vector(const std::optional<Tensor>& tensor, int64_t size, const char* name) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == size && tensor->is_contiguous() &&
                      tensor->scalar_type() == ScalarType::Float,
                  name, " must be a contiguous float32 vector with an entry for each row of a");
  return tensor->const_data_ptr<float>();
}

// A matrix to be normalised: the copy of unit length takes its place in the problem.
struct Normalized {
  cpu::Matrix original;
  Tensor unit;
  Tensor inverse;

  Normalized(const Tensor& tensor, const cpu::Workers& workers, cpu::Matrix& in_problem)
      : original(in_problem),
        unit(new_rows(tensor, cpu::unit_pitch(in_problem))),
        inverse(new_float(tensor, tensor.size(0))) {
    const int64_t pitch = unit.size(1);
    cpu::normalize(original, workers, unit.mutable_data_ptr(), pitch, inverse.mutable_data_ptr<float>());
    in_problem = {unit.const_data_ptr(), original.dtype, original.rows, original.depth, pitch, 1};
  }

  static Tensor new_rows(const Tensor& like, int64_t pitch) {
    const int64_t sizes[] = {like.size(0), pitch};
    return torch::stable::new_empty(like, {sizes, 2});
  }
};

// The loss, its statistics, and the gradients with respect to a, b, the scale and the positive, empty where not wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy(
    Tensor a, std::optional<Tensor> b, double scale, double shift, double flag_below, double lowest,
    std::optional<Tensor> target, OptionalTensors tags, int64_t row0, int64_t col0, Tensor terms, bool symmetric,
    std::optional<Tensor> positive, std::optional<Tensor> weights, double factor, bool normalize, bool needs_a,
    bool needs_b, bool needs_scale, bool needs_positive) {
  cpu::Problem problem =
      make_problem(a, b, scale, shift, flag_below, lowest, target, tags, row0, col0, terms, symmetric);
  const cpu::Workers threads = workers();
  const int64_t n = problem.a.rows;
  const int64_t m = problem.b.rows;
  const int64_t depth = problem.a.depth;
  const cpu::Matrix raw_a = problem.a;
  const cpu::Matrix raw_b = problem.b;
  std::optional<Normalized> unit_a, unit_b;
  if (normalize) {
    unit_a.emplace(a, threads, problem.a);
    if (b.has_value()) {
      unit_b.emplace(*b, threads, problem.b);
    } else {
      problem.b = problem.a;
    }
  }
  STD_TORCH_CHECK(problem.column_terms.empty() || n == m, "a loss over rows and columns needs as many of both");
  const auto is_sum = [](const fastcl::PairTerm& term) { return term.reduce == fastcl::Reduce::kSum; };
  STD_TORCH_CHECK(positive.has_value() || std::any_of(problem.row_terms.begin(), problem.row_terms.end(), is_sum),
                  "a softmax loss needs a positive: a sum along rows, or a vector");
  const cpu::CrossEntropy head{optional_vector(positive, n, "positive"), optional_vector(weights, n, "weights")};
  const bool wants_a = needs_a || (needs_scale && !needs_b);
  Tensor rows = new_float(a, problem.row_terms.size(), n);
  Tensor columns = new_float(a, problem.column_terms.size(), m);
  Tensor grad_a = new_float(a, wants_a ? n : 0, wants_a ? depth : 0);
  Tensor grad_b = new_float(a, needs_b ? m : 0, needs_b ? depth : 0);
  Tensor grad_positive = new_float(a, needs_positive ? n : 0);
  float* positive_out = needs_positive ? grad_positive.mutable_data_ptr<float>() : nullptr;
  float* a_out = wants_a ? grad_a.mutable_data_ptr<float>() : nullptr;
  float* b_out = needs_b ? grad_b.mutable_data_ptr<float>() : nullptr;
  const double loss =
      cpu::cross_entropy(problem, threads, head, {rows.mutable_data_ptr<float>(), columns.mutable_data_ptr<float>()},
                         a_out, b_out, positive_out);
  const float scale_and_factor = static_cast<float>(scale * factor);
  double inner = 0.0;
  if (needs_b) {
    inner = cpu::finish(raw_b, threads, unit_b ? unit_b->inverse.const_data_ptr<float>() : nullptr, scale_and_factor,
                        b_out);
  }
  if (wants_a) {
    inner = cpu::finish(raw_a, threads, unit_a ? unit_a->inverse.const_data_ptr<float>() : nullptr, scale_and_factor,
                        a_out);
  }
  for (int64_t i = 0; needs_positive && i < n; ++i) positive_out[i] *= static_cast<float>(factor);
  // A symmetric product counts every pair twice.
  const double grad_scale = inner * factor * (symmetric ? 0.5 : 1.0);
  return {new_scalar(a, loss * factor), rows, columns, grad_a, grad_b, new_scalar(a, grad_scale), grad_positive};
}

// Costs of the rows, and the gradients of a, b, the scale, the shifts' sum and the shifts, empty where not wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sigmoid(Tensor a, Tensor b, double scale, Tensor shifts,
                                                                   Tensor factors, std::optional<Tensor> incoming,
                                                                   OptionalTensors tags, int64_t row0, bool needs_a,
                                                                   bool needs_b, bool needs_scale, bool needs_shifts,
                                                                   bool needs_costs) {
  const cpu::Problem problem = make_operands(a, b, scale, tags, row0, 0);
  const cpu::Workers threads = workers();
  const int64_t n = problem.a.rows;
  const int64_t m = problem.b.rows;
  const int64_t depth = problem.a.depth;
  const cpu::Questions questions{vector_of<float>(shifts, ScalarType::Float, 1, m, "shifts"),
                                 vector_of<float>(factors, ScalarType::Float, 1, n, "factors"),
                                 optional_vector(incoming, n, "incoming")};
  STD_TORCH_CHECK(questions.incoming != nullptr || !(needs_a || needs_b || needs_scale || needs_shifts),
                  "gradients need those with respect to the costs");
  const bool wants_a = needs_a || (needs_scale && !needs_b);
  Tensor costs = new_float(a, needs_costs ? n : 0);
  Tensor grad_a = new_float(a, wants_a ? n : 0, wants_a ? depth : 0);
  Tensor grad_b = new_float(a, needs_b ? m : 0, needs_b ? depth : 0);
  Tensor grad_shifts = new_float(a, needs_shifts ? m : 0);
  float* a_out = wants_a ? grad_a.mutable_data_ptr<float>() : nullptr;
  float* b_out = needs_b ? grad_b.mutable_data_ptr<float>() : nullptr;
  const double sum =
      cpu::sigmoid_pairs(problem, threads, questions, needs_costs ? costs.mutable_data_ptr<float>() : nullptr, a_out,
                         b_out, needs_shifts ? grad_shifts.mutable_data_ptr<float>() : nullptr);
  double inner = 0.0;
  const float factor = static_cast<float>(scale);
  if (needs_b) inner = cpu::finish(problem.b, threads, nullptr, factor, b_out);
  if (wants_a) inner = cpu::finish(problem.a, threads, nullptr, factor, a_out);
  return {costs, grad_a, grad_b, new_scalar(a, inner), new_scalar(a, sum), grad_shifts};
}

const float* optional_vectors(const std::optional<Tensor>& tensor, int vectors, int64_t size, const char* name) {
  if (!tensor.has_value()) return nullptr;
  return vector_of<float>(*tensor, ScalarType::Float, vectors, size, name);
}

void check_squares(const float* rows, const float* columns) {
  STD_TORCH_CHECK((rows == nullptr) == (columns == nullptr), "rows and columns need squared norms, both or none");
}

// What a sweep over every pair makes: values of the rows, the products, and `slopes` sums along rows and columns.
struct PairOutputs {
  bool wants_a;
  bool needs_b;
  bool sums;
  Tensor values;
  Tensor a;
  Tensor b;
  Tensor rows;
  Tensor columns;

  PairOutputs(const Tensor& like, const cpu::Problem& problem, int outputs, int slopes, bool needs_a, bool needs_b,
              bool needs_scale)
      : wants_a(needs_a || (needs_scale && !needs_b)),
        needs_b(needs_b),
        sums(slopes > 0),
        values(new_float(like, outputs, problem.a.rows)),
        a(new_float(like, wants_a ? problem.a.rows : 0, wants_a ? problem.a.depth : 0)),
        b(new_float(like, needs_b ? problem.b.rows : 0, needs_b ? problem.a.depth : 0)),
        rows(new_float(like, slopes, problem.a.rows)),
        columns(new_float(like, slopes, problem.b.rows)) {
    STD_TORCH_CHECK(sums || !(needs_a || needs_b || needs_scale), "gradients need those with respect to the outputs");
  }

  cpu::PairResults results() {
    return {values.mutable_data_ptr<float>(), wants_a ? a.mutable_data_ptr<float>() : nullptr,
            needs_b ? b.mutable_data_ptr<float>() : nullptr, sums ? rows.mutable_data_ptr<float>() : nullptr,
            sums ? columns.mutable_data_ptr<float>() : nullptr};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> finish(const cpu::Problem& problem,
                                                                    const cpu::Workers& threads) {
    double inner = 0.0;
    const cpu::PairResults made = results();
    if (needs_b) inner = cpu::finish(problem.b, threads, nullptr, problem.scale, made.b);
    if (wants_a) inner = cpu::finish(problem.a, threads, nullptr, problem.scale, made.a);
    return {values, a, b, new_scalar(values, inner), rows, columns};
  }
};

// What a function of every pair makes of the rows, the gradients of a, b and the scale, and the sums of W and of the
// gradient with respect to the first given parameter along rows and along columns; empty where not wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> pairs(
    Tensor a, Tensor b, double scale, double bias, int64_t function, Tensor numbers, std::optional<Tensor> row_squares,
    std::optional<Tensor> column_squares, std::optional<Tensor> row_given, std::optional<Tensor> column_given,
    OptionalTensors guide, double guide_scale, std::optional<Tensor> incoming, OptionalTensors tags, int64_t row0,
    bool needs_a, bool needs_b, bool needs_scale) {
  const cpu::Problem problem = make_operands(a, b, scale, tags, row0, 0);
  STD_TORCH_CHECK(function >= 0 && function < cpu::kPairFunctions, "there is no such function");
  const cpu::PairShape shape = cpu::shape_of(static_cast<cpu::PairFunction>(function));
  const cpu::Workers threads = workers();
  const int64_t n = problem.a.rows;
  const int64_t m = problem.b.rows;
  const cpu::PairOperands operands{static_cast<cpu::PairFunction>(function),
                                   static_cast<float>(bias),
                                   vector_of<float>(numbers, ScalarType::Float, 1, 2, "numbers"),
                                   optional_vectors(row_squares, 1, n, "row_squares"),
                                   optional_vectors(column_squares, 1, m, "column_squares"),
                                   optional_vectors(row_given, shape.row_given, n, "row_given"),
                                   optional_vectors(column_given, shape.column_given, m, "column_given"),
                                   optional_vectors(incoming, shape.incoming, n, "incoming")};
  STD_TORCH_CHECK((operands.row_given != nullptr) == (shape.row_given > 0) &&
                      (operands.column_given != nullptr) == (shape.column_given > 0),
                  "the function has other parameters");
  check_squares(operands.row_squares, operands.column_squares);
  std::optional<cpu::Problem> second;
  if (!guide.empty()) {
    STD_TORCH_CHECK(guide.size() == 2 && guide[0].has_value() && guide[1].has_value(), "guide must be two matrices");
    second = make_operands(*guide[0], *guide[1], guide_scale, {}, 0, 0);
    STD_TORCH_CHECK(second->a.rows == n && second->b.rows == m, "guide must have as many rows as a and b");
  }
  STD_TORCH_CHECK(second.has_value() == (operands.function == cpu::PairFunction::kSoftTargets),
                  "the function has another number of similarities");
  PairOutputs outputs(a, problem, shape.outputs, operands.incoming == nullptr ? 0 : shape.slopes, needs_a, needs_b,
                      needs_scale);
  cpu::pair_panels(problem, second.has_value() ? &*second : nullptr, threads, operands, outputs.results());
  return outputs.finish(problem, threads);
}

// The same of all triplets, whose values are costs and numbers.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> triplets(
    Tensor a, Tensor b, double scale, double bias, double margin, bool semihard, std::optional<Tensor> row_squares,
    std::optional<Tensor> column_squares, std::optional<Tensor> incoming, OptionalTensors tags, int64_t row0,
    bool needs_a, bool needs_b, bool needs_scale) {
  const cpu::Problem problem = make_operands(a, b, scale, tags, row0, 0);
  const int64_t n = problem.a.rows;
  const int64_t m = problem.b.rows;
  const cpu::Triplets operands{static_cast<float>(bias),
                               static_cast<float>(margin),
                               semihard,
                               optional_vectors(row_squares, 1, n, "row_squares"),
                               optional_vectors(column_squares, 1, m, "column_squares"),
                               optional_vector(incoming, n, "incoming")};
  check_squares(operands.row_squares, operands.column_squares);
  PairOutputs outputs(a, problem, 2, operands.incoming == nullptr ? 0 : 1, needs_a, needs_b, needs_scale);
  const cpu::Workers threads = workers();
  cpu::all_triplets(problem, threads, operands, outputs.results());
  return outputs.finish(problem, threads);
}

}  // namespace

STABLE_TORCH_LIBRARY(fastcl_cpu, m) {
  m.def(
      "statistics(Tensor a, Tensor? b, float scale, float shift, float flag_below, float lowest, Tensor? target, "
      "Tensor?[] tags, int row0, int col0, Tensor terms, bool symmetric) -> (Tensor, Tensor)");
  m.def(
      "gradient(Tensor a, Tensor? b, float scale, float shift, float flag_below, float lowest, Tensor? target, "
      "Tensor?[] tags, int row0, int col0, Tensor terms, bool symmetric, Tensor rows, Tensor columns, "
      "Tensor grad_rows, Tensor grad_columns, bool needs_a, bool needs_b) -> (Tensor, Tensor)");
  m.def(
      "cross_entropy(Tensor a, Tensor? b, float scale, float shift, float flag_below, float lowest, Tensor? target, "
      "Tensor?[] tags, int row0, int col0, Tensor terms, bool symmetric, Tensor? positive, Tensor? weights, "
      "float factor, bool normalize, bool needs_a, bool needs_b, bool needs_scale, bool needs_positive) -> (Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sigmoid(Tensor a, Tensor b, float scale, Tensor shifts, Tensor factors, Tensor? incoming, Tensor?[] tags, "
      "int row0, bool needs_a, bool needs_b, bool needs_scale, bool needs_shifts, bool needs_costs) -> (Tensor, "
      "Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "pairs(Tensor a, Tensor b, float scale, float bias, int function, Tensor numbers, Tensor? row_squares, Tensor? "
      "column_squares, Tensor? row_given, Tensor? column_given, Tensor?[] guide, float guide_scale, Tensor? incoming, "
      "Tensor?[] tags, int row0, bool needs_a, bool needs_b, bool needs_scale) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def(
      "triplets(Tensor a, Tensor b, float scale, float bias, float margin, bool semihard, Tensor? row_squares, Tensor? "
      "column_squares, Tensor? incoming, Tensor?[] tags, int row0, bool needs_a, bool needs_b, bool needs_scale) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastcl_cpu, CPU, m) {
  m.impl("statistics", TORCH_BOX(&statistics));
  m.impl("gradient", TORCH_BOX(&gradient));
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("sigmoid", TORCH_BOX(&sigmoid));
  m.impl("pairs", TORCH_BOX(&pairs));
  m.impl("triplets", TORCH_BOX(&triplets));
}

namespace {

PyObject* level(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(cpu::selected_level().c_str());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

PyObject* levels(PyObject*, PyObject*) {
  const std::vector<std::string> names = cpu::available_levels();
  PyObject* list = PyList_New(static_cast<Py_ssize_t>(names.size()));
  for (size_t i = 0; list != nullptr && i < names.size(); ++i) {
    PyList_SetItem(list, static_cast<Py_ssize_t>(i), PyUnicode_FromString(names[i].c_str()));
  }
  return list;
}

struct ReleasedLock {
  PyThreadState* state = PyEval_SaveThread();
  ~ReleasedLock() { PyEval_RestoreThread(state); }
};

PyObject* peak_flops(PyObject*, PyObject* arguments) {
  const char* name;
  if (!PyArg_ParseTuple(arguments, "s", &name)) return nullptr;
  constexpr std::pair<const char*, cpu::Dtype> dtypes[] = {
      {"float32", cpu::Dtype::kFloat32}, {"bfloat16", cpu::Dtype::kBFloat16}, {"float16", cpu::Dtype::kFloat16}};
  for (const auto& [known, dtype] : dtypes) {
    if (std::string(name) != known) continue;
    try {
      const double flops = [dtype = dtype] {
        const ReleasedLock others_run;
        return cpu::peak_flops(dtype);
      }();
      return PyFloat_FromDouble(flops);
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
      return nullptr;
    }
  }
  return PyErr_Format(PyExc_ValueError, "dtype is %s, expected float32, bfloat16 or float16", name);
}

PyMethodDef methods[] = {
    {"level", level, METH_NOARGS, "The instruction-set level in use."},
    {"levels", levels, METH_NOARGS, "The instruction-set levels this machine supports, best last."},
    {"peak_flops", peak_flops, METH_VARARGS, "FLOP/s of this thread in multiply-adds for operands of a dtype."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "fastcl's C++ CPU engine.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
