// AVX-512. Compiled with this level's flags (setup.py), run only where levels.cpp finds it supported.
#define FASTCL_LEVEL level_avx512
#define FASTCL_LEVEL_NAME "avx512"
#define FASTCL_LANES 16
#define FASTCL_STRIP 12
#include "level.inc"
