// A C interface to the CUDA kernel, for Python's ctypes. All pointers are to device memory, except `teachers` and
// `teacher_dims`.

#include <cstdint>
#include <vector>

#include "cuda_kernel.h"

namespace {

struct Call {
  Call(int scalar, int64_t columns, int64_t row_offset, int64_t rows, int64_t dim, const void* student,
       int num_teachers, const void* const* teacher_data, const int64_t* teacher_dims, const float* temperature,
       const float* weights, int allow_tf32, int64_t kept_bytes) {
    for (int k = 0; k < num_teachers; ++k) teachers.push_back({teacher_data[k], teacher_dims[k]});
    problem = {static_cast<s2sd::Scalar>(scalar),
               columns,
               row_offset,
               rows,
               {student, dim},
               teachers.data(),
               num_teachers,
               temperature,
               weights};
    options.allow_tf32 = allow_tf32 != 0;
    options.kept_bytes = kept_bytes;
  }

  std::vector<s2sd::Matrix> teachers;
  s2sd::Problem problem;
  s2sd::CudaOptions options;
};

}  // namespace

extern "C" int64_t s2sd_workspace_bytes(int scalar, int64_t columns, int64_t row_offset, int64_t rows, int64_t dim,
                                        const void* student, int num_teachers, const void* const* teachers,
                                        const int64_t* teacher_dims, const float* temperature, const float* weights,
                                        int allow_tf32, int64_t kept_bytes) {
  const Call call(scalar, columns, row_offset, rows, dim, student, num_teachers, teachers, teacher_dims, temperature,
                  weights, allow_tf32, kept_bytes);
  return s2sd::PlanCuda(call.problem, call.options, /*gradient=*/true).workspace_bytes;
}

// Returns null, or an error message.
extern "C" const char* s2sd_run(int scalar, int64_t columns, int64_t row_offset, int64_t rows, int64_t dim,
                                const void* student, int num_teachers, const void* const* teachers,
                                const int64_t* teacher_dims, const float* temperature, const float* weights,
                                int allow_tf32, int64_t kept_bytes, float* total, float* per_teacher, float* gradient,
                                void* workspace, void* stream) {
  const Call call(scalar, columns, row_offset, rows, dim, student, num_teachers, teachers, teacher_dims, temperature,
                  weights, allow_tf32, kept_bytes);
  return s2sd::SimilarityKlCuda(call.problem, call.options, {total, per_teacher, gradient}, workspace, stream);
}
