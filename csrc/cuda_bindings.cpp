// The CUDA engine's only file that knows Torch: the operators of fastcl_cuda, through PyTorch's stable ABI, and the
// module fastcl._cuda whose import registers them.
//
// The operators run on the current device, in the stream that is handed in as an address: torch's own functions for
// both are not in every build of torch that this links with.
//
// The tests build this file with an emulated engine, whose device is the CPU, by defining FASTCL_CUDA_EMULATED.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/engine.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace cuda = fastcl::cuda;

#if defined(FASTCL_CUDA_EMULATED)
#define FASTCL_DISPATCH_KEY CPU
constexpr char kDevice[] = "cpu";
#else
#define FASTCL_DISPATCH_KEY CUDA
constexpr char kDevice[] = "cuda";
#endif

void check(int error) { STD_TORCH_CHECK(error == 0, "a kernel of fastcl could not be launched: CUDA error ", error); }

// Whether the kernels for compute capability 9.0 were compiled.
#if defined(FASTCL_HOPPER) || defined(FASTCL_CUDA_EMULATED)
constexpr bool kHasHopper = true;
#else
constexpr bool kHasHopper = false;
#endif

int element_bytes(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Float ? 4 : 2; }

cuda::Dtype dtype(const Tensor& tensor, bool high_precision) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return cuda::Dtype::kBFloat16;
    case ScalarType::Half:
      return cuda::Dtype::kFloat16;
    case ScalarType::Float:
      return high_precision ? cuda::Dtype::kTf32x3 : cuda::Dtype::kTf32;
    default:
      STD_TORCH_CHECK(false, "a must be float32, bfloat16 or float16");
  }
}

cuda::Path path(cuda::Dtype dtype, bool hopper) {
  STD_TORCH_CHECK(!hopper || (kHasHopper && (dtype == cuda::Dtype::kBFloat16 || dtype == cuda::Dtype::kFloat16)),
                  "the Hopper kernels take bfloat16 and float16, where they were compiled");
  return hopper ? cuda::Path::kHopper : cuda::Path::kPortable;
}

cuda::Vectors vectors(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) > 0 && tensor.size(1) > 0, name, " must be a matrix");
  const int64_t pitch = tensor.stride(0) * element_bytes(tensor);
  const auto* data = static_cast<const unsigned char*>(tensor.const_data_ptr());
  STD_TORCH_CHECK(tensor.stride(1) == 1 && pitch % cuda::kChunkBytes == 0 &&
                      reinterpret_cast<uintptr_t>(data) % cuda::kChunkBytes == 0,
                  name, " must have rows of its elements side by side, each aligned to 16 bytes");
  STD_TORCH_CHECK(tensor.size(0) <= cuda::kMostRows, name, " has too many rows");
  return {data, pitch, static_cast<int>(tensor.size(0))};
}

const float* numbers(const Tensor& tensor, int64_t size, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == size, name,
                  " must be contiguous float32 numbers, ", size, " of them");
  return tensor.const_data_ptr<float>();
}

const uint64_t* integers(const std::optional<Tensor>& tensor, int64_t size, const char* name) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Long && tensor->is_contiguous() && tensor->numel() == size, name,
                  " must be contiguous int64 numbers, ", size, " of them");
  return reinterpret_cast<const uint64_t*>(tensor->const_data_ptr<int64_t>());
}

// Labels, ids and thresholds of the rows of an operand.
cuda::Tags tags(const std::optional<Tensor>& labels, const std::optional<Tensor>& ids,
                const std::optional<Tensor>& threshold, int64_t size) {
  return {integers(labels, size, "labels"), integers(ids, size, "ids"),
          threshold.has_value() ? numbers(*threshold, size, "threshold") : nullptr};
}

cuda::Similarity similarity(const Tensor& a, const std::optional<Tensor>& b, const Tensor& scale, const Tensor& shift,
                            const std::optional<Tensor>& target, const cuda::Tags& row_tags,
                            const cuda::Tags& column_tags, int64_t label_width, int64_t self_offset) {
  const Tensor& keys = b.has_value() ? *b : a;
  STD_TORCH_CHECK(a.scalar_type() == keys.scalar_type(), "a and b must have one dtype");
  STD_TORCH_CHECK(a.size(1) == keys.size(1), "a and b must have rows of one length");
  cuda::Similarity s{};
  s.operands = {vectors(a, "a"), vectors(keys, "b"), static_cast<int>(a.size(1) * element_bytes(a))};
  s.shape = {s.operands.a.count, s.operands.b.count, static_cast<int>(self_offset)};
  s.scale = numbers(scale, 1, "scale");
  s.shift = numbers(shift, 1, "shift");
  s.row_tags = row_tags;
  s.column_tags = column_tags;
  s.label_width = static_cast<uint64_t>(label_width);
  if (target.has_value()) {
    STD_TORCH_CHECK(
        target->scalar_type() == ScalarType::Int && target->is_contiguous() && target->numel() == s.shape.rows,
        "target must be contiguous int32, one for each row of a");
    s.target = target->const_data_ptr<int32_t>();
  }
  return s;
}

