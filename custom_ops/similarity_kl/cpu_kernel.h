// The fused similarity-KL on the CPU: loss and gradient in O(B) memory beside a workspace of bounded size.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_KERNEL_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_KERNEL_H_

#include <cstdint>
#include <functional>
#include <string>

#include "similarity_kl.h"

namespace s2sd {

// Vector instructions, from the least to the most demanding.
enum class Simd { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// The most demanding that this processor has and this build contains.
Simd BestSimd();
const char* SimdName(Simd simd);

struct CpuOptions {
  // Bytes for exponentials that the first pass leaves to the second; what does not fit is computed again.
  int64_t workspace_bytes = kDefaultWorkspaceBytes;
  Simd simd = BestSimd();
  int num_threads = 1;
  // Runs task(0), ..., task(num_threads - 1), as far as possible at the same time, and returns when all have returned.
  // The kernel is correct under any order and overlap of the tasks. Null: one after the other on the calling thread.
  std::function<void(int num_threads, const std::function<void(int)>& task)> run_tasks;
};

// Computes the outputs. Returns an empty string, or what is wrong with the problem; the outputs are then not written.
// The result is the same, bit by bit, for the same problem and options.
//
// Rows of any length are handled: those of about unit length, at which the paper's similarities are defined, at full
// speed; where the exponentials of others leave the range of float32, after a pass that looks for every row's maximum.
std::string SimilarityKlCpu(const Problem& problem, const CpuOptions& options, const Outputs& outputs);

// How the problem is cut: the choice is a pure function of the arguments.
struct CpuPlan {
  bool small;          // nothing is kept or computed again; the tiles are for rows of any length only
  int tile;            // rows and columns of a tile
  int64_t tiles;       // tiles of the similarity matrices; those on or above the diagonal in the square form
  int64_t kept;        // of these, the tiles whose exponentials are kept in the workspace
  int64_t kept_bytes;  // bytes of the workspace
};

CpuPlan PlanCpu(const Problem& problem, int64_t workspace_bytes, int num_threads, bool gradient);

// The environment variable S2SD_TF_WORKSPACE_MIB in bytes; kDefaultWorkspaceBytes where it is not set or not a number.
int64_t WorkspaceBytes();

}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_KERNEL_H_
