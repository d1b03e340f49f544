// Tests the CPU kernel on randomised problems against loops in double precision. Uses neither TensorFlow nor a test
// framework, so that it runs wherever a C++ compiler does, also under sanitizers.
//
//   cpu_kernel_test [cases] [seed]

#include "cpu_kernel.h"

#include <algorithm>
#include <chrono>  // NOLINT
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "reference.h"

namespace s2sd {
namespace {

int failures = 0;
double largest = 0;  // error, in tolerances

void Expect(bool condition, const std::string& what) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

// ---- Problems ----

float FromHalf(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const double magnitude = exponent == 0    ? std::ldexp(mantissa, -24)
                           : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                            : std::ldexp(1024 + mantissa, exponent - 25);
  return half & 0x8000 ? -magnitude : magnitude;
}

uint16_t ToHalf(float value) {  // the nearest, by search: slow, but independent of the kernel's conversion
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  uint16_t low = 0, high = 0x7BFF;
  while (low < high) {
    const uint16_t middle = (low + high + 1) / 2;
    if (FromHalf(middle) <= magnitude)
      low = middle;
    else
      high = middle - 1;
  }
  if (low < 0x7BFF && FromHalf(low + 1) - magnitude < magnitude - FromHalf(low)) ++low;
  return sign | low;
}

float FromBfloat(uint16_t bfloat) {
  const uint32_t bits = uint32_t{bfloat} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint16_t ToBfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

struct Data {
  int64_t dim;
  std::vector<float> exact;   // the scalars' values
  std::vector<char> scalars;  // exactly as long as needed, so that a sanitizer sees reads beyond the end

  Matrix matrix() const { return {scalars.data(), dim}; }
};

Data Store(Scalar scalar, int64_t dim, const std::vector<float>& values) {
  Data data{dim, {}, {}};
  data.scalars.resize(values.size() * (scalar == Scalar::kFloat32 ? 4 : 2));
  for (size_t i = 0; i < values.size(); ++i) {
    if (scalar == Scalar::kFloat32) {
      std::memcpy(&data.scalars[4 * i], &values[i], 4);
      data.exact.push_back(values[i]);
      continue;
    }
    const uint16_t bits = scalar == Scalar::kFloat16 ? ToHalf(values[i]) : ToBfloat(values[i]);
    std::memcpy(&data.scalars[2 * i], &bits, 2);
    data.exact.push_back(scalar == Scalar::kFloat16 ? FromHalf(bits) : FromBfloat(bits));
  }
  return data;
}

enum class Rows { kUnit, kEqual, kDuplicates, kAnyLength };

std::vector<float> MakeRows(std::mt19937& random, int64_t count, int64_t dim, Rows kind) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count * dim);
  for (int64_t i = 0; i < count; ++i) {
    float* row = &values[i * dim];
    const int64_t like = kind == Rows::kEqual ? 0 : kind == Rows::kDuplicates ? i / 2 : i;
    double square = 0;
    for (int64_t c = 0; c < dim; ++c) {
      row[c] = like < i ? values[like * dim + c] : normal(random);
      square += double{row[c]} * row[c];
    }
    if (like < i) continue;
    const double length = kind == Rows::kAnyLength ? std::exp(2 * normal(random)) : 1;
    for (int64_t c = 0; c < dim; ++c) row[c] *= length / std::sqrt(square);
  }
  return values;
}

struct Case {
  Scalar scalar = Scalar::kFloat32;
  int64_t columns = 1, row_offset = 0, rows = 1;
  float temperature = 1;
  Data student;
  std::vector<Data> teachers;
  std::vector<float> weights;
  std::string name;

