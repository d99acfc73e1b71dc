// The CUDA kernel of pairs on a CPU (cuda_emulation.h): in whatever order warps take turns and copies arrive, each
// function of pairs writes the same bits, and all that it has to, in elements of 2 and of 4 bytes. That they are right,
// tests/test_cuda_backend.py says.
//
// Prints how many results are wrong and exits with 1 where there are any.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/cuda/launch.h"

namespace {

using namespace fastcl::cuda;

constexpr emulation::Order kOrders[] = {{false, true}, {true, true}, {false, false}, {true, false}};
constexpr int kRows = 150, kColumns = 140, kDepth = 40, kMostNumbers = 4;
constexpr Panel kPanel{0, kRows, 0, 131, false};  // the last columns are another panel's
constexpr int kDown = 2, kAcross = 2, kWidth = 131;

struct Inputs {
  std::vector<unsigned char> a, b;
  std::vector<float> of_rows, of_columns, guide;
  std::vector<uint64_t> row_labels, column_labels, row_ids, column_ids;
  int64_t row0 = 7;
  float scale = 1.0f, bias = -0.5f;
};

template <class Precision>
Inputs draw() {
  std::mt19937 random(7);
  std::uniform_real_distribution<float> uniform(-0.3f, 0.3f);
  Inputs x;
  for (auto [bytes, count] : {std::pair{&x.a, kRows}, std::pair{&x.b, kColumns}}) {
    bytes->resize(count * kDepth * Precision::kBytes);
    for (int k = 0; k < count * kDepth; ++k) Precision::store(bytes->data() + k * Precision::kBytes, uniform(random));
  }
  const auto numbers = [&](std::vector<float>& to, int count) {
    to.resize(count);
    for (float& number : to) number = uniform(random) + 1.0f;
  };
  numbers(x.of_rows, kMostNumbers * kRows);
  numbers(x.of_columns, kMostParams * kColumns);
  numbers(x.guide, kRows * kWidth);
  const auto tags = [&](std::vector<uint64_t>& to, int count, int step) {
    for (int k = 0; k < count; ++k) to.push_back(static_cast<uint64_t>(k * step % 7) << 40);
  };
  tags(x.row_labels, kRows, 3);
  tags(x.column_labels, kColumns, 5);
  tags(x.row_ids, kRows, 2);
  tags(x.column_ids, kColumns, 1);
  return x;
}

// All that the kernel writes, one after the other.
template <class Precision>
std::vector<unsigned char> run(const Inputs& x, PairFunction function, emulation::Order order) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> sums(kMostNumbers * kAcross * kRows, kNaN), row_weights(kAcross * kRows, kNaN);
  std::vector<float> column_weights(kDown * kWidth, kNaN), column_gradients(kDown * kWidth, kNaN);
  constexpr int kPitch = kAcross * kTile * Precision::kBytes;
  std::vector<unsigned char> out(kDown * kTile * kPitch, 0xff);
  const int pitch = kDepth * Precision::kBytes;
  PairsArguments call{};
  call.function = function;
  call.constants[0] = 0.4f;
  call.constants[1] = 1.5f;
  call.operands = {{x.a.data(), pitch, kRows}, {x.b.data(), pitch, kColumns}, pitch};
  call.scale = &x.scale;
  call.bias = &x.bias;
  call.row0 = &x.row0;
  call.row_params = {x.of_rows.data(), kMostParams, kRows};
  call.column_params = {x.of_columns.data(), kMostParams, kColumns};
  call.incoming = {x.of_rows.data(), kMostNumbers, kRows};
  call.found = {x.of_rows.data(), 2, kRows};
  call.row_tags = {x.row_labels.data(), x.row_ids.data(), nullptr};
  call.column_tags = {x.column_labels.data(), x.column_ids.data(), nullptr};
  call.guide = x.guide.data();
  call.panel = kPanel;
  call.sums = sums.data();
  call.number_of_sums = kMostNumbers;
  call.row_weights = row_weights.data();
  call.column_weights = column_weights.data();
  call.column_gradients = column_gradients.data();
  call.out = out.data();
  call.out_pitch = kPitch;
  launch_pairs<Precision>(call, [&](auto kernel, int blocks, int threads, size_t shared_bytes, const auto& arguments) {
    emulation::launch(order, kernel, blocks, threads, shared_bytes, arguments);
  });
  std::vector<unsigned char> all = out;
  for (const auto* part : {&row_weights, &column_weights, &column_gradients, &sums}) {
    const auto* const bytes = reinterpret_cast<const unsigned char*>(part->data());
    all.insert(all.end(), bytes, bytes + part->size() * sizeof(float));
  }
  return all;
}

// Whether anything but `sums`, of which functions have different numbers, is as it was before.
template <class Precision>
bool has_gaps(const std::vector<unsigned char>& all) {
  const size_t of_w = size_t{kDown * kTile} * kAcross * kTile * Precision::kBytes;
  const size_t of_sums = size_t{kMostNumbers * kAcross * kRows} * sizeof(float);
  for (size_t k = 0; k < of_w; k += Precision::kBytes) {
    if (std::memcmp(&all[k], "\xff\xff\xff\xff", Precision::kBytes) == 0) return true;
  }
  for (size_t k = of_w; k < all.size() - of_sums; k += sizeof(float)) {
    float number;
    std::memcpy(&number, &all[k], sizeof number);
    if (std::isnan(number)) return true;
  }
  return false;
}

template <class Precision>
int failures() {
  const Inputs x = draw<Precision>();
  int wrong = 0;
  for (int f = 0; f < kPairFunctions; ++f) {
    const auto function = static_cast<PairFunction>(f);
    const std::vector<unsigned char> first = run<Precision>(x, function, kOrders[0]);
    wrong += has_gaps<Precision>(first);
    for (int o = 1; o < 4; ++o) wrong += run<Precision>(x, function, kOrders[o]) != first;
  }
  return wrong;
}

}  // namespace

int main() {
  const int wrong = failures<BFloat16>() + failures<Tf32x3>();
  std::printf("%d wrong\n", wrong);
  return wrong == 0 ? 0 : 1;
}
