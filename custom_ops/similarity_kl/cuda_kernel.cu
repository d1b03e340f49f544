#include <algorithm>
#include <cstdint>

#include "cuda_common.cuh"
#include "cuda_kernel.h"
#include "cuda_large.cuh"
#include "cuda_small.cuh"

namespace s2sd {
namespace cuda {

enum class Path { kSmall, kLarge };

Path ChoosePath(const Problem& problem) { return problem.columns <= kSmallColumns ? Path::kSmall : Path::kLarge; }

const char* Validate(const Problem& problem) {
  return ValidateForCuda(problem).empty() ? nullptr : "similarity_kl: ValidateForCuda refuses the problem";
}

// Hands out consecutive pieces of the workspace, or, from a null base, just counts.
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

struct Layout {
  int64_t zeroed_bytes;  // from the start
  int64_t bytes;
};

Layout LayOut(const Problem& problem, bool gradient, Path path, void* workspace, Params* p) {
  const int64_t teachers = problem.num_teachers;
  const int64_t matrices = teachers + 1;
  Arena arena(workspace);
  Layout layout = {};
  if (path == Path::kLarge) {
    p->header = arena.Take<Header>(1);
    p->exp_sums = arena.Take<unsigned long long>(matrices * problem.rows);
    p->cross_sums = arena.Take<unsigned long long>(teachers * problem.rows);
    if (gradient) p->gradient_sums = arena.Take<unsigned long long>(problem.columns * problem.student.dim);
    layout.zeroed_bytes = arena.used();
    p->partial_kl = arena.Take<double>(teachers * CeilDiv(static_cast<int>(problem.rows), kThreads));
  } else {
    p->similarities = arena.Take<float>(matrices * problem.rows * problem.columns);
    p->row_kl = arena.Take<double>(teachers * problem.rows);
    p->invalid = arena.Take<int>(matrices * problem.columns);
  }
  p->inverse_sums = arena.Take<float>(matrices * problem.rows);
  layout.bytes = arena.used();
  return layout;
}

DeviceMatrix Describe(const Matrix& matrix, Scalar scalar) {
  const int64_t row_bytes = matrix.dim * (scalar == Scalar::kFloat32 ? 4 : 2);
  const uint64_t bits = reinterpret_cast<uintptr_t>(matrix.data) | static_cast<uint64_t>(row_bytes);
  const Access access = bits % 16 == 0 ? Access::k16 : bits % 4 == 0 ? Access::k4 : Access::k2;
  return {static_cast<const char*>(matrix.data), static_cast<int>(matrix.dim), static_cast<int>(row_bytes), access};
}

struct Device {
  int multiprocessors;
  int shared_bytes;  // a block may have
};

cudaError_t QueryDevice(Device* device) {
  int id = 0;
  cudaError_t error = cudaGetDevice(&id);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, id);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
}

using Kernel = void (*)(Params);

cudaError_t Launch(Kernel kernel, dim3 grid, int shared_bytes, bool cooperative, cudaStream_t stream,
                   const Params& params) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

cudaError_t AllowShared(Kernel kernel, int bytes) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              bytes);
}

template <Scalar kScalar, bool kCompensated, int kTile>
cudaError_t LaunchSmall(const Params& p, const Device& device, cudaStream_t stream) {
  const Kernel kernel = SmallKernel<kScalar, kCompensated, kTile>;
  const int shared_bytes = kSmallSharedBytes<kTile>;
  int resident = 0;
  cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, reinterpret_cast<const void*>(kernel),
                                                                    kThreads, shared_bytes);
  if (error != cudaSuccess) return error;
  const int64_t tiles = NumTiles(p.square, CeilDiv(p.rows, kTile), CeilDiv(p.columns, kTile)) * p.num_matrices;
  const int64_t rows = p.gradient == nullptr ? 1 : p.columns;
  const int64_t blocks = std::min(std::max(tiles, rows), static_cast<int64_t>(resident) * device.multiprocessors);
  return Launch(kernel, dim3(static_cast<unsigned>(blocks)), shared_bytes, true, stream, p);
}

// Contiguous groups of teachers of about the same total dimension.
void GroupTeachers(int groups, Params* p) {
  const int teachers = p->num_matrices - 1;
  int64_t total = 0;
  for (int k = 0; k < teachers; ++k) total += p->matrices[k + 1].dim;
  int64_t before = 0;
  int k = 0;
  for (int g = 0; g < groups; ++g) {
    // A teacher belongs where its middle lies; the last group's end is beyond every middle.
    for (; k < teachers && (2 * before + p->matrices[k + 1].dim) * groups < 2 * total * (g + 1); ++k) {
      before += p->matrices[k + 1].dim;
    }
    p->group_ends[g] = static_cast<uint8_t>(k);
  }
}

