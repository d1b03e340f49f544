#include <algorithm>
#include <cstdint>

#include "cuda_common.cuh"
#include "cuda_kernel.h"
#include "cuda_large.cuh"
#include "cuda_small.cuh"

namespace s2sd {
namespace cuda {

// Tiles of 128 x 128 reuse more of what they load, once there are enough of them for every multiprocessor of today's
// large GPUs. Below that, smaller tiles and groups of teachers share the work out better.
constexpr int64_t kEnoughTiles = 132;
constexpr int64_t kEnoughBlocks = 4 * kEnoughTiles;

bool IsSmall(CudaPath path) { return path == CudaPath::kSmall16 || path == CudaPath::kSmall32; }

int TileOf(CudaPath path) {
  switch (path) {
    case CudaPath::kSmall16:
      return 16;
    case CudaPath::kSmall32:
      return 32;
    case CudaPath::kLarge64:
      return 64;
    default:
      return 128;
  }
}

int64_t CountTiles(const Problem& problem, int tile) {
  return NumTiles(problem.rows == problem.columns, CeilDiv(static_cast<int>(problem.rows), tile),
                  CeilDiv(static_cast<int>(problem.columns), tile));
}

CudaPath ChoosePath(const Problem& problem) {
  if (problem.columns <= kSmallColumns / 2) return CudaPath::kSmall16;
  if (problem.columns <= kSmallColumns) return CudaPath::kSmall32;
  return CountTiles(problem, 128) >= kEnoughTiles ? CudaPath::kLarge128 : CudaPath::kLarge64;
}

// Hands out consecutive pieces of the workspace or, with a null base, only counts bytes.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* Take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return piece;
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

void LayOut(const Problem& problem, Arena* arena, SmallParams* p) {
  const int64_t teachers = problem.num_teachers;
  const int64_t matrices = teachers + 1;
  p->similarities = arena->Take<float>(matrices * problem.rows * problem.columns);
  p->maxima = arena->Take<float>(matrices * problem.rows);
  p->row_kl = arena->Take<double>(teachers * problem.rows);
  p->invalid = arena->Take<int>(matrices * problem.columns);
  p->inverse_sums = arena->Take<float>(matrices * problem.rows);
}

// Lays out the workspace. Returns how many bytes from its start have to be zeroed.
int64_t LayOut(const Problem& problem, const CudaPlan& plan, bool gradient, Arena* arena, LargeParams* p) {
  const int64_t teachers = problem.num_teachers;
  const int64_t matrices = teachers + 1;
  p->header = arena->Take<Header>(1);
  p->exp_sums = arena->Take<unsigned long long>(matrices * problem.rows);
  p->cross_sums = arena->Take<unsigned long long>(teachers * problem.rows);
  p->maxima = arena->Take<int>(matrices * problem.rows);
  if (gradient) p->gradient_sums = arena->Take<unsigned long long>(problem.columns * problem.student.dim);
  const int64_t zeroed = arena->used();
  p->partial_kl = arena->Take<double>(teachers * CeilDiv(static_cast<int>(problem.rows), kThreads));
  p->inverse_sums = arena->Take<float>(matrices * problem.rows);
  p->kept = arena->Take<float4>(plan.kept * matrices * (plan.tile * plan.tile / 4));
  p->kept_tiles = static_cast<int>(plan.kept);
  return zeroed;
}

DeviceMatrix Describe(const Matrix& matrix, Scalar scalar) {
  const int64_t row_bytes = matrix.dim * ScalarBytes(scalar);
  const uint64_t bits = reinterpret_cast<uintptr_t>(matrix.data) | static_cast<uint64_t>(row_bytes);
  const Access access = bits % 16 == 0 ? Access::k16 : bits % 4 == 0 ? Access::k4 : Access::k2;
  return {static_cast<const char*>(matrix.data), static_cast<int>(matrix.dim), static_cast<int>(row_bytes), access};
}

// Fills in everything except what lies in the workspace.
void Fill(const Problem& problem, const Outputs& outputs, Params* p) {
  p->columns = static_cast<int>(problem.columns);
  p->row_offset = static_cast<int>(problem.row_offset);
  p->rows = static_cast<int>(problem.rows);
  p->square = problem.rows == problem.columns;
  p->num_matrices = problem.num_teachers + 1;
  p->temperature = problem.temperature;
  p->weights = problem.weights;
  p->total = outputs.total;
  p->per_teacher = outputs.per_teacher;
  p->gradient = outputs.gradient;
  for (int m = 0; m < p->num_matrices; ++m) p->matrices[m] = Describe(MatrixOf(problem, m), problem.scalar);
}

// Contiguous groups of teachers of about the same total dimension.
void GroupTeachers(int groups, LargeParams* p) {
  const int teachers = p->num_matrices - 1;
  int64_t total = 0;
  for (int k = 0; k < teachers; ++k) total += p->matrices[k + 1].dim;
  int64_t before = 0;
  int k = 0;
  for (int g = 0; g < groups; ++g) {
    // A teacher belongs to the group in which its middle lies; the last group's end is beyond every middle.
    for (; k < teachers && (2 * before + p->matrices[k + 1].dim) * groups < 2 * total * (g + 1); ++k) {
      before += p->matrices[k + 1].dim;
    }
    p->group_ends[g] = static_cast<uint8_t>(k);
  }
}

// Enqueues kernels until the first error, which it keeps.
class Launcher {
 public:
  explicit Launcher(cudaStream_t stream) : stream_(stream) {}

