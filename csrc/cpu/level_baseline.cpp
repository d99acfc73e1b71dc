// What every machine of the architecture has: SSE2 on x86-64 (16 registers), NEON on aarch64 (32).
#define FASTCL_LEVEL level_baseline
#define FASTCL_LEVEL_NAME "baseline"
#define FASTCL_LANES 4
#ifdef __aarch64__
#define FASTCL_STRIP 12
#else
#define FASTCL_STRIP 6
#endif
#include "level.inc"
