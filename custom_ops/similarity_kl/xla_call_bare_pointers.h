// How TensorFlow 2.15 makes XLA call the CPU kernel: with bare pointers and a string that holds the sizes.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_XLA_CALL_BARE_POINTERS_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_XLA_CALL_BARE_POINTERS_H_

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cpu_kernel.h"
#include "pool_tasks.h"
#include "similarity_kl.h"
#include "tensorflow/core/platform/env.h"
#include "tensorflow/core/platform/threadpool.h"
#include "xla/client/xla_builder.h"
#include "xla/service/custom_call_status_internal.h"
#include "xla/service/custom_call_target_registry.h"

#if S2SD_TF_CUDA
#error "S2sd>SimilarityKl on a GPU inside XLA needs the typed FFI of TensorFlow 2.20."
#endif

namespace s2sd {

// XLA's registries of custom calls are shared by the whole process, hence the long name.
constexpr char kTarget[] = "s2sd_tf_similarity_kl";
constexpr xla::CustomCallApiVersion kApiVersion = xla::CustomCallApiVersion::API_VERSION_STATUS_RETURNING_UNIFIED;

// The numbers in a custom call's string, in this order. The teachers' dimensions come last.
enum CallNumber { kScalar, kColumns, kRowOffset, kRows, kStudentDim, kGradient, kNumThreads, kTeacherDims };

inline std::string CallText(const Problem& problem, bool compute_gradient, bool /*allow_tf32*/, int num_threads) {
  int64_t numbers[kTeacherDims];
  numbers[kScalar] = static_cast<int64_t>(problem.scalar);
  numbers[kColumns] = problem.columns;
  numbers[kRowOffset] = problem.row_offset;
  numbers[kRows] = problem.rows;
  numbers[kStudentDim] = problem.student.dim;
  numbers[kGradient] = compute_gradient;
  numbers[kNumThreads] = num_threads;
  std::string text;
  for (int64_t number : numbers) absl::StrAppend(&text, number, " ");
  for (int k = 0; k < problem.num_teachers; ++k) absl::StrAppend(&text, problem.teachers[k].dim, " ");
  return text;
}

// This interface gives a custom call no threads. These are as many as TensorFlow's own, which wait meanwhile. They live
// as long as the process, because a call may come at any time.
inline tensorflow::thread::ThreadPool* Threads(int num_threads) {
  static auto* pool =
      new tensorflow::thread::ThreadPool(tensorflow::Env::Default(), "s2sd_tf", std::max(num_threads - 1, 1));
  return pool;
}

inline void RunOnCpu(void* result, const void** arguments, const char* text, size_t text_size,
                     XlaCustomCallStatus* status) {
  std::vector<int64_t> numbers;
  const char* end = text + text_size;
  for (const char* at = text; at < end; ++at) {
    int64_t number = 0;
    at = std::from_chars(at, end, number).ptr;
    numbers.push_back(number);
  }

  const int num_teachers = static_cast<int>(numbers.size()) - kTeacherDims;
  std::vector<Matrix> teachers;
  for (int k = 0; k < num_teachers; ++k) teachers.push_back({arguments[1 + k], numbers[kTeacherDims + k]});
  const Problem problem{static_cast<Scalar>(numbers[kScalar]),
                        numbers[kColumns],
                        numbers[kRowOffset],
                        numbers[kRows],
                        {arguments[0], numbers[kStudentDim]},
                        teachers.data(),
                        num_teachers,
                        static_cast<const float*>(arguments[1 + num_teachers]),
                        static_cast<const float*>(arguments[2 + num_teachers])};
  float** results = static_cast<float**>(result);
  const Outputs outputs{results[0], results[1], numbers[kGradient] ? results[2] : nullptr};

  const int num_threads = static_cast<int>(numbers[kNumThreads]);
  const CpuOptions options = PooledCpuOptions(
      num_threads, [num_threads](std::function<void()> run) { Threads(num_threads)->Schedule(std::move(run)); });
  std::string message = SimilarityKlCpu(problem, options, outputs);
  // The wheel declares XlaCustomCallStatusSetFailure but does not export it.
  if (!message.empty()) status->message = std::move(message);
}

XLA_REGISTER_CUSTOM_CALL_TARGET_WITH_SYM(kTarget, RunOnCpu, "Host");

}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_XLA_CALL_BARE_POINTERS_H_
