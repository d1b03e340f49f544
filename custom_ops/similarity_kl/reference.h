// The definition in similarity_kl.h, computed step by step as a framework's graph would, with every number of type T:
// the truth with T = double, and with T = float what the kernel's error is measured against.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_REFERENCE_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_REFERENCE_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace s2sd {

struct HostProblem {
  int64_t columns;
  int64_t row_offset;
  int64_t rows;
  float temperature;
  std::vector<float> weights;
  std::vector<std::vector<float>> matrices;  // student, then teachers; `columns` rows each
};

struct HostResults {
  double total = 0;
  std::vector<double> per_teacher;
  std::vector<double> gradient;
};

// The largest difference; NaN where there is one.
inline double MaxError(const std::vector<double>& a, const std::vector<double>& b) {
  double error = 0;
  for (size_t n = 0; n < a.size(); ++n) {
    const double e = std::fabs(a[n] - b[n]);
    if (!(e <= error)) error = e;
    if (std::isnan(error)) break;
  }
  return error;
}

inline double MaxAbs(const std::vector<double>& a) { return MaxError(a, std::vector<double>(a.size(), 0)); }

// The error to allow: twice the composed computation's, and a floor, as that is sometimes next to none by luck.
struct Limits {
  double per_teacher;
  double total;
  double gradient;
};

inline Limits ErrorLimits(const HostProblem& problem, const HostResults& truth, const HostResults& composed,
                          bool allow_tf32) {
  const double t = problem.temperature;
  const double teachers = static_cast<double>(problem.weights.size());
  const double epsilon = allow_tf32 ? 5e-4 : 1.2e-7;  // of a similarity
  double weight = 0;
  for (float w : problem.weights) weight += std::fabs(w);
  // An error of epsilon in a similarity is one of T epsilon in the KL, and one of epsilon / T, relative, in P.
  const double kl_floor = epsilon * t * std::max(1.0, t);
  // The gradient is a difference of sums P z, which this bounds; it has a term a teacher.
  const double size = std::max(MaxAbs(truth.gradient), t / static_cast<double>(problem.rows) * weight);
  const double gradient_floor = epsilon * size * std::max(1.0, std::sqrt(teachers) / 2) * (allow_tf32 ? 1 / t + 2 : 1);
  return {2 * MaxError(truth.per_teacher, composed.per_teacher) + kl_floor,
          2 * std::fabs(truth.total - composed.total) + kl_floor * weight,
          2 * MaxError(truth.gradient, composed.gradient) + gradient_floor};
}

template <typename T>
HostResults Composed(const HostProblem& problem) {
  const int64_t columns = problem.columns;
  const int64_t rows = problem.rows;
  const size_t count = problem.matrices.size();
  const T t = problem.temperature;
  std::vector<std::vector<T>> log_p(count), p(count);
  for (size_t m = 0; m < count; ++m) {
    const std::vector<float>& x = problem.matrices[m];
    const int64_t dim = static_cast<int64_t>(x.size()) / columns;
    log_p[m].resize(rows * columns);
    p[m].resize(rows * columns);
    for (int64_t i = 0; i < rows; ++i) {
      T* logits = &log_p[m][i * columns];
      for (int64_t j = 0; j < columns; ++j) {
        T s = 0;
        for (int64_t d = 0; d < dim; ++d) {
          s += static_cast<T>(x[(problem.row_offset + i) * dim + d]) * static_cast<T>(x[j * dim + d]);
        }
        logits[j] = s / t;
      }
      const T max = *std::max_element(logits, logits + columns);
      T sum = 0;
      for (int64_t j = 0; j < columns; ++j) sum += std::exp(logits[j] - max);
      for (int64_t j = 0; j < columns; ++j) {
        logits[j] -= max + std::log(sum);
        p[m][i * columns + j] = std::exp(logits[j]);
      }
    }
  }
  HostResults results;
  std::vector<T> g(rows * columns, 0);
  T total = 0;
  for (size_t k = 1; k < count; ++k) {
    const T weight = problem.weights[k - 1];
    T kl = 0;
    for (int64_t n = 0; n < rows * columns; ++n) {
      kl += p[k][n] * (log_p[k][n] - log_p[0][n]);
      g[n] += t / static_cast<T>(rows) * weight * (p[0][n] - p[k][n]);
    }
    kl *= t * t / static_cast<T>(rows);
    results.per_teacher.push_back(kl);
    total += weight * kl;
  }
  results.total = total;
  const std::vector<float>& z = problem.matrices[0];
  const int64_t dim = static_cast<int64_t>(z.size()) / columns;
  std::vector<T> gradient(columns * dim, 0);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const T g_ij = g[i * columns + j];
      const int64_t row = problem.row_offset + i;
      for (int64_t d = 0; d < dim; ++d) {
        gradient[row * dim + d] += g_ij * static_cast<T>(z[j * dim + d]);
        gradient[j * dim + d] += g_ij * static_cast<T>(z[row * dim + d]);
      }
    }
  }
  results.gradient.assign(gradient.begin(), gradient.end());
  return results;
}

}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_REFERENCE_H_
