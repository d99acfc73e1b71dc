// What tasks on several threads add up to one product of the gradient.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "level.h"

namespace fastcl::cpu {

// Bound on the copies of a product that let a short axis occupy many threads.
constexpr int64_t kLaneBytes = int64_t{16} << 20;

// A product of `size` numbers and the copies that lanes 1, 2, ... accumulate into.
class Product {
 public:
  Product(float* out, int64_t size, int64_t lanes, const Workers& workers)
      : out_(out), size_(size), workers_(workers), lanes_(out == nullptr ? 0 : (lanes - 1) * size) {
    if (out == nullptr) return;
    for_each_chunk([&](int64_t begin, int64_t end) { std::memset(out_ + begin, 0, sizeof(float) * (end - begin)); });
  }

  LaneProduct lanes() { return {out_, lanes_.data(), size_}; }

  void merge() {
    if (lanes_.empty()) return;
    for_each_chunk([&](int64_t begin, int64_t end) {
      for (const float* lane = lanes_.data(); lane != lanes_.data() + lanes_.size(); lane += size_) {
        for (int64_t i = begin; i < end; ++i) out_[i] += lane[i];
      }
    });
  }

 private:
  void for_each_chunk(const std::function<void(int64_t, int64_t)>& body) {
    constexpr int64_t chunk = int64_t{1} << 18;
    workers_.parallel_for((size_ + chunk - 1) / chunk,
                          [&](int64_t c) { body(c * chunk, std::min(size_, (c + 1) * chunk)); });
  }

  float* out_;
  int64_t size_;
  const Workers& workers_;
  std::vector<float> lanes_;
};

}  // namespace fastcl::cpu
