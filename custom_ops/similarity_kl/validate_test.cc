// Tests what validate.h accepts and refuses, and its messages.

#include "validate.h"

#include <cstdio>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace s2sd {
namespace {

int failures = 0;

void Expect(const std::string& got, const std::string& expected) {
  if (got == expected) return;
  ++failures;
  std::printf("FAILED: expected \"%s\", got \"%s\"\n", expected.c_str(), got.c_str());
}

void TestShapes() {
  const Shape student = {4, 3}, teacher = {4, 2}, one = {1};
  const std::string two = "Received: student (4, 3), teachers [(4, 2), ";
  Expect(ValidateShapes({student, {teacher}, {}, one}), "");
  Expect(ValidateShapes({student, {}, {}, one}),
         "similarity_kl: teachers: expected at least one teacher. Received: student (4, 3), teachers []");
  Expect(ValidateShapes({{4}, {teacher}, {}, one}),
         "similarity_kl: student: expected shape (batch, dim). Received: student (4,), teachers [(4, 2)]");
  Expect(ValidateShapes({student, {teacher, {4, 2, 1}}, {}, one}),
         "similarity_kl: teachers[1]: expected shape (batch, dim). " + two + "(4, 2, 1)]");
  Expect(ValidateShapes({student, {teacher, {5, 2}}, {}, one}),
         "similarity_kl: teachers[1]: expected the batch size of the student. " + two + "(5, 2)]");
  Expect(ValidateShapes({student, {teacher, {4, 0}}, {}, one}),
         "similarity_kl: teachers[1]: expected at least one row and one column. " + two + "(4, 0)]");
  Expect(ValidateShapes({{0, 3}, {{0, 2}}, {}, one}),
         "similarity_kl: student: expected at least one row and one column. Received: student (0, 3), teachers [(0, "
         "2)]");
  Expect(ValidateShapes({student, {teacher}, one, one}),
         "similarity_kl: temperature: expected a scalar. Received: shape (1,)");
  Expect(ValidateShapes({student, {teacher}, {}, {}}),
         "similarity_kl: weights: expected 1 weights, one per teacher. Received: shape ()");
  Expect(ValidateShapeOfRows({2}), "");
  Expect(ValidateShapeOfRows({3}), "similarity_kl: rows: expected (offset, count). Received: shape (3,)");
  Expect(ValidateShape("gradient", student, student), "");
  Expect(ValidateShape("gradient", student, teacher),
         "similarity_kl: gradient: expected shape (4, 3). Received: (4, 2)");
}

void TestProblems() {
  constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();
  float temperature = 1;
  std::vector<Matrix> teachers(kCudaMaxTeachers + 1, Matrix{nullptr, 2});
  const Problem good = {Scalar::kFloat32, 4, 1, 3, {nullptr, 3}, teachers.data(), 1, &temperature, nullptr};
  Expect(ValidateForCpu(good), "");
  Expect(ValidateForCuda(good), "");

  const std::vector<std::pair<int64_t, int64_t>> ranges = {{-1, 2}, {0, 0},        {0, 5},       {2, 3},
                                                           {5, 1},  {1, kLargest}, {kLargest, 1}};
  for (const auto& range : ranges) {
    Problem problem = good;
    problem.row_offset = range.first;
    problem.rows = range.second;
    const std::string received = "(" + std::to_string(range.first) + ", " + std::to_string(range.second) + ")";
    const std::string message =
        "similarity_kl: rows: expected offset >= 0, count >= 1 and offset + count <= 4. Received: " + received;
    Expect(ValidateForCpu(problem), message);
    Expect(ValidateForCuda(problem), message);
  }
  for (float wrong : {0.0f, -1.0f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    temperature = wrong;
    Expect(ValidateForCpu(good),
           "similarity_kl: temperature: expected a finite number > 0. Received: " + std::to_string(wrong));
    Expect(ValidateForCuda(good), "");  // device memory is not read
  }
  temperature = 1;

  Problem most = good;
  most.columns = most.rows = kCudaMaxColumns;
  most.row_offset = 0;
  most.student.dim = kCudaMaxDim;
  Expect(ValidateForCuda(most), "");
  ++most.student.dim;
  Expect(ValidateForCpu(most), "");
  Expect(ValidateForCuda(most),
         "similarity_kl: student: expected at most 4194304 columns on a GPU. Received: student (131072, 4194305), "
         "teachers [(131072, 2)]");
  ++most.columns;
  Expect(ValidateForCuda(most),
         "similarity_kl: student: expected at most 131072 rows on a GPU. Received: student (131073, 4194305), teachers "
         "[(131073, 2)]");
  Problem many = good;
  many.num_teachers = kCudaMaxTeachers;
  Expect(ValidateForCuda(many), "");
  ++many.num_teachers;
  Expect(ValidateForCpu(many), "");
  Expect(ValidateForCuda(many), "similarity_kl: teachers: expected at most 64 on a GPU. Received: 65");
}

}  // namespace
}  // namespace s2sd

int main() {
  s2sd::TestShapes();
  s2sd::TestProblems();
  if (s2sd::failures == 0) std::printf("all passed\n");
  return s2sd::failures != 0;
}