  Problem problem(std::vector<Matrix>& storage) const {
    storage.clear();
    for (const Data& teacher : teachers) storage.push_back(teacher.matrix());
    return {scalar,
            columns,
            row_offset,
            rows,
            student.matrix(),
            storage.data(),
            static_cast<int>(storage.size()),
            &temperature,
            weights.data()};
  }
};

Case MakeCase(std::mt19937& random, int64_t columns, Rows kind) {
  const auto pick = [&](std::vector<double> from) { return from[random() % from.size()]; };
  Case c;
  c.scalar = static_cast<Scalar>(random() % 3);
  c.columns = c.rows = columns;
  if (random() % 3 == 0) {
    c.rows = 1 + random() % columns;
    c.row_offset = random() % (columns - c.rows + 1);
  }
  c.temperature = pick({0.05, 0.2, 1, 4});
  const int64_t dim = pick({1, 2, 7, 31, 128, 200, 401});
  c.student = Store(c.scalar, dim, MakeRows(random, columns, dim, kind));
  const int teachers = pick({1, 2, 5, 8});
  for (int k = 0; k < teachers; ++k) {
    const int64_t teacher_dim = pick({1, 7, 16, 33, 193, 512});
    c.teachers.push_back(Store(c.scalar, teacher_dim, MakeRows(random, columns, teacher_dim, kind)));
    c.weights.push_back(pick({0, 0.25, 1, 3}));
  }
  char name[160];
  std::snprintf(name, sizeof(name), "scalar %d, kind %d, columns %ld, rows %ld at %ld, dim %ld, %d teachers, T %g",
                int(c.scalar), int(kind), long(columns), long(c.rows), long(c.row_offset), long(dim), teachers,
                c.temperature);
  c.name = name;
  return c;
}

// ---- The reference ----

HostResults Reference(const Case& c) {
  HostProblem problem{c.columns, c.row_offset, c.rows, c.temperature, c.weights, {c.student.exact}};
  for (const Data& teacher : c.teachers) problem.matrices.push_back(teacher.exact);
  return Composed<double>(problem);
}

// ---- The kernel ----

void RunTasks(int count, const std::function<void(int)>& task) {
  std::vector<std::thread> threads;
  for (int i = 1; i < count; ++i) threads.emplace_back(task, i);
  task(0);
  for (std::thread& thread : threads) thread.join();
}

struct Floats {
  float total = -1;
  std::vector<float> per_teacher, gradient;
  bool operator==(const Floats& other) const {
    return total == other.total && per_teacher == other.per_teacher && gradient == other.gradient;
  }
};

Floats Compute(const Case& c, CpuOptions options, bool gradient = true) {
  if (!options.run_tasks) options.run_tasks = RunTasks;
  Floats result;
  result.per_teacher.resize(c.teachers.size());
  if (gradient) result.gradient.assign(c.columns * c.student.dim, NAN);
  std::vector<Matrix> storage;
  const std::string error =
      SimilarityKlCpu(c.problem(storage), options,
                      {&result.total, result.per_teacher.data(), gradient ? result.gradient.data() : nullptr});
  Expect(error.empty(), c.name + ": " + error);
  return result;
}

double Difference(const std::vector<float>& got, const std::vector<double>& expected) {
  double most = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double difference = std::fabs(got[i] - expected[i]);
    if (!(difference <= most)) most = std::isnan(difference) ? INFINITY : difference;
  }
  return most;
}

void CheckCase(const Case& c, std::mt19937& random, double scale) {
  const HostResults expected = Reference(c);
  // Logits are accurate to 6e-8 (float32) of the largest, and a divergence scales with T^2.
  const double weights = 1 + std::fabs(expected.total);
  const double loss_tolerance = 4e-6 * scale * std::max(c.temperature, 1.0f) * weights;
  const double gradient_tolerance = 4e-6 * scale * std::max(1.0f, 1 / c.temperature) * weights;
  for (int simd = 0; simd <= static_cast<int>(BestSimd()); ++simd) {
    CpuOptions options;
    options.simd = static_cast<Simd>(simd);
    options.num_threads = 1 + random() % 4;
    options.workspace_bytes = std::vector<int64_t>{0, 200000, kDefaultWorkspaceBytes}[random() % 3];
    const Floats got = Compute(c, options);
    const std::string name = c.name + ", " + SimdName(options.simd) + ", " + std::to_string(options.num_threads) +
                             " threads, workspace " + std::to_string(options.workspace_bytes);
    const double loss = std::max(Difference(got.per_teacher, expected.per_teacher),
                                 std::fabs(got.total - expected.total) / 10);  // for up to 8 teachers of weight 3
    const double gradient = Difference(got.gradient, expected.gradient);
    largest = std::max({largest, loss / loss_tolerance, gradient / gradient_tolerance});
    Expect(loss <= loss_tolerance, name + ": loss off by " + std::to_string(loss / loss_tolerance) + " tolerances");
    Expect(gradient <= gradient_tolerance,
           name + ": gradient off by " + std::to_string(gradient / gradient_tolerance) + " tolerances");
    Expect(Compute(c, options) == got, name + ": a second run differs");
    const Floats loss_only = Compute(c, options, false);
    Expect(loss_only.total == got.total && loss_only.per_teacher == got.per_teacher,
           name + ": differs without gradient");
  }
}