template <Scalar kScalar, bool kCompensated, int kTile>
cudaError_t LaunchLarge(Params p, const Layout& layout, const Device& device, cudaStream_t stream) {
  const unsigned teachers = p.num_matrices - 1;
  const int64_t tiles = NumTiles(p.square, CeilDiv(p.rows, kTile), CeilDiv(p.columns, kTile));
  // With few tiles, teachers go to different blocks; the student's products are then repeated, but it is small.
  const int64_t groups = std::min<int64_t>(teachers, (4 * device.multiprocessors + tiles - 1) / tiles);
  GroupTeachers(static_cast<int>(groups), &p);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(groups));
  const int shared_bytes = kLargeSharedBytes<kTile>;
  const Kernel sums = SumsKernel<kScalar, kCompensated, kTile>;
  const Kernel gradient = GradientKernel<kScalar, kCompensated, kTile>;

  cudaError_t error = cudaMemsetAsync(p.header, 0, layout.zeroed_bytes, stream);
  if (error != cudaSuccess) return error;
  error = Launch(CheckKernel<kScalar>, dim3(CeilDiv(p.columns, kWarps), p.num_matrices), 0, false, stream, p);
  if (error != cudaSuccess) return error;
  error = AllowShared(sums, shared_bytes);
  if (error != cudaSuccess) return error;
  error = Launch(sums, grid, shared_bytes, false, stream, p);
  if (error != cudaSuccess) return error;
  const dim3 normalize_grid(CeilDiv(p.rows, kThreads), p.num_matrices);
  error = Launch(NormalizeKernel, normalize_grid, kWarps * sizeof(double), false, stream, p);
  if (error != cudaSuccess) return error;
  error = Launch(FinishKernel, dim3(1), kCudaMaxTeachers * sizeof(double), false, stream, p);
  if (error != cudaSuccess || p.gradient == nullptr) return error;
  error = AllowShared(gradient, shared_bytes);
  if (error != cudaSuccess) return error;
  error = Launch(gradient, grid, shared_bytes, false, stream, p);
  if (error != cudaSuccess) return error;
  const int64_t blocks = (static_cast<int64_t>(p.columns) * p.matrices[0].dim + kThreads - 1) / kThreads;
  return Launch(ConvertKernel, dim3(static_cast<unsigned>(std::min<int64_t>(blocks, 8 * device.multiprocessors))), 0,
                false, stream, p);
}

template <Scalar kScalar, bool kCompensated>
cudaError_t LaunchPath(const Params& p, Path path, const Layout& layout, cudaStream_t stream) {
  Device device;
  const cudaError_t error = QueryDevice(&device);
  if (error != cudaSuccess) return error;
  if (path == Path::kSmall) {
    return p.columns <= kSmallColumns / 2 ? LaunchSmall<kScalar, kCompensated, 16>(p, device, stream)
                                          : LaunchSmall<kScalar, kCompensated, 32>(p, device, stream);
  }
  const bool fills_device = NumTiles(p.square, CeilDiv(p.rows, 128), CeilDiv(p.columns, 128)) >= device.multiprocessors;
  return fills_device && device.shared_bytes >= kLargeSharedBytes<128>
             ? LaunchLarge<kScalar, kCompensated, 128>(p, layout, device, stream)
             : LaunchLarge<kScalar, kCompensated, 64>(p, layout, device, stream);
}

// All but the workspace.
Params MakeParams(const Problem& problem, const Outputs& outputs) {
  Params p = {};
  p.columns = static_cast<int>(problem.columns);
  p.row_offset = static_cast<int>(problem.row_offset);
  p.rows = static_cast<int>(problem.rows);
  p.square = problem.rows == problem.columns;
  p.num_matrices = problem.num_teachers + 1;
  p.temperature = problem.temperature;
  p.weights = problem.weights;
  p.total = outputs.total;
  p.per_teacher = outputs.per_teacher;
  p.gradient = outputs.gradient;
  p.matrices[0] = Describe(problem.student, problem.scalar);
  for (int k = 0; k < problem.num_teachers; ++k) p.matrices[k + 1] = Describe(problem.teachers[k], problem.scalar);
  return p;
}

const char* Run(const Problem& problem, const CudaOptions& options, const Outputs& outputs, void* workspace,
                cudaStream_t stream, Path path) {
  Params p = MakeParams(problem, outputs);
  const Layout layout = LayOut(problem, outputs.gradient != nullptr, path, workspace, &p);
  cudaError_t error;
  switch (problem.scalar) {
    case Scalar::kFloat32:
      error = options.allow_tf32 ? LaunchPath<Scalar::kFloat32, false>(p, path, layout, stream)
                                 : LaunchPath<Scalar::kFloat32, true>(p, path, layout, stream);
      break;
    case Scalar::kFloat16:
      error = LaunchPath<Scalar::kFloat16, true>(p, path, layout, stream);
      break;
    default:
      error = LaunchPath<Scalar::kBfloat16, true>(p, path, layout, stream);
      break;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda

int64_t SimilarityKlCudaWorkspaceBytes(const Problem& problem, bool gradient) {
  cuda::Params unused = {};
  return cuda::LayOut(problem, gradient, cuda::ChoosePath(problem), nullptr, &unused).bytes;
}

const char* SimilarityKlCuda(const Problem& problem, const CudaOptions& options, const Outputs& outputs,
                             void* workspace, void* stream) {
  const char* message = cuda::Validate(problem);
  if (message != nullptr) return message;
  return cuda::Run(problem, options, outputs, workspace, static_cast<cudaStream_t>(stream), cuda::ChoosePath(problem));
}

}  // namespace s2sd
