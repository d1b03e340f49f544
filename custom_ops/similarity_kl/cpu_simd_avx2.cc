// Compiled with -mavx2 -mfma -mf16c.

#if defined(__x86_64__)
#define S2SD_WIDTH 8
#define S2SD_MICRO_ROWS 4
#define S2SD_KERNELS kAvx2Kernels
#include "cpu_simd_impl.h"
#endif
