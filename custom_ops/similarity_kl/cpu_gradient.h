// Multiplies the gradient's weights with the student's rows.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_GRADIENT_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_GRADIENT_H_

#include <algorithm>
#include <cstdint>

#include "cpu_schedule.h"
#include "cpu_simd.h"
#include "similarity_kl.h"

namespace s2sd {

constexpr int64_t kGradientWidth = 192;  // columns of the student that are multiplied at a time

class GradientProducts {
 public:
  GradientProducts(const Problem& problem, const SimdKernels& kernels) : problem_(problem), kernels_(kernels) {}

  // product = weights (or transposed weights) * the student's rows from `student_row` on, for up to kGradientWidth
  // columns from `begin` on. Returns the product's row stride in floats. `packed` has room for that many columns of the
  // student's rows.
  int operator()(const Tile& weights, bool transpose, int64_t student_row, int64_t begin, float* packed,
                 float* product) const {
    const int64_t dim = problem_.student.dim;
    const int depth = transpose ? weights.rows : weights.columns;
    const int panels = DivideUp(std::min(kGradientWidth, dim - begin), kernels_.width);
    if (problem_.scalar == Scalar::kFloat32 && dim % kernels_.width == 0) {
      const float* student = static_cast<const float*>(problem_.student.data) + student_row * dim + begin;
      kernels_.multiply(weights, transpose, student, kernels_.width, dim, panels, product);
    } else {
      kernels_.pack_rows(
          problem_.scalar,
          static_cast<const char*>(problem_.student.data) + student_row * dim * ScalarBytes(problem_.scalar), dim,
          depth, begin, panels, packed);
      kernels_.multiply(weights, transpose, packed, int64_t{depth} * kernels_.width, kernels_.width, panels, product);
    }
    return panels * kernels_.width;
  }

 private:
  const Problem& problem_;
  const SimdKernels& kernels_;
};

}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_GRADIENT_H_
