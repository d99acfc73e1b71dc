// AVX2 and FMA. Compiled with this level's flags (setup.py), run only where levels.cpp finds it supported.
#define FASTCL_LEVEL level_avx2
#define FASTCL_LEVEL_NAME "avx2"
#define FASTCL_LANES 8
#define FASTCL_STRIP 6
#include "level.inc"
