// The fused similarity-KL on the CPU: loss and gradient in O(B) memory plus a workspace of bounded size.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_KERNEL_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_KERNEL_H_

#include <cstdint>
#include <functional>
#include <string>

#include "similarity_kl.h"

namespace s2sd {

// Vector instructions, from the least to the most demanding.
enum class Simd { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// The most demanding that this processor supports and this build contains.
Simd BestSimd();
const char* SimdName(Simd simd);

struct CpuOptions {
  // Bytes for exponentials that the first pass keeps for the second. Those that do not fit are recomputed.
  int64_t workspace_bytes = kDefaultWorkspaceBytes;
  Simd simd = BestSimd();
  int num_threads = 1;
  // Runs task(0), ..., task(num_threads - 1), concurrently as far as possible, and returns when all have returned. The
  // kernel is correct for any order and overlap of the tasks. If null, they run one after the other on the calling
  // thread.
  std::function<void(int num_threads, const std::function<void(int)>& task)> run_tasks;
};

// Computes the outputs. Returns an empty string, or an error message. If the problem is invalid, the outputs are not
// written. The same problem and options give bit-identical results.
//
// Handles rows of any length: rows of about unit length, for which the paper defines its similarities, at full speed;
// if the exponentials of others leave the range of float32, after a pass that finds every row's maximum.
std::string SimilarityKlCpu(const Problem& problem, const CpuOptions& options, const Outputs& outputs);

// How the problem is divided. A pure function of PlanCpu's arguments.
struct CpuPlan {
  bool small;          // nothing is kept or recomputed; tiles are the fallback for rows of any length
  int tile;            // rows and columns of a tile
  int64_t tiles;       // of one similarity matrix; in the square form, those on or above the diagonal
  int64_t kept;        // the tiles whose exponentials are kept in the workspace
  int64_t kept_bytes;  // bytes of the workspace
};

CpuPlan PlanCpu(const Problem& problem, int64_t workspace_bytes, int num_threads, bool gradient);

// The environment variable S2SD_TF_WORKSPACE_MIB in bytes, or kDefaultWorkspaceBytes if it is unset or invalid.
int64_t WorkspaceBytes();

}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_KERNEL_H_