// ---- The tests ----

void TestRandomised(int cases, unsigned seed) {
  std::mt19937 random(seed);
  // Up to 128 rows are multiplied unpacked, and up to 192 all at once.
  const std::vector<int64_t> sizes = {1,  2,  3,   15,  16,  17,  41,  47,  48,  49,
                                      95, 97, 112, 145, 127, 129, 192, 193, 257, 401};
  for (int i = 0; i < cases; ++i) {
    const int64_t columns = sizes[random() % (i % 8 ? sizes.size() - 6 : sizes.size())];
    const Rows kind = static_cast<Rows>(random() % 3);
    CheckCase(MakeCase(random, columns, kind), random, 1);
  }
  std::printf("randomised: %d cases, largest error %.2f tolerances\n", cases, largest);
}

void TestAnyLength(int cases, unsigned seed) {
  std::mt19937 random(seed);
  for (int i = 0; i < cases; ++i) {
    Case c = MakeCase(random, 2 + random() % 120, Rows::kAnyLength);
    double longest = 1;
    for (int64_t row = 0; row < c.columns; ++row) {
      const auto squares = [&](const Data& data) {
        double square = 0;
        for (int64_t d = 0; d < data.dim; ++d)
          square += double{data.exact[row * data.dim + d]} * data.exact[row * data.dim + d];
        return square;
      };
      longest = std::max(longest, squares(c.student));
      for (const Data& teacher : c.teachers) longest = std::max(longest, squares(teacher));
    }
    CheckCase(c, random, longest * longest * std::max(1.0f, 1 / c.temperature));
  }
  std::printf("rows of any length: %d cases\n", cases);
}

// The result does not depend on which task begins first, or on whether they overlap.
void TestTaskOrder() {
  const std::vector<std::function<void(int, const std::function<void(int)>&)>> orders = {
      [](int count, const std::function<void(int)>& task) {
        for (int i = 0; i < count; ++i) task(i);
      },
      [](int count, const std::function<void(int)>& task) {
        for (int i = count - 1; i >= 0; --i) task(i);
      },
      [](int count, const std::function<void(int)>& task) {  // one begins long after the others
        std::thread others([&] { RunTasks(count - 1, task); });
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        task(count - 1);
        others.join();
      },
  };
  std::mt19937 random(5);
  for (int64_t columns : {112, 208, 450}) {
    for (Rows kind : {Rows::kUnit, Rows::kAnyLength}) {
      const Case c = MakeCase(random, columns, kind);
      for (int64_t workspace : {int64_t{0}, int64_t{1} << 20, kDefaultWorkspaceBytes}) {
        CpuOptions options;
        options.workspace_bytes = workspace;
        options.num_threads = 3;
        const Floats expected = Compute(c, options);
        for (const auto& order : orders) {
          options.run_tasks = order;
          Expect(Compute(c, options) == expected, c.name + ": differs when the tasks run in another order");
        }
      }
    }
  }
  std::printf("order of the tasks\n");
}

void TestNotFinite() {
  std::mt19937 random(3);
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (bool in_teacher : {false, true}) {
      Case c = MakeCase(random, 60, Rows::kUnit);
      c.scalar = Scalar::kFloat32;
      c.weights.assign(c.weights.size(), 1);
      std::vector<float> rows = MakeRows(random, 60, 5, Rows::kUnit);
      c.student = Store(c.scalar, 5, rows);
      c.teachers.assign(c.weights.size(), c.student);
      rows[(c.row_offset + c.rows / 2) * 5 + 3] = bad;
      (in_teacher ? c.teachers[0] : c.student) = Store(c.scalar, 5, rows);
      const Floats got = Compute(c, {});
      Expect(!std::isfinite(got.total) && !std::isfinite(got.per_teacher[0]), c.name + ": a loss that is not NaN");
      Expect(std::any_of(got.gradient.begin(), got.gradient.end(), [](float g) { return !std::isfinite(g); }),
             c.name + ": a finite gradient");
    }
  }
  std::printf("not finite\n");
}