// `terms` is int64 [T, 7]: reduce, axis (0 row, 1 column), and the tests of the mask; see
// fastcl/backends/cuda/__init__.py.
cuda::Plan make_plan(const Tensor& terms, bool symmetric, const cuda::Similarity& s) {
  constexpr int64_t kCodes = 7;
  STD_TORCH_CHECK(terms.dim() == 2 && terms.size(1) == kCodes && terms.is_contiguous() && terms.is_cpu(),
                  "terms must be [T, ", kCodes, "], on the CPU");
  cuda::Terms rows{}, columns{};
  const int64_t* codes = terms.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < terms.size(0); ++t, codes += kCodes) {
    cuda::Terms& axis = codes[1] == 0 ? rows : columns;
    STD_TORCH_CHECK(axis.count < cuda::kMostTerms, "at most ", cuda::kMostTerms, " terms along an axis");
    const fastcl::PairTerm term{static_cast<fastcl::Reduce>(codes[0]), static_cast<fastcl::Test>(codes[2]),
                                static_cast<fastcl::Test>(codes[3]),   static_cast<fastcl::Test>(codes[4]),
                                static_cast<fastcl::Test>(codes[5]),   static_cast<fastcl::Test>(codes[6])};
    axis.at[axis.count++] = term;
    const auto has = [](fastcl::Test test, const void* x) { return test == fastcl::Test::kAbsent || x != nullptr; };
    const cuda::Tags& own = codes[1] == 0 ? s.row_tags : s.column_tags;
    STD_TORCH_CHECK(has(term.target, s.target), "the plan needs a target");
    STD_TORCH_CHECK(has(term.label, s.row_tags.labels) && has(term.label, s.column_tags.labels) &&
                        has(term.id, s.row_tags.ids) && has(term.id, s.column_tags.ids) &&
                        has(term.above, own.threshold) && (!symmetric || has(term.above, s.column_tags.threshold)),
                    "the plan needs the tags that its masks test");
  }
  STD_TORCH_CHECK(!symmetric || columns.count == 0, "a symmetric plan has row terms only");
  return cuda::make_plan(rows, columns, symmetric);
}

Tensor new_float(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, {&size, 1}, ScalarType::Float);
}

Tensor new_float(const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns};
  return torch::stable::new_empty(like, {sizes, 2}, ScalarType::Float);
}

std::tuple<Tensor, Tensor> statistics(Tensor a, std::optional<Tensor> b, Tensor scale, Tensor shift,
                                      std::optional<Tensor> target, std::optional<Tensor> row_labels,
                                      std::optional<Tensor> row_ids, std::optional<Tensor> row_threshold,
                                      std::optional<Tensor> column_labels, std::optional<Tensor> column_ids,
                                      std::optional<Tensor> column_threshold, int64_t label_width, int64_t self_offset,
                                      double flag_below, Tensor terms, bool symmetric, bool high_precision, bool hopper,
                                      int64_t stream) {
  cuda::StatisticsCall call{};
  const int64_t keys = b.has_value() ? b->size(0) : a.size(0);
  call.s = similarity(a, b, scale, shift, target, tags(row_labels, row_ids, row_threshold, a.size(0)),
                      tags(column_labels, column_ids, column_threshold, keys), label_width, self_offset);
  call.plan = make_plan(terms, symmetric, call.s);
  call.flag_below = static_cast<float>(flag_below);
  const int64_t n = call.s.shape.rows;
  const int64_t m = call.s.shape.columns;
  const cuda::Workspace sizes = cuda::workspace(call.plan, n, m, cuda::kMostSuperTiles);
  Tensor row_partials = new_float(a, sizes.row_partials);
  Tensor column_partials = new_float(a, sizes.column_partials);
  Tensor rows = new_float(a, call.plan.rows.count, n);
  Tensor columns = new_float(a, symmetric ? 0 : call.plan.columns.count, m);
  call.row_partials = row_partials.mutable_data_ptr<float>();
  call.column_partials = column_partials.mutable_data_ptr<float>();
  call.rows = rows.mutable_data_ptr<float>();
  call.columns = columns.mutable_data_ptr<float>();
  const cuda::Dtype type = dtype(a, high_precision);
  check(cuda::statistics(type, path(type, hopper), call, reinterpret_cast<void*>(stream)));
  return {rows, columns};
}

