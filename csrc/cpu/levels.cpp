// Which instruction-set level runs: the best this machine supports, or the one named by $FASTCL_CPU_LEVEL.
#include <chrono>
#ifdef FASTCL_COUNT_MULTIPLY_ADDS
#include <atomic>
#endif
#include <cstdlib>
#include <stdexcept>

#include "level.h"

namespace fastcl::cpu {

// What is about threads is the same at every level: the thread sanitizer's build has one.
#if defined(__x86_64__) && !defined(FASTCL_BASELINE_ONLY)
#define FASTCL_X86_LEVELS
#endif

extern const Level level_baseline;
#ifdef FASTCL_X86_LEVELS
extern const Level level_avx2;
extern const Level level_avx512;
extern const Level level_avx512_bf16;
#endif

namespace {

std::vector<const Level*> supported_levels() {
  std::vector<const Level*> levels{&level_baseline};
#ifdef FASTCL_X86_LEVELS
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) levels.push_back(&level_avx2);
  if (avx512) levels.push_back(&level_avx512);
  if (avx512 && __builtin_cpu_supports("avx512bf16")) levels.push_back(&level_avx512_bf16);
#endif
  return levels;
}

const std::vector<const Level*>& supported() {
  static const std::vector<const Level*> levels = supported_levels();
  return levels;
}

}  // namespace

const Level& selected() {
  const char* wanted = std::getenv("FASTCL_CPU_LEVEL");
  if (wanted == nullptr || *wanted == '\0') return *supported().back();
  for (const Level* level : supported()) {
    if (std::string(wanted) == level->name) return *level;
  }
  throw std::invalid_argument("FASTCL_CPU_LEVEL=" + std::string(wanted) + " is not a level this machine supports");
}

std::vector<std::string> available_levels() {
  std::vector<std::string> names;
  for (const Level* level : supported()) names.push_back(level->name);
  return names;
}

std::string selected_level() { return selected().name; }

#ifdef FASTCL_COUNT_MULTIPLY_ADDS
static std::atomic<int64_t> multiply_adds{0};

void count_multiply_adds(int64_t count) { multiply_adds += count; }
int64_t counted_multiply_adds() { return multiply_adds; }
#endif

double peak_flops(Dtype dtype) {
  using Clock = std::chrono::steady_clock;
  const Level& level = selected();
  // What comes before the measurement that counts warms up.
  for (int64_t rounds = 1 << 10;; rounds *= 2) {
    const Clock::time_point start = Clock::now();
    const int64_t operations = level.multiply_adds(dtype, rounds);
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    if (seconds > 0.01) return static_cast<double>(operations) / seconds;
  }
}

}  // namespace fastcl::cpu
