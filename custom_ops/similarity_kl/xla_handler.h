// The typed FFI handlers through which XLA calls the kernels, on the CPU and, with S2SD_TF_CUDA, on a GPU.
//
// Depends on neither TensorFlow nor JAX: both ship the one XLA header that this needs. A custom call has
//   the arguments student (B, D), K teachers (B, D_k), temperature () and weights (K),
//   the results total (), per_teacher (K) and, if wanted, gradient (B, D),
//   the attributes row_offset (int64), rows (int64) and allow_tf32 (bool), as in Problem and CudaOptions.
// Matrices are row-major. A wrong argument gives InvalidArgument, lack of memory ResourceExhausted, and a CUDA error
// Internal.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_XLA_HANDLER_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_XLA_HANDLER_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cpu_kernel.h"
#include "pool_tasks.h"
#include "similarity_kl.h"
#include "validate.h"
#include "xla/ffi/api/ffi.h"

#if S2SD_TF_CUDA
#include <cuda_runtime.h>

#include <optional>

#include "cuda_kernel.h"
#endif

namespace s2sd {

namespace ffi = ::xla::ffi;

// The data of one execution of the custom call.
struct Call {
  Problem problem;
  std::vector<Matrix> teachers;  // `problem.teachers` points here
  Outputs outputs;
};

template <typename Buffer>
Shape ShapeOf(const Buffer& buffer) {
  return Shape(buffer.dimensions().begin(), buffer.dimensions().end());
}

// Fills in `call` and makes all checks that do not depend on the platform.
inline ffi::Error ReadCall(ffi::AnyBuffer student, ffi::RemainingArgs arguments,
                           ffi::Result<ffi::BufferR0<ffi::F32>> total, ffi::Result<ffi::BufferR1<ffi::F32>> per_teacher,
                           ffi::RemainingRets gradient, int64_t row_offset, int64_t rows, Call* call) {
  Problem& problem = call->problem;
  switch (student.element_type()) {
    case ffi::F32:
      problem.scalar = Scalar::kFloat32;
      break;
    case ffi::F16:
      problem.scalar = Scalar::kFloat16;
      break;
    case ffi::BF16:
      problem.scalar = Scalar::kBfloat16;
      break;
    default:
      return ffi::Error::InvalidArgument("similarity_kl: student: expected float32, float16 or bfloat16");
  }
  if (arguments.size() < 2) {
    return ffi::Error::InvalidArgument("similarity_kl: expected student, teachers, temperature and weights");
  }
  const size_t num_teachers = arguments.size() - 2;
  ArgumentShapes shapes;
  shapes.student = ShapeOf(student);
  for (size_t k = 0; k < num_teachers; ++k) {
    const ffi::ErrorOr<ffi::AnyBuffer> teacher = arguments.get<ffi::AnyBuffer>(k);
    if (!teacher.has_value()) return teacher.error();
    if (teacher->element_type() != student.element_type()) {
      return ffi::Error::InvalidArgument("similarity_kl: teachers[" + std::to_string(k) +
                                         "]: expected the dtype of the student");
    }
    shapes.teachers.push_back(ShapeOf(*teacher));
    call->teachers.push_back({teacher->untyped_data(), shapes.teachers[k].empty() ? 0 : shapes.teachers[k].back()});
  }
  const ffi::ErrorOr<ffi::AnyBuffer> temperature = arguments.get<ffi::AnyBuffer>(num_teachers);
  if (!temperature.has_value()) return temperature.error();
  const ffi::ErrorOr<ffi::AnyBuffer> weights = arguments.get<ffi::AnyBuffer>(num_teachers + 1);
  if (!weights.has_value()) return weights.error();
  if (temperature->element_type() != ffi::F32 || weights->element_type() != ffi::F32) {
    return ffi::Error::InvalidArgument("similarity_kl: temperature and weights: expected float32");
  }
  shapes.temperature = ShapeOf(*temperature);
  shapes.weights = ShapeOf(*weights);
  std::string wrong = ValidateShapes(shapes);
  if (!wrong.empty()) return ffi::Error::InvalidArgument(std::move(wrong));

  problem.columns = shapes.student[0];
  problem.row_offset = row_offset;
  problem.rows = rows;
  problem.student = {student.untyped_data(), shapes.student[1]};
  problem.teachers = call->teachers.data();
  problem.num_teachers = static_cast<int>(num_teachers);
  problem.temperature = static_cast<const float*>(temperature->untyped_data());
  problem.weights = static_cast<const float*>(weights->untyped_data());

  call->outputs = {total->typed_data(), per_teacher->typed_data(), nullptr};
  wrong = ValidateShape("per_teacher", {problem.num_teachers}, ShapeOf(*per_teacher));
  if (gradient.size() > 0) {
    auto buffer = gradient.get<ffi::BufferR2<ffi::F32>>(0);
    if (!buffer.has_value()) return buffer.error();
    if (wrong.empty()) wrong = ValidateShape("gradient", shapes.student, ShapeOf(**buffer));
    call->outputs.gradient = (*buffer)->typed_data();
  }
  if (!wrong.empty()) return ffi::Error::InvalidArgument(std::move(wrong));
  return ffi::Error::Success();
}

// Binds what both handlers take after their platform's context.
template <typename Binding>
auto WithCall(Binding binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .template Ret<ffi::BufferR0<ffi::F32>>()
      .template Ret<ffi::BufferR1<ffi::F32>>()
      .RemainingRets()
      .template Attr<int64_t>("row_offset")
      .template Attr<int64_t>("rows")
      .template Attr<bool>("allow_tf32");
}

inline ffi::Error RunOnCpu(ffi::ThreadPool pool, ffi::AnyBuffer student, ffi::RemainingArgs arguments,
                           ffi::Result<ffi::BufferR0<ffi::F32>> total, ffi::Result<ffi::BufferR1<ffi::F32>> per_teacher,
                           ffi::RemainingRets gradient, int64_t row_offset, int64_t rows, bool /*allow_tf32*/) {
  Call call;
  ffi::Error error = ReadCall(student, arguments, total, per_teacher, gradient, row_offset, rows, &call);
  if (error.failure()) return error;
  std::string wrong = ValidateForCpu(call.problem);
  if (!wrong.empty()) return ffi::Error::InvalidArgument(std::move(wrong));
  const CpuOptions options =
      PooledCpuOptions(pool.num_threads(), [&pool](std::function<void()> run) { pool.Schedule(std::move(run)); });
  const std::string failure = SimilarityKlCpu(call.problem, options, call.outputs);
  if (failure.empty()) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "similarity_kl: " + failure);
}

