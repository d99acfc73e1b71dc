// What csrc/cuda/primitives.h has, for a CPU: a block's threads are fibers that take turns, and an instruction of a
// warp is computed from what its lanes hand in, by the fragment layouts of the PTX manual.
//
// Turns are taken so as to find what a GPU would only sometimes show. A warp runs as far as it can before another one
// gets a turn, in ascending or descending order, so a missing barrier shows. Asynchronous copies happen as late as
// wait_for_copies() allows, or at once: the one shows what is read too early, the other what is overwritten too early.
// Shared memory starts as NaN. Where nobody can go on, and nothing is under way, the program ends with an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

namespace fastcl::cuda {

inline float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

namespace emulation {

struct Order {
  bool warps_descend = false;
  bool copies_are_late = true;
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;

  void run() const {
    std::memset(to, 0, 16);
    std::memcpy(to, from, bytes);
  }
};

enum class State { kReady, kAtWarp, kAtBarrier, kPolling, kDone };

// Where so many threads of the block meet; bar.sync and its kin have 16 of them.
struct Meeting {
  int arrived = 0;
  bool any = false;
  bool any_before = false;
};
constexpr int kMeetings = 16;

struct Fiber {
  State state = State::kReady;
  bool started = false;
  jmp_buf here;
  ucontext_t context;
  int meeting = 0;               // where it waits
  std::function<bool()> may_go;  // what it waits for by polling
  int collectives = 0;           // so far
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> committed;
  std::vector<std::function<void()>> uncommitted_products;
  std::deque<std::vector<std::function<void()>>> committed_products;
};

// What one lane hands in to a collective instruction.
struct HandedIn {
  uint32_t words[6];
  const void* pointer;
};

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;

class Block {
 public:
  Block(int threads, size_t shared_bytes, Order order)
      : threads_(threads),
        order_(order),
        fibers_(threads),
        handed_in_(2 * threads),
        stacks_(new unsigned char[threads * kStack]) {
    const size_t words = (shared_bytes + 127) / 128 * 16;
    shared_.reset(new (std::align_val_t(1024)) uint64_t[words]);
    std::memset(shared_.get(), 0xff, words * 8);
  }

  void run(int index, int blocks, const std::function<void()>& body) {
    index_ = index;
    blocks_ = blocks;
    body_ = &body;
    current_block() = this;
    for (Fiber& fiber : fibers_) {
      fiber = Fiber();
    }
    const int warps = threads_ / kWarp;
    for (bool running = true; running;) {
      running = false;
      ++round_;
      for (int w = 0; w < warps; ++w) running |= run_warp(order_.warps_descend ? warps - 1 - w : w);
      if (running || loads_.empty()) continue;
      loads_.back()();
      loads_.pop_back();
      running = true;
    }
    for (const Fiber& fiber : fibers_) {
      if (fiber.state != State::kDone) fail("threads wait for what nobody does");
    }
    current_block() = nullptr;
  }

  static Block*& current_block() {
    static Block* block = nullptr;
    return block;
  }

  int index() const { return index_; }
  int count() const { return blocks_; }
  int threads() const { return threads_; }
  int thread() const { return thread_; }
  int lane() const { return thread_ % kWarp; }
  unsigned char* shared() { return reinterpret_cast<unsigned char*>(shared_.get()); }

  // Waits until so many threads have arrived; whether the predicate held for one of them.
  bool sync(int number, int threads, bool predicate) {
    fibers_[thread_].meeting = number;
    if (!arrive(number, threads, predicate)) wait(State::kAtBarrier);
    return meetings_[number].any_before;
  }

  // Whether this was the last thread to arrive.
  bool arrive(int number, int threads, bool predicate) {
    Meeting& meeting = meetings_[number];
    meeting.any |= predicate;
    if (++meeting.arrived < threads) return false;
    meeting = {0, false, meeting.any};
    for (Fiber& fiber : fibers_) {
      if (fiber.state == State::kAtBarrier && fiber.meeting == number) fiber.state = State::kReady;
    }
    return true;
  }

  void poll(const std::function<bool()>& may_go) {
    if (may_go()) return;
    fibers_[thread_].may_go = may_go;
    wait(State::kPolling);
  }

  // All lanes meet here; what each handed in stays until the one after the next meeting.
  const HandedIn* meet(const HandedIn& mine) {
    Fiber& fiber = fibers_[thread_];
    HandedIn* const all = &handed_in_[(fiber.collectives++ % 2) * threads_ + thread_ / kWarp * kWarp];
    all[lane()] = mine;
    wait(State::kAtWarp);
    return all;
  }

  void copy(const Copy& copy) {
    if (!order_.copies_are_late) copy.run();
    fibers_[thread_].uncommitted.push_back(copy);
  }
  void commit() {
    Fiber& fiber = fibers_[thread_];
    fiber.committed.push_back(std::move(fiber.uncommitted));
    fiber.uncommitted.clear();
  }
  void wait_for_copies(size_t pending) {
    Fiber& fiber = fibers_[thread_];
    for (; fiber.committed.size() > pending; fiber.committed.pop_front()) {
      if (!order_.copies_are_late) continue;
      for (const Copy& copy : fiber.committed.front()) copy.run();
    }
  }