void TestErrors() {
  std::mt19937 random(4);
  const Case good = MakeCase(random, 9, Rows::kUnit);
  const auto error_of = [&](const std::function<void(Problem&)>& change) {
    std::vector<Matrix> storage;
    Problem problem = good.problem(storage);
    change(problem);
    float total = 7;
    std::vector<float> per_teacher(good.teachers.size());
    const std::string error = SimilarityKlCpu(problem, {}, {&total, per_teacher.data(), nullptr});
    Expect(total == 7, "an output was written despite an error");
    const std::string prefix = "similarity_kl: ";
    return error.find(prefix) == 0 ? error.substr(prefix.size()) : error;
  };
  static const float zero = 0, infinite = INFINITY, nan = NAN;
  for (const float* temperature : {&zero, &infinite, &nan}) {
    Expect(error_of([&](Problem& p) { p.temperature = temperature; }).find("temperature") == 0,
           "temperature is checked");
  }
  Expect(error_of([](Problem& p) { p.rows = 5, p.row_offset = 5; }).find("rows") == 0, "rows are checked");
  Expect(error_of([](Problem& p) { p.row_offset = -1; }).find("rows") == 0, "a negative offset is refused");
  Expect(error_of([](Problem& p) { p.num_teachers = 0; }).find("teachers") == 0, "teachers are needed");
  Expect(error_of([](Problem& p) { p.student.dim = 0; }).find("student") == 0, "a student without columns is refused");
  Expect(error_of([](Problem& p) { p.columns = 0; }).find("student") == 0, "an empty batch is refused");
  std::printf("errors\n");
}

// The plan on both sides of its thresholds.
void TestPlan() {
  std::vector<Matrix> teachers(5, Matrix{nullptr, 512});
  Problem problem{Scalar::kFloat32, 4096, 0, 4096, {nullptr, 128}, teachers.data(), 5, nullptr, nullptr};
  for (int64_t columns : {1, 47, 48, 49, 112, 192, 193, 512, 2048, 4096, 16384, 32768}) {
    problem.columns = problem.rows = columns;
    for (int threads : {1, 2, 64}) {
      const CpuPlan all = PlanCpu(problem, int64_t{1} << 40, threads, true);
      const int64_t blocks = (columns + all.tile - 1) / all.tile;
      const int64_t tile_bytes = int64_t{6} * 4 * all.tile * all.tile;
      Expect(all.tiles == blocks * (blocks + 1) / 2, "the tiles on and above the diagonal");
      Expect(all.tile % 16 == 0, "tiles of whole vectors");
      Expect(all.small == (columns <= 192), "few rows");
      if (all.small) {
        Expect(all.kept == 0 && all.kept_bytes == 0, "few rows need no workspace");
        continue;
      }
      Expect(all.kept == all.tiles && all.kept_bytes == all.tiles * tile_bytes, "all are kept if there is room");
      const CpuPlan most = PlanCpu(problem, all.kept_bytes - 1, threads, true);
      Expect(most.kept == all.tiles - 1 && most.kept_bytes <= all.kept_bytes - 1, "one byte less, one tile less");
      Expect(PlanCpu(problem, tile_bytes, threads, true).kept == 1, "room for one");
      Expect(PlanCpu(problem, tile_bytes - 1, threads, true).kept == 0, "room for none");
      Expect(PlanCpu(problem, int64_t{1} << 40, threads, false).kept == 0, "nothing is kept without a gradient");
      Expect(PlanCpu(problem, kDefaultWorkspaceBytes, threads, true).kept_bytes <= kDefaultWorkspaceBytes,
             "the budget");
    }
  }
  std::printf("plan\n");
}

}  // namespace
}  // namespace s2sd

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 120;
  const unsigned seed = argc > 2 ? std::atoi(argv[2]) : 1;
  std::printf("instructions: %s\n", s2sd::SimdName(s2sd::BestSimd()));
  s2sd::TestErrors();
  s2sd::TestPlan();
  s2sd::TestTaskOrder();
  s2sd::TestNotFinite();
  s2sd::TestRandomised(cases, seed);
  s2sd::TestAnyLength(cases / 4, seed);
  std::printf(s2sd::failures ? "%d FAILURES\n" : "all passed\n", s2sd::failures);
  return s2sd::failures != 0;
}
