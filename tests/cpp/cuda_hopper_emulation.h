// What csrc/cuda/hopper_primitives.h has, for a CPU: TMA with its swizzle and its zeros beyond a matrix, barriers with
// phases and announced bytes, wgmma from descriptors of swizzled shared memory, barriers by number.
//
// What TMA and wgmma do to addresses is written here by the PTX manual and not by the functions that the kernels use:
// bits 4-6 of an address are XORed with bits 7-9.
#pragma once

#include "cuda_emulation.h"

namespace fastcl::cuda::hopper {

struct alignas(128) TensorMap {
  const unsigned char* data;
  int64_t pitch;
  int rows;
  int elements;
  int element_bytes;
  int box_rows;
  int box_elements;
};

struct Barrier {
  uint16_t arrivals;  // of a phase
  uint16_t missing;
  uint32_t odd : 1;
  int32_t bytes : 31;  // announced and not there yet
};
static_assert(sizeof(Barrier) == 8);

namespace emulation {

using cuda::emulation::Block;
using cuda::emulation::block;
using cuda::emulation::HandedIn;

inline uintptr_t swizzled(uintptr_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void end_phase(Barrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.odd ^= 1;
  barrier.missing = barrier.arrivals;
}

inline void load_box(unsigned char* shared, const TensorMap& map, int element, int row, Barrier& barrier) {
  const int width = map.box_elements * map.element_bytes;
  for (int r = 0; r < map.box_rows; ++r) {
    for (int e = 0; e < map.box_elements; ++e) {
      unsigned char* const to = reinterpret_cast<unsigned char*>(
          swizzled(reinterpret_cast<uintptr_t>(shared + r * width + e * map.element_bytes)));
      if (row + r < map.rows && element + e < map.elements) {
        std::memcpy(to, map.data + (int64_t{row} + r) * map.pitch + (int64_t{element} + e) * map.element_bytes,
                    map.element_bytes);
      } else {
        std::memset(to, 0, map.element_bytes);
      }
    }
  }
  barrier.bytes -= map.box_rows * width;
  end_phase(barrier);
}

// What the driver's cuTensorMapEncodeTiled does on a GPU.
struct Map {
  template <class Boxes, class Precision>
  TensorMap operator()(const Boxes& x, Precision) const {
    if (x.pitch % 16 != 0 || x.box_elements * Precision::kBytes > 128)
      Block::fail("a map that the driver would refuse");
    return {x.data, x.pitch, x.rows, x.elements, Precision::kBytes, x.box_rows, x.box_elements};
  }
};

// An operand as its descriptor says.
struct Operand {
  uintptr_t first;
  int stride;  // from eight rows to the next eight

  explicit Operand(uint64_t descriptor)
      : first(reinterpret_cast<uintptr_t>(block().shared()) + (descriptor & 0x3fff) * 16),
        stride(static_cast<int>(descriptor >> 32 & 0x3fff) * 16) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) Block::fail("a descriptor without its swizzle");
  }

  uint16_t at(int row, int k) const {
    uint16_t bits;
    std::memcpy(&bits,
                reinterpret_cast<const void*>(swizzled(first + row / 8 * stride + row % 8 * 128 + k * sizeof(bits))),
                sizeof bits);
    return bits;
  }
};

// This thread's share of a 64 x 128 product over 16 elements. By the PTX manual (register fragment of the accumulator
// for wgmma.m64nNk16), with w the warp, g = lane / 4 and t = lane % 4: register r has row 16 w + g + 8 (r / 2 % 2),
// column 8 (r / 4) + 2 t + r % 2.
template <class Element>
void multiply(float (&c)[64], uint64_t a, uint64_t b, bool add, Element element) {
  const HandedIn* const lanes = block().meet({{static_cast<uint32_t>(a), static_cast<uint32_t>(b)}, nullptr});
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes[lane].words[0] != static_cast<uint32_t>(a) || lanes[lane].words[1] != static_cast<uint32_t>(b)) {
      Block::fail("lanes of a warp multiply different operands");
    }
  }
  const int warp = block().thread() / 32 % 4;
  const int lane = block().lane();
  block().multiply([&c, a, b, add, element, warp, lane] {
    const Operand left(a), right(b);
    for (int half = 0; half < 2; ++half) {
      float row[16];
      for (int k = 0; k < 16; ++k) row[k] = element(left.at(16 * warp + lane / 4 + 8 * half, k));
      for (int column = 0; column < 32; ++column) {
        const int r = column / 2 * 4 + 2 * half + column % 2;
        double sum = add ? c[r] : 0.0f;
        for (int k = 0; k < 16; ++k) {
          sum += static_cast<double>(row[k]) * element(right.at(column / 2 * 8 + lane % 4 * 2 + column % 2, k));
        }
        c[r] = static_cast<float>(sum);
      }
    }
  });
}

}  // namespace emulation

inline int block_count() { return emulation::block().count(); }
inline unsigned char* swizzled_shared_memory() { return emulation::block().shared(); }

inline void init(Barrier& barrier, int arrivals) {
  barrier = {static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0, 0};
}
inline void publish_barriers() {}
inline void arrive(Barrier& barrier) {
  if (barrier.missing-- == 0) emulation::Block::fail("more threads arrive at a barrier than belong there");
  emulation::end_phase(barrier);
}
inline void arrive_and_expect(Barrier& barrier, int bytes) {
  barrier.bytes += bytes;
  arrive(barrier);
}
inline void wait(Barrier& barrier, uint32_t parity) {
  emulation::block().poll([&barrier, parity] { return barrier.odd != parity; });
}

inline void prefetch(const TensorMap&) {}
inline void load_box(void* shared, const TensorMap& map, int element, int row, Barrier& barrier) {
  if (reinterpret_cast<uintptr_t>(shared) % 1024 != 0) emulation::Block::fail("a box in the midst of a pattern");
  emulation::block().load(
      [=, &map, &barrier] { emulation::load_box(static_cast<unsigned char*>(shared), map, element, row, barrier); });
}

inline void begin_products() { emulation::block().meet({}); }
inline void commit_products() { emulation::block().commit_products(); }
template <int kPending>
inline void wait_for_products() {
  emulation::block().wait_for_products(kPending);
  emulation::block().meet({});
}
inline void settle(float&) {}
inline void multiply_bfloat16(float (&c)[64], uint64_t a, uint64_t b, bool add) {
  emulation::multiply(c, a, b, add, cuda::emulation::bfloat16_to_float);
}
inline void multiply_float16(float (&c)[64], uint64_t a, uint64_t b, bool add) {
  emulation::multiply(c, a, b, add, cuda::emulation::half_to_float);
}

template <int kRegisters>
inline void give_registers() {}
template <int kRegisters>
inline void take_registers() {}

inline void sync_some(int number, int threads) { emulation::block().sync(number, threads, false); }
inline void arrive_at_some(int number, int threads) { emulation::block().arrive(number, threads, false); }
inline bool any_of_some(int number, int threads, bool predicate) {
  return emulation::block().sync(number, threads, predicate);
}

}  // namespace fastcl::cuda::hopper
