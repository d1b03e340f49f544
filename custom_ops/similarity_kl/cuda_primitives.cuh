// The few instructions and runtime calls that the kernels need beyond plain C++. Without nvcc the emulator provides the
// same names, so that the kernels' own source, indexing and all, runs on a machine without a GPU.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_PRIMITIVES_CUH_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_PRIMITIVES_CUH_

#ifndef __CUDACC__
#include "cuda_host_harness.h"
#else

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace s2sd {
namespace cuda {

__device__ __forceinline__ char* SharedMemory() {
  extern __shared__ uint4 shared_memory[];
  return reinterpret_cast<char*>(shared_memory);
}

// threadIdx.x, opaque to the compiler, so that what depends on it is computed where it is used. Otherwise an epilogue's
// row numbers, addresses and bounds would go through the main loop in registers that the loop cannot spare.
__device__ __forceinline__ int OpaqueThreadIndex() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(index));
  return index;
}

// Copies 16 (or 4) bytes to shared memory without waiting; if not `valid`, writes zeros and reads nothing.
__device__ __forceinline__ void CopyAsync16(void* shared, const void* global, bool valid) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(valid ? 16 : 0)
      : "memory");
}

__device__ __forceinline__ void CopyAsync4(void* shared, const void* global, bool valid) {
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(valid ? 4 : 0)
      : "memory");
}

__device__ __forceinline__ void CopyAsyncCommit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits for all of this thread's groups except the newest `kPending`.
template <int kPending>
__device__ __forceinline__ void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Loads four matrices of 8 rows of 16 bytes. Lane n gives the address of row n % 8 of matrix n / 8. Of every matrix, a
// lane gets the 4 bytes of row lane / 4 at position lane % 4.
__device__ __forceinline__ void LoadMatrices(const void* shared, unsigned (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared)))
               : "memory");
}

__device__ __forceinline__ float Float16ToFloat(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(x) : "h"(bits));
  return x;
}

__device__ __forceinline__ uint16_t FloatToFloat16(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void MmaTf32(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void MmaFloat16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void MmaBfloat16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void GridSync() { cooperative_groups::this_grid().sync(); }

}  // namespace cuda
}  // namespace s2sd

#endif  // __CUDACC__

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_PRIMITIVES_CUH_
