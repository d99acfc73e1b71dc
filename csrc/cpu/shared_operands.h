// Copies of a sweep's operands in the layouts of the micro-kernel, made once for all of its tasks.
#pragma once

#include <memory>
#include <new>

#include "level.h"

namespace fastcl::cpu {

// Of a matrix that few rows meet, or whose copy would be too large, each task packs what it works on.
class SharedOperands {
 public:
  // Tells the sweep of its columns' panels, and of the slices of rows and columns where these are wanted: of those of
  // columns for W @ Y, of those of rows for W.T @ X. A symmetric sweep's are the same.
  SharedOperands(const Workers& workers, Sweep& sweep, bool row_slices, bool column_slices);

 private:
  struct Release {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  using Buffer = std::unique_ptr<float, Release>;

  static Buffer allocate(int64_t floats);

  Buffer panels_;
  Buffer row_slices_;
  Buffer column_slices_;
};

}  // namespace fastcl::cpu
