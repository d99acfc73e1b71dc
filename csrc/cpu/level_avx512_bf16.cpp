// AVX-512 with the bfloat16 dot product. Compiled with this level's flags (setup.py), run only where levels.cpp finds
// it supported.
#define FASTCL_LEVEL level_avx512_bf16
#define FASTCL_LEVEL_NAME "avx512_bf16"
#define FASTCL_LANES 16
#define FASTCL_STRIP 12
#include "level.inc"