  // Asynchronous loads happen when nobody can go on without them, the latest first, or at once.
  void load(const std::function<void()>& load) {
    if (order_.copies_are_late) {
      loads_.push_back(load);
    } else {
      load();
    }
  }

  // Asynchronous products happen at once where loads are late, and as late as waiting for them allows where loads are
  // at once: the one shows what is multiplied before it is there, the other what is overwritten before it is
  // multiplied.
  void multiply(const std::function<void()>& product) {
    if (order_.copies_are_late) {
      product();
    } else {
      fibers_[thread_].uncommitted_products.push_back(product);
    }
  }
  void commit_products() {
    Fiber& fiber = fibers_[thread_];
    fiber.committed_products.push_back(std::move(fiber.uncommitted_products));
    fiber.uncommitted_products.clear();
  }
  void wait_for_products(size_t pending) {
    Fiber& fiber = fibers_[thread_];
    // Late is after all others have had a turn.
    if (!order_.copies_are_late) poll([this, round = round_] { return round_ != round; });
    for (; fiber.committed_products.size() > pending; fiber.committed_products.pop_front()) {
      for (const auto& product : fiber.committed_products.front()) product();
    }
  }

  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "emulation: %s\n", what);
    std::exit(2);
  }

 private:
  struct Release {
    void operator()(uint64_t* x) const { ::operator delete[](x, std::align_val_t(1024)); }
  };

  static void enter() {
    Block& block = *current_block();
    (*block.body_)();
    block.wait(State::kDone);
  }

  // makecontext gives a fiber its stack; from then on setjmp and longjmp switch, without a system call.
  void resume(int thread) {
    thread_ = thread;
    Fiber& fiber = fibers_[thread];
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks_.get() + thread * kStack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::enter, 0);
    setcontext(&fiber.context);
  }

  void wait(State state) {
    Fiber& fiber = fibers_[thread_];
    fiber.state = state;
    if (_setjmp(fiber.here) == 0) _longjmp(scheduler_, 1);
  }

  // Until every lane waits for others or is done; whether any ran.
  bool run_warp(int warp) {
    Fiber* const lanes = &fibers_[warp * kWarp];
    bool ran = false;
    for (;;) {
      int ready = 0, at_warp = 0;
      for (int l = 0; l < kWarp; ++l) {
        if (lanes[l].state == State::kPolling && lanes[l].may_go()) lanes[l].state = State::kReady;
        if (lanes[l].state != State::kReady) continue;
        resume(warp * kWarp + l);
        ran = true;
      }
      for (int l = 0; l < kWarp; ++l) {
        ready += lanes[l].state == State::kReady;
        at_warp += lanes[l].state == State::kAtWarp;
      }
      if (ready > 0) continue;
      if (at_warp == 0) break;
      if (at_warp < kWarp) fail("lanes of a warp diverge at an instruction for all of them");
      for (int l = 0; l < kWarp; ++l) lanes[l].state = State::kReady;
    }
    return ran;
  }

  const int threads_;
  const Order order_;
  std::vector<Fiber> fibers_;
  std::vector<HandedIn> handed_in_;
  std::unique_ptr<unsigned char[]> stacks_;
  std::unique_ptr<uint64_t[], Release> shared_;
  const std::function<void()>* body_ = nullptr;
  jmp_buf scheduler_;
  int index_ = 0;
  int blocks_ = 0;
  int thread_ = 0;
  int64_t round_ = 0;  // of turns
  Meeting meetings_[kMeetings];
  std::vector<std::function<void()>> loads_;
};

inline Block& block() { return *Block::current_block(); }

// Blocks one after another, each with shared memory of its own.
template <class Arguments>
void launch(Order order, void (*kernel)(Arguments), int blocks, int threads, size_t shared_bytes,
            const std::remove_cv_t<Arguments>& arguments) {
  for (int b = 0; b < blocks; ++b) {
    Block block(threads, shared_bytes, order);
    block.run(order.warps_descend ? blocks - 1 - b : b, blocks, [&] { kernel(arguments); });
  }
}

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const float fraction = static_cast<float>(bits & 1023);
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction == 0.0f ? sign * HUGE_VALF : NAN;
  return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024.0f + fraction, exponent - 25));
}
inline float bfloat16_to_float(uint16_t bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }

// To nearest, ties to even.
inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = bits_of_float(x);
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t float_to_half(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  int exponent;
  std::frexp(magnitude, &exponent);
  exponent = exponent < -13 ? -13 : exponent;
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));
  // `steps` counts in units of the last place; from 1024 up it carries the exponent's lowest bit itself.
  if (magnitude == 0.0f) return sign;
  return static_cast<uint16_t>(sign | (steps + ((exponent + 13) << 10)));
}

// The tensor core reads the upper 19 bits.
inline float read_tf32(uint32_t bits) { return float_from_bits(bits & ~0x1fffu); }