inline auto CpuBinding() { return WithCall(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()); }

#if S2SD_TF_CUDA

inline ffi::Error RunOnCuda(cudaStream_t stream, ffi::ScratchAllocator scratch, ffi::AnyBuffer student,
                            ffi::RemainingArgs arguments, ffi::Result<ffi::BufferR0<ffi::F32>> total,
                            ffi::Result<ffi::BufferR1<ffi::F32>> per_teacher, ffi::RemainingRets gradient,
                            int64_t row_offset, int64_t rows, bool allow_tf32) {
  Call call;
  ffi::Error error = ReadCall(student, arguments, total, per_teacher, gradient, row_offset, rows, &call);
  if (error.failure()) return error;
  std::string wrong = ValidateForCuda(call.problem);
  if (!wrong.empty()) return ffi::Error::InvalidArgument(std::move(wrong));
  CudaOptions options;
  options.allow_tf32 = allow_tf32;
  options.kept_bytes = WorkspaceBytes();
  // XLA guarantees no alignment beyond 16 bytes.
  constexpr uintptr_t kAlignment = 256;
  const auto allocate = [&] {
    const bool with_gradient = call.outputs.gradient != nullptr;
    return scratch.Allocate(PlanCuda(call.problem, options, with_gradient).workspace_bytes + kAlignment);
  };
  std::optional<void*> memory = allocate();
  if (!memory.has_value()) {
    options.kept_bytes = 0;  // slower, but needs less memory on a device that is nearly full
    memory = allocate();
  }
  if (!memory.has_value()) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "similarity_kl: no device memory for the workspace");
  }
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(*memory) + kAlignment - 1) / kAlignment * kAlignment;
  const char* failure = SimilarityKlCuda(call.problem, options, call.outputs, reinterpret_cast<void*>(aligned), stream);
  return failure == nullptr ? ffi::Error::Success() : ffi::Error::Internal(std::string("similarity_kl: ") + failure);
}

inline auto CudaBinding() {
  return WithCall(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().Ctx<ffi::ScratchAllocator>());
}

#endif  // S2SD_TF_CUDA

}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_XLA_HANDLER_H_
