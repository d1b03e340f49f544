// See cpu_kernel.h.

#include "cpu_kernel.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "cpu_buffers.h"
#include "cpu_dots.h"
#include "cpu_schedule.h"
#include "cpu_simd.h"
#include "cpu_small.h"
#include "cpu_tiled.h"
#include "validate.h"

namespace s2sd {
namespace {

constexpr int kTileSizes[] = {192, 144, 96, 48, 32};
constexpr int64_t kSmallColumns = 192;               // up to this many, everything fits into the caches
constexpr int kItemsPerThread = 8;                   // at least, for an even load, if the batch is large enough
constexpr int64_t kThreadBytes = int64_t{40} << 20;  // of all threads' buffers together

const SimdKernels& KernelsOf(Simd simd) {
  switch (simd) {
#if defined(__x86_64__)
    case Simd::kAvx512Bf16:
      return kAvx512Bf16Kernels;
    case Simd::kAvx512:
      return kAvx512Kernels;
    case Simd::kAvx2:
      return kAvx2Kernels;
#endif
    default:
      return kPortableKernels;
  }
}

}  // namespace

Simd BestSimd() {
#if defined(__x86_64__)
  static const Simd best = [] {
    __builtin_cpu_init();
    // Not every compiler's __builtin_cpu_supports knows f16c.
    unsigned eax, ebx, ecx = 0, edx;
    const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
    if (!avx2) return Simd::kPortable;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!avx512) return Simd::kAvx2;
    return __builtin_cpu_supports("avx512bf16") ? Simd::kAvx512Bf16 : Simd::kAvx512;
  }();
  return best;
#else
  return Simd::kPortable;
#endif
}

const char* SimdName(Simd simd) {
  static const char* const names[] = {"portable", "AVX2", "AVX-512", "AVX-512 BF16"};
  return names[static_cast<int>(simd)];
}

int64_t WorkspaceBytes() {
  const char* text = std::getenv("S2SD_TF_WORKSPACE_MIB");
  if (!text || !*text) return kDefaultWorkspaceBytes;
  char* end;
  const double mib = std::strtod(text, &end);
  return *end || !(mib >= 0) || mib > 1e9 ? kDefaultWorkspaceBytes : static_cast<int64_t>(mib * (1 << 20));
}

CpuPlan PlanCpu(const Problem& problem, int64_t workspace_bytes, int num_threads, bool gradient) {
  const int64_t matrices = problem.num_teachers + 1;
  const bool small = IsSquare(problem) && problem.columns <= kSmallColumns;
  const auto fits = [&](int tile) {
    const int64_t tiles = TileGrid::Count(problem, tile);
    return tiles * matrices >= int64_t{kItemsPerThread} * num_threads &&
           ThreadBuffers::Floats(tile) * int64_t{sizeof(float)} * num_threads <= kThreadBytes;
  };
  int tile = 0;
  for (int size : kTileSizes) {
    if (problem.columns <= kSmallColumns && size > DotProducts::kLargestUnpackedTile) continue;
    tile = size;
    if (fits(size)) break;
  }
  const int64_t tiles = TileGrid::Count(problem, tile);
  const int64_t tile_bytes = matrices * tile * tile * sizeof(float);
  const int64_t kept = gradient && !small ? std::min(tiles, workspace_bytes / tile_bytes) : 0;
  return {small, tile, tiles, kept, kept * tile_bytes};
}

std::string SimilarityKlCpu(const Problem& problem, const CpuOptions& options, const Outputs& outputs) {
  const std::string wrong = ValidateForCpu(problem);
  if (!wrong.empty()) return wrong;
  try {
    const SimdKernels& kernels = KernelsOf(options.simd);
    const CpuPlan plan = PlanCpu(problem, options.workspace_bytes, options.num_threads, outputs.gradient != nullptr);
    if (plan.small && SmallComputation(problem, options, outputs, kernels).Run()) return "";
    TiledComputation tiled(problem, options, outputs, kernels, plan);
    if (plan.small) {
      tiled.RunForAnyLength();
    } else {
      tiled.Run();
    }
  } catch (const std::bad_alloc&) {
    return "out of memory";
  }
  return "";
}

}  // namespace s2sd
