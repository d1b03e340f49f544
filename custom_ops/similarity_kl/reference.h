// Computes the definition in similarity_kl.h step by step, as a framework's graph would, with every number of type T.
// T = double gives the truth; T = float gives the error that the kernel's error is compared with. `tf32` rounds the
// factors of every matrix product to TF32 first, as a framework does if it is allowed to.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_REFERENCE_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_REFERENCE_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
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

// The largest difference, or NaN if any is NaN.
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

// The allowed errors: twice the composed computation's, plus a floor, because that is sometimes near zero by luck.
struct Limits {
  double per_teacher;
  double total;
  double gradient;
};

inline Limits ErrorLimits(const HostProblem& problem, const HostResults& truth, const HostResults& composed) {
  const double t = problem.temperature;
  const double teachers = static_cast<double>(problem.weights.size());
  double longest = 1;  // squared norm
  for (const std::vector<float>& matrix : problem.matrices) {
    const int64_t dim = static_cast<int64_t>(matrix.size()) / problem.columns;
    for (int64_t i = 0; i < problem.columns; ++i) {
      double norm = 0;
      for (int64_t d = 0; d < dim; ++d) norm += double{matrix[i * dim + d]} * matrix[i * dim + d];
      longest = std::max(longest, norm);
    }
  }
  const double epsilon = 1.2e-7 * longest;  // of a similarity
  double weight = 0;
  for (float w : problem.weights) weight += std::fabs(w);
  // An error of epsilon in a similarity causes one of T epsilon in the KL and a relative one of epsilon / T in P.
  // Why 4: a GPU's exponentials have relative errors of up to 2^-22, and a divergence has the logarithms of two.
  const double kl_floor = 4 * epsilon * t * std::max(1.0, t);
  // The gradient is a difference of sums P z, which this bounds, and has one term per teacher.
  const double size = std::max(MaxAbs(truth.gradient), t / static_cast<double>(problem.rows) * weight);
  const double gradient_floor = epsilon * size * std::max(1.0, std::sqrt(teachers) / 2);
  return {2 * MaxError(truth.per_teacher, composed.per_teacher) + kl_floor,
          2 * std::fabs(truth.total - composed.total) + kl_floor * weight,
          2 * MaxError(truth.gradient, composed.gradient) + gradient_floor};
}

// Rounds to nearest, halves away from zero.
inline float RoundToTf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x1000u) & 0xffffe000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <typename T>
HostResults Composed(const HostProblem& problem, bool tf32 = false) {
  const auto factor = [tf32](T x) { return tf32 ? static_cast<T>(RoundToTf32(static_cast<float>(x))) : x; };
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
          s += factor(x[(problem.row_offset + i) * dim + d]) * factor(x[j * dim + d]);
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
      const T g_ij = factor(g[i * columns + j]);
      const int64_t row = problem.row_offset + i;
      for (int64_t d = 0; d < dim; ++d) {
        gradient[row * dim + d] += g_ij * factor(z[j * dim + d]);
        gradient[j * dim + d] += g_ij * factor(z[row * dim + d]);
      }
    }
  }
  results.gradient.assign(gradient.begin(), gradient.end());
  return results;
}

}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_REFERENCE_H_
