// Vectors of 128 bits, with the compiler's default instructions.

#define S2SD_WIDTH 4
#define S2SD_MICRO_ROWS 4
#define S2SD_KERNELS kPortableKernels
#include "cpu_simd_impl.h"