  template <typename KernelParams>
  void Launch(void (*kernel)(KernelParams), dim3 grid, int shared_bytes, const KernelParams& params,
              bool cooperative = false) {
    if (shared_bytes > kSharedBytesWithoutAsking) {
      Keep([&] {
        return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    shared_bytes);
      });
    }
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_;
    config.attrs = &attribute;
    config.numAttrs = cooperative ? 1 : 0;
    Keep([&] { return cudaLaunchKernelEx(&config, kernel, params); });
  }

  void Zero(void* memory, int64_t bytes) {
    Keep([&] { return cudaMemsetAsync(memory, 0, bytes, stream_); });
  }

  int Multiprocessors() {
    int id = 0, count = 1;
    Keep([&] { return cudaGetDevice(&id); });
    Keep([&] { return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, id); });
    return count;
  }

  // How many blocks of a kernel fit on one multiprocessor.
  template <typename KernelParams>
  int ResidentBlocks(void (*kernel)(KernelParams), int shared_bytes) {
    int count = 1;
    Keep([&] {
      return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, reinterpret_cast<const void*>(kernel), kThreads,
                                                           shared_bytes);
    });
    return count;
  }

  const char* error() const { return error_ == cudaSuccess ? nullptr : cudaGetErrorString(error_); }

 private:
  static constexpr int kSharedBytesWithoutAsking = 48 << 10;

  template <typename Call>
  void Keep(const Call& call) {
    if (error_ == cudaSuccess) error_ = call();
  }

  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

template <Scalar kScalar, bool kCompensated, int kTile>
void RunSmall(const Problem& problem, const Outputs& outputs, void* workspace, Launcher* launcher) {
  SmallParams p = {};
  Fill(problem, outputs, &p);
  Arena arena(workspace);
  LayOut(problem, &arena, &p);
  const auto kernel = SmallKernel<kScalar, kCompensated, kTile>;
  const int shared_bytes = kSmallSharedBytes<kTile>;
  const int64_t resident =
      int64_t{launcher->ResidentBlocks(kernel, shared_bytes)} * int64_t{launcher->Multiprocessors()};
  const int64_t tiles = CountTiles(problem, kTile) * p.num_matrices;
  const int64_t blocks = std::min(std::max<int64_t>(tiles, p.gradient == nullptr ? 1 : p.columns), resident);
  launcher->Launch(kernel, dim3(static_cast<unsigned>(blocks)), shared_bytes, p, /*cooperative=*/true);
}

