// Sums over the columns of the similarity matrices, and what follows from them: the loss and the gradient's factors.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_ROW_SUMS_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_ROW_SUMS_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu_schedule.h"
#include "cpu_simd.h"
#include "similarity_kl.h"

namespace s2sd {

// What one tile adds to its rows' sums and, for its mirror image, to its columns' sums: z sums the exponentials, a sums
// exponential * (logit - student's logit).
struct TileSums {
  TileSums(float* floats, int64_t tile)
      : row_z(floats), row_a(floats + tile), column_z(floats + 2 * tile), column_a(floats + 3 * tile) {}
  static int64_t Floats(int64_t tile) { return 4 * tile; }

  float *row_z, *row_a, *column_z, *column_a;
};

// If a normaliser is within these bounds, no exponential overflowed float32 and the largest did not underflow.
constexpr double kSmallestZ = 1e-13, kLargestZ = 1e30;

// The sums over all tiles for every row of the similarity matrices, and the gradient's factors that follow from them.
struct RowSums {
  RowSums(int64_t rows, int teachers)
      : stride(RoundUp(rows, kTileGranularity)),
        z((teachers + 1) * stride),
        a(teachers * stride),
        factors(2 * teachers * stride) {}

  void Clear() {
    std::fill(z.begin(), z.end(), 0);
    std::fill(a.begin(), a.end(), 0);
  }

  // Adds a tile's sums for `count` rows of `matrix` from `first` on.
  void Add(int matrix, int64_t first, int count, const float* tile_z, const float* tile_a) {
    double* to_z = Z(matrix) + first;
    for (int i = 0; i < count; ++i) to_z[i] += tile_z[i];
    if (matrix == 0) return;
    double* to_a = A(matrix - 1) + first;
    for (int i = 0; i < count; ++i) to_a[i] += tile_a[i];
  }

  double* Z(int matrix) { return z.data() + matrix * stride; }
  double* A(int teacher) { return a.data() + teacher * stride; }
  float* OwnFactors(int teacher) { return factors.data() + 2 * teacher * stride; }
  float* StudentFactors(int teacher) { return OwnFactors(teacher) + stride; }

  int64_t stride;
  std::vector<double> z;       // of every matrix
  std::vector<double> a;       // of every teacher
  std::vector<float> factors;  // of every teacher; see Factors
};

// The shifts of all exponentials.
struct LogitShifts {
  const float* constants;  // of every matrix
  const float* maxima;     // null, or every row's own, used instead of the constants: (matrices, RowSums::stride)

  double Of(int matrix, int64_t row, int64_t stride) const {
    return maxima ? maxima[matrix * stride + row] : constants[matrix];
  }
};

// Computes, from the sums of the rows [first, last), the sum of every teacher's divergences (into `divergences`) and
// the factors of the gradient's exponentials. Returns whether all normalisers are within the bounds.
//
// For each teacher, a row's weights G add up to 0. A rounding error in that sum would add the mean of all rows to the
// gradient, so the student's factors are computed from the teachers' rounded ones.
inline bool Normalise(const Problem& problem, const LogitShifts& shifts, int64_t first, int64_t last, RowSums& sums,
                      double* divergences) {
  const double temperature = *problem.temperature, scale = temperature / problem.rows;
  bool in_range = true;
  // The sum of log Z over the rows. A product of eight needs one logarithm and stays within the range of float64.
  const auto log_z = [&](int matrix) {
    const double* z = sums.Z(matrix);
    double shift = 0, logs = 0;
    for (int64_t begin = first; begin < last; begin += 8) {
      double product = 1;
      for (int64_t row = begin; row < std::min(begin + 8, last); ++row) {
        in_range = in_range && z[row] > kSmallestZ && z[row] < kLargestZ;
        shift += shifts.Of(matrix, row, sums.stride);
        product *= z[row];
      }
      logs += std::log(product);
    }
    return logs + shift / temperature;
  };
  // The logits in the sums A are shifted by the constants or not at all.
  const auto logit_shift = [&](int matrix) {
    return shifts.maxima ? 0 : double{shifts.constants[matrix]} / temperature;
  };
  const double student_log_z = log_z(0);
  const double* student_z = sums.Z(0);
  for (int k = 0; k < problem.num_teachers; ++k) {
    const double* z = sums.Z(k + 1);
    const double* a = sums.A(k);
    float* own = sums.OwnFactors(k);
    float* students = sums.StudentFactors(k);
    double sum = (last - first) * (logit_shift(k + 1) - logit_shift(0)) - log_z(k + 1) + student_log_z;
    for (int64_t row = first; row < last; ++row) {
      sum += a[row] / z[row];
      own[row] = -scale * problem.weights[k] / z[row];
      students[row] = -double{own[row]} * z[row] / student_z[row];
    }
    divergences[k] = sum;
  }
  return in_range;
}

// Writes the loss from the `divergences` that `Normalise` found, (blocks, teachers).
inline void WriteLoss(const Problem& problem, const std::vector<double>& divergences, const Outputs& outputs) {
  const double scale = double{*problem.temperature} * *problem.temperature / problem.rows;
  double total = 0;
  for (int k = 0; k < problem.num_teachers; ++k) {
    double sum = 0;
    for (size_t at = k; at < divergences.size(); at += problem.num_teachers) sum += divergences[at];
    outputs.per_teacher[k] = scale * sum;
    total += problem.weights[k] * scale * sum;
  }
  *outputs.total = total;
}

}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_ROW_SUMS_H_
