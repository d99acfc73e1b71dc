#include "shared_operands.h"

namespace fastcl::cpu {
namespace {

// The largest copy. What it saves, packing a tile for each block of rows that meets it, fades as blocks grow.
constexpr int64_t kMostFloats = int64_t{16} << 20;
// A matrix that is so much longer than the other is left to the tasks: few rows of that meet it, and its copy would be
// most of the memory that the call takes.
constexpr int64_t kMuchLonger = 8;

// Whether rows are worth a copy of `floats`, if in blocks of `block` rows `others` meet them.
bool pays(int64_t rows, int64_t floats, int64_t others, int64_t block) {
  return others > block && rows <= kMuchLonger * others && floats <= kMostFloats;
}

}  // namespace

SharedOperands::Buffer SharedOperands::allocate(int64_t floats) {
  return Buffer(static_cast<float*>(::operator new(sizeof(float) * floats, std::align_val_t{64})));
}

SharedOperands::SharedOperands(const Workers& workers, Sweep& sweep, bool row_slices, bool column_slices) {
  const Level& level = selected();
  const auto pack = [&](const Matrix& matrix, const PackedSizes& sizes, float* panels, float* slices) {
    workers.parallel_for((matrix.rows + kTileUnit - 1) / kTileUnit, [&](int64_t unit) {
      const Buffer scratch = allocate(sizes.scratch);
      level.pack(matrix, unit * kTileUnit, panels, slices, scratch.get());
    });
  };
  const PackedSizes columns = level.packed_sizes(sweep.y);
  if (pays(sweep.y.rows, columns.panels, sweep.x_count, sweep.row_block)) {
    panels_ = allocate(columns.panels);
    if (column_slices) column_slices_ = allocate(columns.slices);
    pack(sweep.y, columns, panels_.get(), column_slices_.get());
    sweep.y_packed = {panels_.get(), column_slices_.get()};
  }
  if (sweep.symmetric) sweep.x_packed.slices = sweep.y_packed.slices;
  if (!row_slices || sweep.symmetric) return;
  const PackedSizes rows = level.packed_sizes(sweep.x);
  if (pays(sweep.x.rows, rows.slices, sweep.y.rows, sweep.column_block)) {
    row_slices_ = allocate(rows.slices);
    pack(sweep.x, rows, nullptr, row_slices_.get());
    sweep.x_packed.slices = row_slices_.get();
  }
}

}  // namespace fastcl::cpu
