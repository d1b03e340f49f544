// The fused similarity-KL on an NVIDIA GPU. Free of TensorFlow: the caller gives the stream and the workspace.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_KERNEL_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_KERNEL_H_

#include <cstdint>

#include "similarity_kl.h"
#include "validate.h"

namespace s2sd {

struct CudaOptions {
  // float32 inputs: products in TF32 (about 3 digits), or, when false, in TF32 with error compensation, which is as
  // accurate as float32. float16 and bfloat16 inputs are multiplied as they are.
  bool allow_tf32 = false;
};

// Bytes of device memory that SimilarityKlCuda needs. O(columns): matrices of columns x columns are in it only up to
// 256 columns.
int64_t SimilarityKlCudaWorkspaceBytes(const Problem& problem, bool gradient);

// Enqueues the computation on `stream` (a cudaStream_t) and returns without waiting. `workspace` is device memory,
// aligned to 256 bytes, of the size above; it needs no preparation. Returns null, or a message that lives for ever: of
// CUDA where the problem is one that ValidateForCuda accepts.
//
// Deterministic. The rows have to be l2-normalised: where a squared norm is further than 8 T from 1, or anything is not
// finite, or T is not > 0, all outputs are NaN.
const char* SimilarityKlCuda(const Problem& problem, const CudaOptions& options, const Outputs& outputs,
                             void* workspace, void* stream);

}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_KERNEL_H_
