// The fused similarity-KL on an NVIDIA GPU. Independent of TensorFlow: the caller gives the stream and workspace.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_KERNEL_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_KERNEL_H_

#include <cstdint>

#include "similarity_kl.h"
#include "validate.h"

namespace s2sd {

enum class CudaPath {
  kAuto,      // chosen by PlanCuda; the others are for tests
  kSmall16,   // one launch, tiles of 16 x 16; at most 256 columns
  kSmall32,   // the same, tiles of 32 x 32
  kLarge64,   // two passes, tiles of 64 x 64
  kLarge128,  // the same, tiles of 128 x 128
};

struct CudaOptions {
  // For float32 inputs: multiply in TF32 (about 3 digits) or, if false, in TF32 with error compensation, which is as
  // accurate as float32. float16 and bfloat16 inputs are multiplied as they are.
  bool allow_tf32 = false;
  // Bytes for similarities that the first of the two passes keeps for the second. Those that do not fit are recomputed.
  int64_t kept_bytes = kDefaultWorkspaceBytes;
  CudaPath path = CudaPath::kAuto;
  int groups = 0;  // of teachers, at most one per teacher; 0: chosen by PlanCuda
};

// How the problem is divided. A pure function of PlanCuda's arguments.
struct CudaPlan {
  CudaPath path;
  int tile;                 // rows and columns of a tile
  int64_t tiles;            // of one similarity matrix; in the square form, those on or above the diagonal
  int groups;               // of teachers, each with its own blocks; more than one only if tiles are few
  int64_t kept;             // tiles whose similarities are kept from one pass to the next
  int64_t workspace_bytes;  // of device memory
};

CudaPlan PlanCuda(const Problem& problem, const CudaOptions& options, bool gradient);

// Enqueues the computation on `stream` (a cudaStream_t) and returns without waiting. `workspace` is device memory,
// aligned to 256 bytes, of the size that PlanCuda gives; it needs no preparation. Returns null, or a message that stays
// valid; if ValidateForCuda accepts the problem, the message is CUDA's.
//
// Deterministic. Handles rows of any length: rows of about unit length, for which the paper defines its similarities,
// at full speed; others, and temperatures below 0.004, after a pass that finds every row's maximum. All outputs are NaN
// if a squared norm is not finite or above 1e36, if T or a weight is not finite, or if T is not above 1e-37.
const char* SimilarityKlCuda(const Problem& problem, const CudaOptions& options, const Outputs& outputs,
                             void* workspace, void* stream);

}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_KERNEL_H_
