// Which portable kernels there are, which a call takes, in which order and with how many blocks. `launch(kernel,
// blocks, threads, shared bytes, arguments)` is CUDA's for the engine and the emulation's for the tests.
#pragma once

#include <utility>

#include "engine.h"
#include "finish.h"
#include "pairs.h"
#include "registers.h"
#include "weights.h"

namespace fastcl::cuda {

// Kernels for each kind of product; a plan, its masks and its symmetry are arguments, but for whether it tests tags.
// bfloat16 and float16 are what models are trained in, tf32 is float32 under set_float32_matmul_precision("high"),
// tf32 x 3 under "highest".
template <class Call>
void for_precision(Dtype dtype, Call call) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return call(BFloat16());
    case Dtype::kFloat16:
      return call(Float16());
    case Dtype::kTf32:
      return call(Tf32());
    case Dtype::kTf32x3:
      return call(Tf32x3());
  }
}

template <class Precision, class Launch>
void finish_axis(const Similarity& s, bool own_is_row, const Terms& terms, int slots, const float* partials,
                 float flag_below, float* out, Launch launch) {
  if (terms.count == 0) return;
  const int count = s.operands.a.count;
  launch(combine_kernel, combine_blocks(count), kThreads, 0,
         CombineArguments{partials, s.shift, out, terms, slots, count});
  for (int t = 0; t < terms.count; ++t) {
    if (terms.at[t].reduce != Reduce::kLogSumExp) continue;
    launch(redo_kernel<Precision>, static_cast<int>(ceil_div(count, kTile)), kThreads, sizeof(RedoMemory),
           RedoArguments{s, terms.at[t], own_is_row, flag_below, out + static_cast<int64_t>(t) * count});
  }
}

inline SweepArguments sweep_arguments(const StatisticsCall& call, int64_t most) {
  return {call.s,
          call.plan,
          super_axis(call.s.shape.rows, most),
          super_axis(call.s.shape.columns, most),
          call.row_partials,
          call.plan.symmetric ? call.row_partials : call.column_partials};
}

template <class Precision, class Launch>
void launch_sweep(const SweepArguments& x, Launch launch) {
  for_tags(x.plan, [&](auto tagged) {
    launch(sweep_kernel<Precision, tagged.value>, super_tiles(x.rows, x.columns, x.plan.symmetric), kThreads,
           sizeof(SweepMemory<tagged.value>), x);
  });
}

// What follows a sweep, whichever kernel made it.
template <class Precision, class Launch>
void launch_finish(const StatisticsCall& call, const SweepArguments& x, Launch launch) {
  finish_axis<Precision>(call.s, true, call.plan.rows, x.columns.slots, x.row_partials, call.flag_below, call.rows,
                         launch);
  if (call.plan.symmetric) return;
  Similarity turned = call.s;
  turned.operands = {call.s.operands.b, call.s.operands.a, call.s.operands.depth_bytes};
  std::swap(turned.row_tags, turned.column_tags);
  finish_axis<Precision>(turned, false, call.plan.columns, x.rows.slots, x.column_partials, call.flag_below,
                         call.columns, launch);
}

template <class Precision, class Launch>
void launch_weights(const WeightsArguments& call, Launch launch) {
  for_tags(call.plan, [&](auto tagged) {
    launch(weights_kernel<Precision, tagged.value>, panel_tiles(call.panel), kThreads,
           sizeof(WeightsMemory<tagged.value>), call);
  });
}

// Kernels with sums in registers, for bfloat16 and float16: ldmatrix transposes elements of 2 bytes alone. Rows are
// filled up to 64, 128 or 256 numbers, for which a thread has 64, 128 and 128 sums; more don't fit. Plans with tags
// have no such kernel, whose masks need the registers that the sums are in.
template <class Precision, class Launch>
void launch_gradient(const GradientArguments& call, Launch launch) {
  const auto launch_for = [&](auto depth) {
    using Fragments = OwnRowsFragments<depth.value>;
    launch(gradient_kernel<Precision, depth.value>,
           static_cast<int>(ceil_div(call.s.operands.a.count, tile_rows<Fragments>())), Fragments::kThreads,
           sizeof(GradientMemory<depth.value>), call);
  };
  const int depth = call.s.operands.depth_bytes / Precision::kBytes;
  if (depth <= 64) {
    launch_for(std::integral_constant<int, 64>());
  } else if (depth <= 128) {
    launch_for(std::integral_constant<int, 128>());
  } else {
    launch_for(std::integral_constant<int, kMostOwnDepth>());
  }
}

template <class Precision, class Launch>
void launch_pairs(const PairsArguments& call, Launch launch) {
  launch(pairs_kernel<Precision>, panel_tiles(call.panel), kThreads, sizeof(PairsMemory), call);
}

}  // namespace fastcl::cuda