// What W is made from beside S.
template <class Arguments>
void set_statistics(Arguments& call, const Tensor& rows, const Tensor& columns, const Tensor& grad_rows,
                    const Tensor& grad_columns, const std::optional<Tensor>& multiplier) {
  const int64_t of_rows = int64_t{call.plan.rows.count} * call.s.shape.rows;
  const int64_t of_columns = call.plan.symmetric ? 0 : int64_t{call.plan.columns.count} * call.s.shape.columns;
  call.rows = {numbers(rows, of_rows, "rows"), numbers(grad_rows, of_rows, "grad_rows")};
  call.columns = {numbers(columns, of_columns, "columns"), numbers(grad_columns, of_columns, "grad_columns")};
  if (call.plan.symmetric) call.columns = call.rows;
  if (multiplier.has_value()) call.multiplier = numbers(*multiplier, 1, "multiplier");
}

cuda::Panel panel(int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end, int64_t n, int64_t m) {
  STD_TORCH_CHECK(0 <= row_begin && row_begin < row_end && row_end <= n && 0 <= column_begin &&
                      column_begin < column_end && column_end <= m,
                  "the panel lies outside of S");
  return {static_cast<int>(row_begin), static_cast<int>(row_end), static_cast<int>(column_begin),
          static_cast<int>(column_end), false};
}

// Of the memory that a panel of W goes to.
int64_t panel_pitch(const Tensor& out, const Tensor& a, const cuda::Panel& panel) {
  STD_TORCH_CHECK(out.scalar_type() == a.scalar_type() && out.size(0) >= cuda::tiles_down(panel) * cuda::kTile &&
                      out.size(1) >= cuda::tiles_across(panel) * cuda::kTile,
                  "out must have a's dtype and room for whole tiles");
  return vectors(out, "out").pitch;
}

// W[row_begin:row_end, column_begin:column_end] into `out`, whose size is a whole number of tiles.
void weights(Tensor a, std::optional<Tensor> b, Tensor scale, Tensor shift, std::optional<Tensor> target,
             std::optional<Tensor> row_labels, std::optional<Tensor> row_ids, std::optional<Tensor> row_threshold,
             std::optional<Tensor> column_labels, std::optional<Tensor> column_ids,
             std::optional<Tensor> column_threshold, int64_t label_width, int64_t self_offset, double flag_below,
             Tensor terms, bool symmetric, bool high_precision, bool hopper, Tensor rows, Tensor columns,
             Tensor grad_rows, Tensor grad_columns, std::optional<Tensor> multiplier, int64_t row_begin,
             int64_t row_end, int64_t column_begin, int64_t column_end, bool mirror, Tensor out, int64_t stream) {
  cuda::WeightsArguments call{};
  const int64_t keys = b.has_value() ? b->size(0) : a.size(0);
  call.s = similarity(a, b, scale, shift, target, tags(row_labels, row_ids, row_threshold, a.size(0)),
                      tags(column_labels, column_ids, column_threshold, keys), label_width, self_offset);
  call.plan = make_plan(terms, symmetric, call.s);
  call.flag_below = static_cast<float>(flag_below);
  const int64_t n = call.s.shape.rows;
  const int64_t m = call.s.shape.columns;
  set_statistics(call, rows, columns, grad_rows, grad_columns, multiplier);
  call.panel = panel(row_begin, row_end, column_begin, column_end, n, m);
  STD_TORCH_CHECK(!mirror || (symmetric && row_begin == column_begin && row_end == column_end),
                  "a mirrored panel lies on the diagonal of a symmetric plan");
  call.panel.mirror = mirror;
  call.out_pitch = panel_pitch(out, a, call.panel);
  call.out = static_cast<unsigned char*>(out.mutable_data_ptr());
  const cuda::Dtype type = dtype(a, high_precision);
  check(cuda::weights(type, path(type, hopper), call, reinterpret_cast<void*>(stream)));
}

