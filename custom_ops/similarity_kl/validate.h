// Checks of the op's arguments, for TensorFlow's op, XLA and the kernels. Depends on neither TensorFlow nor CUDA.
//
// Every function returns an empty string, or a message of the form "similarity_kl: name: expected .... Received: ....".
// Python's `similarity_kl`, which checks its arguments earlier and also for the composed version, uses the same words.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_VALIDATE_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_VALIDATE_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "similarity_kl.h"

namespace s2sd {

// The CUDA kernels' limits, which are also in s2sd_tf/distillation/fused.py.
constexpr int kCudaMaxTeachers = 64;
constexpr int64_t kCudaMaxColumns = int64_t{1} << 17;
constexpr int kCudaMaxDim = 1 << 22;

using Shape = std::vector<int64_t>;

// The arguments' shapes as received, of any rank.
struct ArgumentShapes {
  Shape student;
  std::vector<Shape> teachers;
  Shape temperature;
  Shape weights;
};

namespace validate_internal {

// "(4, 3)", "(4,)", "()".
inline std::string Text(const Shape& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

inline std::string Text(const Shape& student, const std::vector<Shape>& teachers) {
  std::string text = "student " + Text(student) + ", teachers [";
  for (size_t k = 0; k < teachers.size(); ++k) text += (k == 0 ? "" : ", ") + Text(teachers[k]);
  return text + "]";
}

inline std::string Message(const std::string& name, const std::string& expected, const std::string& received) {
  return "similarity_kl: " + name + ": expected " + expected + ". Received: " + received;
}

inline std::string TeacherName(size_t k) { return "teachers[" + std::to_string(k) + "]"; }

inline ArgumentShapes ShapesOf(const Problem& problem) {
  ArgumentShapes shapes;
  shapes.student = {problem.columns, problem.student.dim};
  for (int k = 0; k < problem.num_teachers; ++k) shapes.teachers.push_back({problem.columns, problem.teachers[k].dim});
  shapes.weights = {problem.num_teachers};
  return shapes;
}

}  // namespace validate_internal

inline std::string ValidateShapes(const ArgumentShapes& shapes) {
  using namespace validate_internal;  // NOLINT
  const auto matrices = [&] { return Text(shapes.student, shapes.teachers); };
  if (shapes.teachers.empty()) return Message("teachers", "at least one teacher", matrices());
  for (size_t m = 0; m <= shapes.teachers.size(); ++m) {
    const Shape& shape = m == 0 ? shapes.student : shapes.teachers[m - 1];
    const std::string name = m == 0 ? "student" : TeacherName(m - 1);
    if (shape.size() != 2) return Message(name, "shape (batch, dim)", matrices());
    if (shape[0] != shapes.student[0]) return Message(name, "the batch size of the student", matrices());
    if (shape[0] < 1 || shape[1] < 1) return Message(name, "at least one row and one column", matrices());
  }
  if (!shapes.temperature.empty()) return Message("temperature", "a scalar", "shape " + Text(shapes.temperature));
  if (shapes.weights != Shape{static_cast<int64_t>(shapes.teachers.size())}) {
    return Message("weights", std::to_string(shapes.teachers.size()) + " weights, one per teacher",
                   "shape " + Text(shapes.weights));
  }
  return "";
}

inline std::string ValidateShape(const std::string& name, const Shape& expected, const Shape& received) {
  using namespace validate_internal;  // NOLINT
  return received == expected ? "" : Message(name, "shape " + Text(expected), Text(received));
}

// Checks the tensor that holds the row offset and the row count.
inline std::string ValidateShapeOfRows(const Shape& shape) {
  using namespace validate_internal;  // NOLINT
  return shape == Shape{2} ? "" : Message("rows", "(offset, count)", "shape " + Text(shape));
}

// All checks that do not read the data behind the pointers.
inline std::string ValidateSizes(const Problem& problem) {
  using namespace validate_internal;  // NOLINT
  const std::string wrong = ValidateShapes(ShapesOf(problem));
  if (!wrong.empty()) return wrong;
  const int64_t offset = problem.row_offset, count = problem.rows, columns = problem.columns;
  if (offset < 0 || count < 1 || offset > columns || count > columns - offset) {
    return Message("rows", "offset >= 0, count >= 1 and offset + count <= " + std::to_string(columns),
                   "(" + std::to_string(offset) + ", " + std::to_string(count) + ")");
  }
  return "";
}

inline std::string ValidateForCpu(const Problem& problem) {
  using namespace validate_internal;  // NOLINT
  const std::string wrong = ValidateSizes(problem);
  if (!wrong.empty()) return wrong;
  const float temperature = *problem.temperature;
  if (temperature > 0 && !std::isinf(temperature)) return "";
  return Message("temperature", "a finite number > 0", std::to_string(temperature));
}

// The temperature is in device memory and is not checked here: if it is invalid, the outputs are NaN.
inline std::string ValidateForCuda(const Problem& problem) {
  using namespace validate_internal;  // NOLINT
  const std::string wrong = ValidateSizes(problem);
  if (!wrong.empty()) return wrong;
  const auto matrices = [&] {
    const ArgumentShapes shapes = ShapesOf(problem);
    return Text(shapes.student, shapes.teachers);
  };
  if (problem.num_teachers > kCudaMaxTeachers) {
    return Message("teachers", "at most " + std::to_string(kCudaMaxTeachers) + " on a GPU",
                   std::to_string(problem.num_teachers));
  }
  if (problem.columns > kCudaMaxColumns) {
    return Message("student", "at most " + std::to_string(kCudaMaxColumns) + " rows on a GPU", matrices());
  }
  for (int m = 0; m <= problem.num_teachers; ++m) {
    const int64_t dim = MatrixOf(problem, m).dim;
    const std::string name = m == 0 ? "student" : TeacherName(m - 1);
    if (dim > kCudaMaxDim) {
      return Message(name, "at most " + std::to_string(kCudaMaxDim) + " columns on a GPU", matrices());
    }
  }
  return "";
}

}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_VALIDATE_H_
