// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mfma -mf16c.

#if defined(__x86_64__)
#define S2SD_WIDTH 16
#define S2SD_MICRO_ROWS 8
#define S2SD_KERNELS kAvx512Bf16Kernels
#define S2SD_BFLOAT16_PAIRS 1
#include "cpu_simd_impl.h"
#endif