// W @ B, or W.T @ A where `transposed`, of a plan whose masks test no tags; W is rounded to a's dtype.
Tensor gradient(Tensor a, std::optional<Tensor> b, Tensor scale, Tensor shift, std::optional<Tensor> target,
                int64_t self_offset, double flag_below, Tensor terms, bool symmetric, Tensor rows, Tensor columns,
                Tensor grad_rows, Tensor grad_columns, std::optional<Tensor> multiplier, bool transposed,
                int64_t stream) {
  cuda::GradientArguments call{};
  call.s = similarity(a, b, scale, shift, target, {}, {}, 0, self_offset);
  call.plan = make_plan(terms, symmetric, call.s);
  call.flag_below = static_cast<float>(flag_below);
  const cuda::Dtype type = dtype(a, true);
  STD_TORCH_CHECK(type != cuda::Dtype::kTf32x3 && a.size(1) <= cuda::kMostOwnDepth,
                  "sums in registers take bfloat16 and float16, rows of at most ", cuda::kMostOwnDepth, " numbers");
  STD_TORCH_CHECK(!(symmetric && transposed), "a symmetric plan has one product");
  set_statistics(call, rows, columns, grad_rows, grad_columns, multiplier);
  if (transposed) call = cuda::exchanged(call);
  Tensor out = new_float(a, call.s.operands.a.count, a.size(1));
  call.out = out.mutable_data_ptr<float>();
  check(cuda::gradient(type, call, reinterpret_cast<void*>(stream)));
  return out;
}

// Numbers of rows or columns, [k, count].
cuda::Numbers numbers_of(const std::optional<Tensor>& tensor, int64_t count, const char* name) {
  if (!tensor.has_value()) return {nullptr, 0, static_cast<int>(count)};
  STD_TORCH_CHECK(tensor->dim() == 2, name, " must be a matrix");
  return {numbers(*tensor, tensor->size(0) * count, name), static_cast<int>(tensor->size(0)), static_cast<int>(count)};
}

float* results(std::optional<Tensor>& tensor, int64_t size, const char* name) {
  if (!tensor.has_value()) return nullptr;
  numbers(*tensor, size, name);
  return tensor->mutable_data_ptr<float>();
}

// A function of pairs over the panel of S; the codes of functions are in fastcl/backends/cuda/panel_functions.py.
void pairs(int64_t function, double first_constant, double second_constant, Tensor a, Tensor b, Tensor scale,
           Tensor bias, std::optional<Tensor> row0, std::optional<Tensor> row_params,
           std::optional<Tensor> column_params, std::optional<Tensor> incoming, std::optional<Tensor> found,
           std::optional<Tensor> row_labels, std::optional<Tensor> row_ids, std::optional<Tensor> column_labels,
           std::optional<Tensor> column_ids, std::optional<Tensor> guide, std::optional<Tensor> multiplier,
           bool high_precision, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end,
           std::optional<Tensor> sums, std::optional<Tensor> row_weights, std::optional<Tensor> column_weights,
           std::optional<Tensor> column_gradients, std::optional<Tensor> out, int64_t stream) {
  STD_TORCH_CHECK(0 <= function && function < cuda::kPairFunctions, "there is no such function of pairs");
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "a and b must have one dtype");
  STD_TORCH_CHECK(a.size(1) == b.size(1), "a and b must have rows of one length");
  cuda::PairsArguments call{};
  call.function = static_cast<cuda::PairFunction>(function);
  call.constants[0] = static_cast<float>(first_constant);
  call.constants[1] = static_cast<float>(second_constant);
  call.operands = {vectors(a, "a"), vectors(b, "b"), static_cast<int>(a.size(1) * element_bytes(a))};
  const int64_t n = call.operands.a.count;
  const int64_t m = call.operands.b.count;
  call.scale = numbers(scale, 1, "scale");
  call.bias = numbers(bias, 1, "bias");
  call.row0 = reinterpret_cast<const int64_t*>(integers(row0, 1, "row0"));
  call.row_params = numbers_of(row_params, n, "row_params");
  call.column_params = numbers_of(column_params, m, "column_params");
  call.incoming = numbers_of(incoming, n, "incoming");
  call.found = numbers_of(found, n, "found");
  STD_TORCH_CHECK(row_labels.has_value() == column_labels.has_value() && row_ids.has_value() == column_ids.has_value(),
                  "rows and columns must have the same tags");
  call.row_tags = tags(row_labels, row_ids, std::nullopt, n);
  call.column_tags = tags(column_labels, column_ids, std::nullopt, m);
  if (multiplier.has_value()) call.multiplier = numbers(*multiplier, 1, "multiplier");
  call.panel = panel(row_begin, row_end, column_begin, column_end, n, m);
  const int64_t rows = row_end - row_begin;
  const int64_t columns = column_end - column_begin;
  if (guide.has_value()) call.guide = numbers(*guide, rows * columns, "guide");
  const int64_t slots = cuda::tiles_across(call.panel);
  if (sums.has_value()) {
    call.number_of_sums = static_cast<int>(sums->size(0));
    call.sums = results(sums, call.number_of_sums * slots * rows, "sums");
  }
  call.row_weights = results(row_weights, slots * rows, "row_weights");
  call.column_weights = results(column_weights, cuda::tiles_down(call.panel) * columns, "column_weights");
  call.column_gradients = results(column_gradients, cuda::tiles_down(call.panel) * columns, "column_gradients");
  if (out.has_value()) {
    call.out_pitch = panel_pitch(*out, a, call.panel);
    call.out = static_cast<unsigned char*>(out->mutable_data_ptr());
  }
  check(cuda::pairs(dtype(a, high_precision), call, reinterpret_cast<void*>(stream)));
}

}  // namespace