// c += a * b for a 16 x 8 product over kDepth elements, kPerWord of them in a register. By the PTX manual (matrix
// fragments for mma.m16n8k16 and mma.m16n8k8), with g = lane / 4 and t = lane % 4:
//   a: register r has row g + 8 (r % 2), elements from kPerWord t + kDepth / 2 (r / 2) on
//   b: register r has column g, elements from kPerWord t + kDepth / 2 r on
//   c: register r has row g + 8 (r / 2), column 2 t + r % 2
template <int kDepth, class Element>
void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Element element) {
  constexpr int kPerWord = kDepth / 8;
  const HandedIn* const lanes = block().meet({{a[0], a[1], a[2], a[3], b[0], b[1]}, nullptr});
  const int lane = block().lane();
  for (int r = 0; r < 4; ++r) {
    const int row = lane / 4 + 8 * (r / 2);
    const int column = lane % 4 * 2 + r % 2;
    double sum = c[r];
    for (int k = 0; k < kDepth; ++k) {
      const int half = k / (kDepth / 2);
      const int within = k % (kDepth / 2);
      const uint32_t word_a = lanes[row % 8 * 4 + within / kPerWord].words[row / 8 + 2 * half];
      const uint32_t word_b = lanes[column * 4 + within / kPerWord].words[4 + half];
      sum += static_cast<double>(element(word_a, within % kPerWord)) * element(word_b, within % kPerWord);
    }
    c[r] = static_cast<float>(sum);
  }
}

}  // namespace emulation

inline int thread_index() { return emulation::block().thread(); }
inline int thread_index_anew() { return thread_index(); }
inline int block_index() { return emulation::block().index(); }
inline unsigned char* shared_memory() { return emulation::block().shared(); }
inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - emulation::block().shared());
}
inline void sync_threads() { emulation::block().sync(0, emulation::block().threads(), false); }
inline bool any_thread(bool predicate) { return emulation::block().sync(0, emulation::block().threads(), predicate); }

inline float shuffle_xor(float x, int mask) {
  const emulation::HandedIn* const lanes = emulation::block().meet({{bits_of_float(x)}, nullptr});
  return float_from_bits(lanes[emulation::block().lane() ^ mask].words[0]);
}

inline void copy_async(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) std::abort();
  emulation::block().copy({static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes});
}
inline void commit_copies() { emulation::block().commit(); }
template <int kPending>
inline void wait_for_copies() {
  emulation::block().wait_for_copies(kPending);
}

// ldmatrix: register r of lane l is word l % 4 of the row that lane 8 r + l / 4 points at.
inline void load_matrices(uint32_t (&x)[4], const void* shared) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) std::abort();
  const emulation::HandedIn* const lanes = emulation::block().meet({{}, shared});
  const int lane = emulation::block().lane();
  for (int r = 0; r < 4; ++r) {
    std::memcpy(&x[r], static_cast<const unsigned char*>(lanes[8 * r + lane / 4].pointer) + lane % 4 * 4, 4);
  }
}

// ldmatrix.trans: the same word of the transposed matrix.
inline void load_matrices_transposed(uint32_t (&x)[4], const void* shared) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) std::abort();
  const emulation::HandedIn* const lanes = emulation::block().meet({{}, shared});
  const int lane = emulation::block().lane();
  for (int r = 0; r < 4; ++r) {
    uint16_t halves[2];
    for (int k = 0; k < 2; ++k) {
      const int row = lane % 4 * 2 + k;
      std::memcpy(&halves[k], static_cast<const unsigned char*>(lanes[8 * r + row].pointer) + lane / 4 * 2, 2);
    }
    std::memcpy(&x[r], halves, 4);
  }
}

inline void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply<16>(c, a, b, [](uint32_t word, int k) { return emulation::bfloat16_to_float(word >> 16 * k); });
}
inline void multiply_float16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply<16>(c, a, b, [](uint32_t word, int k) { return emulation::half_to_float(word >> 16 * k); });
}
inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply<8>(c, a, b, [](uint32_t word, int) { return emulation::read_tf32(word); });
}

// To nearest, ties away from zero.
inline uint32_t round_to_tf32(uint32_t bits) {
  return std::isfinite(float_from_bits(bits)) ? (bits + 0x1000) & ~0x1fffu : bits;
}
inline uint32_t pack_bfloat16(float low, float high) {
  return emulation::float_to_bfloat16(low) | static_cast<uint32_t>(emulation::float_to_bfloat16(high)) << 16;
}
inline uint32_t pack_float16(float low, float high) {
  return emulation::float_to_half(low) | static_cast<uint32_t>(emulation::float_to_half(high)) << 16;
}

inline float multiply_rounded(float x, float y) { return x * y; }

inline float exp2_fast(float x) {
  const float result = std::exp2(x);
  return result < 0x1p-126f ? 0.0f : result;
}

inline float inverse_square_root(float x) { return 1.0f / std::sqrt(x); }

struct alignas(16) Chunk {
  uint32_t words[4];
};

}  // namespace fastcl::cuda
