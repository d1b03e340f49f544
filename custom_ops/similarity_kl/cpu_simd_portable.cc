// Vectors of 128 bits by whatever instructions the compiler's default has.

#define S2SD_WIDTH 4
#define S2SD_MICRO_ROWS 4
#define S2SD_KERNELS kPortableKernels
#include "cpu_simd_impl.h"
