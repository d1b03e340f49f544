// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c.

#if defined(__x86_64__)
#define S2SD_WIDTH 16
#define S2SD_MICRO_ROWS 8
#define S2SD_KERNELS kAvx512Kernels
#include "cpu_simd_impl.h"
#endif