STABLE_TORCH_LIBRARY(fastcl_cuda, m) {
  m.def(
      "statistics(Tensor a, Tensor? b, Tensor scale, Tensor shift, Tensor? target, "
      "Tensor? row_labels, Tensor? row_ids, Tensor? row_threshold, Tensor? column_labels, Tensor? column_ids, "
      "Tensor? column_threshold, int label_width, int self_offset, float flag_below, Tensor terms, bool symmetric, "
      "bool high_precision, bool hopper, int stream) -> (Tensor, Tensor)");
  m.def(
      "weights(Tensor a, Tensor? b, Tensor scale, Tensor shift, Tensor? target, "
      "Tensor? row_labels, Tensor? row_ids, Tensor? row_threshold, Tensor? column_labels, Tensor? column_ids, "
      "Tensor? column_threshold, int label_width, int self_offset, float flag_below, Tensor terms, bool symmetric, "
      "bool high_precision, bool hopper, Tensor rows, Tensor columns, Tensor grad_rows, Tensor grad_columns, "
      "Tensor? multiplier, int row_begin, int row_end, int column_begin, int column_end, bool mirror, "
      "Tensor(a!) out, int stream) -> ()");
  m.def(
      "gradient(Tensor a, Tensor? b, Tensor scale, Tensor shift, Tensor? target, int self_offset, float flag_below, "
      "Tensor terms, bool symmetric, Tensor rows, Tensor columns, Tensor grad_rows, Tensor grad_columns, "
      "Tensor? multiplier, bool transposed, int stream) -> Tensor");
  m.def(
      "pairs(int function, float first_constant, float second_constant, Tensor a, Tensor b, Tensor scale, "
      "Tensor bias, Tensor? row0, Tensor? row_params, Tensor? column_params, Tensor? incoming, Tensor? found, "
      "Tensor? row_labels, Tensor? row_ids, Tensor? column_labels, Tensor? column_ids, Tensor? guide, "
      "Tensor? multiplier, bool high_precision, int row_begin, int row_end, int column_begin, int column_end, "
      "Tensor(a!)? sums, Tensor(b!)? row_weights, Tensor(c!)? column_weights, Tensor(d!)? column_gradients, "
      "Tensor(e!)? out, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastcl_cuda, FASTCL_DISPATCH_KEY, m) {
  m.impl("statistics", TORCH_BOX(&statistics));
  m.impl("weights", TORCH_BOX(&weights));
  m.impl("gradient", TORCH_BOX(&gradient));
  m.impl("pairs", TORCH_BOX(&pairs));
}

namespace {

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_cuda", "fastcl's CUDA engine.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

// What a caller has to know: the type of the operators' device, whether the Hopper kernels are there, and limits.
PyMODINIT_FUNC PyInit__cuda(void) {
  PyObject* const self = PyModule_Create(&module);
  if (self == nullptr || PyModule_AddStringConstant(self, "DEVICE", kDevice) != 0 ||
      PyModule_AddIntConstant(self, "TILE", cuda::kTile) != 0 ||
      PyModule_AddIntConstant(self, "HAS_HOPPER", kHasHopper) != 0 ||
      PyModule_AddIntConstant(self, "ALIGNMENT", cuda::kChunkBytes) != 0 ||
      PyModule_AddIntConstant(self, "MOST_TERMS", cuda::kMostTerms) != 0 ||
      PyModule_AddIntConstant(self, "MOST_OWN_DEPTH", cuda::kMostOwnDepth) != 0 ||
      PyModule_AddIntConstant(self, "MOST_ROWS", cuda::kMostRows) != 0) {
    return nullptr;
  }
  return self;
}
