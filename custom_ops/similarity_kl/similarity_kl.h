// What the op computes. Depends on neither TensorFlow nor CUDA.
//
// With S(a) = a a^T and P(a) the row-wise softmax of S(a) / T, for the rows i in [row_offset, row_offset + rows):
//
//   KL_k = T^2 / rows * sum_ij P(q_k)_ij * (log P(q_k)_ij - log P(z)_ij)        (S2SD, arXiv 2009.08348, section 3)
//   total = sum_k w_k KL_k
//
// and the derivative of total with respect to every row of z, both as row i and as column j of S(z):
//
//   d total / d z_i = sum_j (G_ij + G_ji) z_j,   G_ij = T / rows * sum_k w_k (P(z)_ij - P(q_k)_ij) for these rows i,
//   else 0

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_SIMILARITY_KL_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_SIMILARITY_KL_H_

#include <cstdint>

namespace s2sd {

enum class Scalar { kFloat32, kFloat16, kBfloat16 };

constexpr int64_t ScalarBytes(Scalar scalar) { return scalar == Scalar::kFloat32 ? 4 : 2; }

// `Problem::columns` rows of `dim` scalars, row-major, no gaps.
struct Matrix {
  const void* data;
  int64_t dim;
};

// Pointers are to host memory for the CPU kernel and to device memory for the CUDA kernel. `teachers` itself is always
// a host array.
struct Problem {
  Scalar scalar;
  int64_t columns;     // B, at least 1
  int64_t row_offset;  // 0 <= row_offset, row_offset + rows <= columns
  int64_t rows;        // at least 1; equal to `columns` in the square form
  Matrix student;
  const Matrix* teachers;
  int num_teachers;          // K, at least 1
  const float* temperature;  // one number, T > 0
  const float* weights;      // K numbers
};

// The student for 0, teacher `matrix` - 1 otherwise.
inline const Matrix& MatrixOf(const Problem& problem, int matrix) {
  return matrix == 0 ? problem.student : problem.teachers[matrix - 1];
}

// The default size, in both kernels, of the workspace for what the first pass keeps for the second.
constexpr int64_t kDefaultWorkspaceBytes = int64_t{256} << 20;

struct Outputs {
  float* total;        // one number
  float* per_teacher;  // K numbers
  float* gradient;     // (columns, student.dim), or null if no gradient is wanted
};

}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_SIMILARITY_KL_H_