template <Scalar kScalar, bool kCompensated, int kTile>
void RunLarge(const Problem& problem, const CudaPlan& plan, const Outputs& outputs, void* workspace,
              Launcher* launcher) {
  LargeParams p = {};
  Fill(problem, outputs, &p);
  Arena arena(workspace);
  const int64_t zeroed = LayOut(problem, plan, outputs.gradient != nullptr, &arena, &p);
  GroupTeachers(plan.groups, &p);
  const dim3 tiles(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.groups));
  const auto rows = [&](int a_block) { return dim3(CeilDiv(p.rows, a_block), p.num_matrices); };
  const auto some = [&](int64_t blocks) {
    return dim3(static_cast<unsigned>(std::min<int64_t>(blocks, 8 * launcher->Multiprocessors())));
  };

  launcher->Zero(workspace, zeroed);
  launcher->Launch(CheckKernel<kScalar>, dim3(CeilDiv(p.columns, kWarps), p.num_matrices), 0, p);
  launcher->Launch(MaximaKernel<kScalar, kCompensated>, some(CountTiles(problem, 64)), kLargeSharedBytes<64>, p);
  launcher->Launch(SumsKernel<kScalar, kCompensated, kTile>, tiles, kLargeSharedBytes<kTile>, p);
  launcher->Launch(NormalizeKernel, rows(kThreads), kWarps * sizeof(double), p);
  launcher->Launch(FinishKernel, dim3(1), kCudaMaxTeachers * sizeof(double), p);
  if (p.gradient == nullptr) return;
  launcher->Launch(GradientKernel<kScalar, kCompensated, kTile>, tiles, kLargeSharedBytes<kTile>, p);
  launcher->Launch(ConvertKernel, some((int64_t{p.columns} * p.matrices[0].dim + kThreads - 1) / kThreads), 0, p);
}

template <Scalar kScalar, bool kCompensated>
void RunPlan(const Problem& problem, const CudaPlan& plan, const Outputs& outputs, void* workspace,
             Launcher* launcher) {
  switch (plan.path) {
    case CudaPath::kSmall16:
      return RunSmall<kScalar, kCompensated, 16>(problem, outputs, workspace, launcher);
    case CudaPath::kSmall32:
      return RunSmall<kScalar, kCompensated, 32>(problem, outputs, workspace, launcher);
    case CudaPath::kLarge64:
      return RunLarge<kScalar, kCompensated, 64>(problem, plan, outputs, workspace, launcher);
    default:
      return RunLarge<kScalar, kCompensated, 128>(problem, plan, outputs, workspace, launcher);
  }
}

}  // namespace cuda

CudaPlan PlanCuda(const Problem& problem, const CudaOptions& options, bool gradient) {
  CudaPlan plan = {};
  plan.path = options.path == CudaPath::kAuto ? cuda::ChoosePath(problem) : options.path;
  plan.tile = cuda::TileOf(plan.path);
  plan.tiles = cuda::CountTiles(problem, plan.tile);
  cuda::Arena arena(nullptr);
  if (cuda::IsSmall(plan.path)) {
    plan.groups = 1;
    cuda::SmallParams unused;
    cuda::LayOut(problem, &arena, &unused);
  } else {
    // Every group repeats the student's products, but these are few.
    plan.groups = static_cast<int>(
        std::min<int64_t>(problem.num_teachers,
                          options.groups > 0 ? options.groups : (cuda::kEnoughBlocks + plan.tiles - 1) / plan.tiles));
    const int64_t tile_bytes = int64_t{4} * plan.tile * plan.tile * (problem.num_teachers + 1);
    plan.kept = gradient ? std::min(plan.tiles, options.kept_bytes / tile_bytes) : 0;
    cuda::LargeParams unused;
    cuda::LayOut(problem, plan, gradient, &arena, &unused);
  }
  plan.workspace_bytes = arena.used();
  return plan;
}

const char* SimilarityKlCuda(const Problem& problem, const CudaOptions& options, const Outputs& outputs,
                             void* workspace, void* stream) {
  if (!ValidateForCuda(problem).empty()) return "similarity_kl: a problem that ValidateForCuda refuses";
  const CudaPlan plan = PlanCuda(problem, options, outputs.gradient != nullptr);
  cuda::Launcher launcher(static_cast<cudaStream_t>(stream));
  const auto run = [&] {
    switch (problem.scalar) {
      case Scalar::kFloat16:
        return cuda::RunPlan<Scalar::kFloat16, true>;
      case Scalar::kBfloat16:
        return cuda::RunPlan<Scalar::kBfloat16, true>;
      default:
        return options.allow_tf32 ? cuda::RunPlan<Scalar::kFloat32, false> : cuda::RunPlan<Scalar::kFloat32, true>;
    }
  }();
  run(problem, plan, outputs, workspace, &launcher);
  return launcher.error();
}

}  // namespace s2sd
