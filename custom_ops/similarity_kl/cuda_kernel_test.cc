// Runs the CUDA kernels' own source in the emulator, on shapes that are hard to index, and compares the results with a
// naive computation in double. Exits with 1 on failure.
//
//   g++ -std=c++17 -O2 -Wno-unknown-pragmas cuda_kernel_test.cc -o cuda_kernel_test && ./cuda_kernel_test

// The emulator jumps between stacks, which a fortified longjmp rejects.
#undef _FORTIFY_SOURCE

#include "cuda_kernel.cu"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "reference.h"

namespace s2sd {
namespace {

using harness::GuardedArray;

struct Case {
  int64_t columns;
  int64_t row_offset;
  int64_t rows;
  int64_t dim;
  std::vector<int64_t> teacher_dims;
  float temperature;
  Scalar scalar = Scalar::kFloat32;
  bool allow_tf32 = false;
  CudaPath path = CudaPath::kAuto;
  int64_t misalignment = 0;  // of every matrix, in scalars
  bool gradient = true;
  int64_t kept_tiles = 0;  // there is room for this many
  int groups = 0;
  float spread = 0;  // of the logarithm of the rows' lengths

  bool tf32() const { return allow_tf32 && scalar == Scalar::kFloat32; }
};

struct Results : HostResults {
  std::vector<uint32_t> bits;  // of all the results
  std::string error;
};

uint16_t ToBfloat16(float x) {
  if (std::isnan(x)) return 0x7fc0;
  const uint32_t bits = harness::FloatToBits(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float Round(float x, Scalar scalar) {
  switch (scalar) {
    case Scalar::kFloat16:
      return harness::Float16ToFloat(harness::ToFloat16(x));
    case Scalar::kBfloat16:
      return harness::BitsToFloat(static_cast<uint32_t>(ToBfloat16(x)) << 16);
    default:
      return x;
  }
}

// The rows are in pairs of one class, so that similarities are spread out.
HostProblem MakeInputs(const Case& c, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  HostProblem inputs = {c.columns, c.row_offset, c.rows, c.temperature, {}, {}};
  for (size_t m = 0; m <= c.teacher_dims.size(); ++m) {
    const int64_t dim = m == 0 ? c.dim : c.teacher_dims[m - 1];
    std::vector<float> matrix(c.columns * dim);
    for (int64_t i = 0; i < c.columns; ++i) {
      double norm = 0;
      for (int64_t d = 0; d < dim; ++d) {
        float& x = matrix[i * dim + d];
        x = normal(random);
        if (i % 2 == 1) x += matrix[(i - 1) * dim + d] * std::sqrt(static_cast<float>(dim));
        norm += static_cast<double>(x) * x;
      }
      const double length = c.spread > 0 ? std::exp(c.spread * normal(random)) : 1;
      for (int64_t d = 0; d < dim; ++d) {
        float& x = matrix[i * dim + d];
        x = Round(static_cast<float>(x * length / std::sqrt(norm)), c.scalar);
      }
    }
    inputs.matrices.push_back(matrix);
    if (m > 0) inputs.weights.push_back(0.1f + std::fabs(normal(random)) * (m == 3 ? -1.0f : 1.0f));
  }
  return inputs;
}

Results RunKernel(const Case& c, const HostProblem& inputs) {
  const int64_t size = c.scalar == Scalar::kFloat32 ? 4 : 2;
  std::vector<std::unique_ptr<GuardedArray>> arrays;
  std::vector<Matrix> matrices;
  for (const std::vector<float>& values : inputs.matrices) {
    const int64_t count = static_cast<int64_t>(values.size());
    arrays.push_back(std::make_unique<GuardedArray>((count + c.misalignment) * size, 16));
    char* data = arrays.back()->data() + c.misalignment * size;
    for (int64_t n = 0; n < count; ++n) {
      const uint16_t half = c.scalar == Scalar::kFloat16 ? harness::ToFloat16(values[n]) : ToBfloat16(values[n]);
      std::memcpy(data + n * size, size == 4 ? static_cast<const void*>(&values[n]) : &half, size);
    }
    matrices.push_back({data, count / c.columns});
  }
  const int64_t teachers = static_cast<int64_t>(inputs.weights.size());
  GuardedArray temperature(4, 4), weights(4 * teachers, 4), total(4, 4), per_teacher(4 * teachers, 4);
  GuardedArray gradient(4 * c.columns * c.dim, 4);
  std::memcpy(temperature.data(), &c.temperature, 4);
  std::memcpy(weights.data(), inputs.weights.data(), 4 * teachers);
  const Problem problem = {c.scalar,
                           c.columns,
                           c.row_offset,
                           c.rows,
                           matrices[0],
                           matrices.data() + 1,
                           static_cast<int>(teachers),
                           reinterpret_cast<float*>(temperature.data()),
                           reinterpret_cast<float*>(weights.data())};
  const Outputs outputs = {reinterpret_cast<float*>(total.data()), reinterpret_cast<float*>(per_teacher.data()),
                           c.gradient ? reinterpret_cast<float*>(gradient.data()) : nullptr};
  CudaOptions options;
  options.allow_tf32 = c.allow_tf32;
  options.path = c.path;
  options.groups = c.groups;
  options.kept_bytes = 0;
  const int64_t tile = PlanCuda(problem, options, c.gradient).tile;
  options.kept_bytes = c.kept_tiles * tile * tile * 4 * (teachers + 1);
  GuardedArray workspace(PlanCuda(problem, options, c.gradient).workspace_bytes, 256);
  Results results;
  char stream;
  harness::emulator.only_stream = &stream;
  const char* error = SimilarityKlCuda(problem, options, outputs, workspace.data(), &stream);
  if (error != nullptr) results.error = error;
  const auto read = [&](GuardedArray& array, int64_t n) {
    float x;
    std::memcpy(&x, array.data() + 4 * n, 4);
    results.bits.push_back(harness::FloatToBits(x));
    return static_cast<double>(x);
  };
  results.total = read(total, 0);
  for (int64_t k = 0; k < teachers; ++k) results.per_teacher.push_back(read(per_teacher, k));
  for (int64_t n = 0; c.gradient && n < c.columns * c.dim; ++n) results.gradient.push_back(read(gradient, n));
  return results;
}

int failures = 0;

std::string Describe(const Case& c) {
  std::string dims;
  for (int64_t dim : c.teacher_dims) dims += " " + std::to_string(dim);
  char text[256];
  std::snprintf(text, sizeof(text),
                "columns %d rows %d+%d dim %d teachers%s T %g scalar %d tf32 %d path %d shift %d kept %d spread %g",
                static_cast<int>(c.columns), static_cast<int>(c.row_offset), static_cast<int>(c.rows),
                static_cast<int>(c.dim), dims.c_str(), c.temperature, static_cast<int>(c.scalar), c.allow_tf32,
                static_cast<int>(c.path), static_cast<int>(c.misalignment), static_cast<int>(c.kept_tiles), c.spread);
  return text;
}

void Expect(bool condition, const Case& c, const std::string& what) {
  if (condition) return;
  ++failures;
  std::printf("FAILED %s: %s\n", Describe(c).c_str(), what.c_str());
}

// The errors of a group of cases. A bound for each case says little if the composed error, which it is measured
// against, is tiny by luck. So for TF32, whose errors are large, the root mean square over the group is at most twice
// the composed computation's.
class Errors {
 public:
  void Add(const Case& c) {
    ++cases_;
    const HostProblem inputs = MakeInputs(c, 7);
    const HostResults truth = Composed<double>(inputs);
    const HostResults composed = Composed<float>(inputs, c.tf32());
    const Results results = RunKernel(c, inputs);
    Expect(results.error.empty(), c, results.error);
    if (c.tf32()) {
      const double t = c.temperature;
      AddSquares(truth.per_teacher, results.per_teacher, composed.per_teacher, t * std::max(1.0, t), &kl_);
      if (!c.gradient) return;
      // If student and teachers agree, the gradient is nearly zero, and its error means nothing.
      double least = 0;
      for (float w : inputs.weights) least += 1e-3 * std::fabs(w) * t / static_cast<double>(c.rows);
      const double size = std::max(MaxAbs(truth.gradient), least);
      AddSquares(truth.gradient, results.gradient, composed.gradient, size, &gradient_);
      return;
    }
    const Limits limits = ErrorLimits(inputs, truth, composed);
    const double kl = std::max(MaxError(truth.per_teacher, results.per_teacher) / limits.per_teacher,
                               std::fabs(truth.total - results.total) / limits.total);
    Expect(kl <= 1, c, "KL error " + std::to_string(kl) + " times the limit");
    worst_kl_ = std::max(worst_kl_, kl);
    if (!c.gradient) return;
    const double gradient = MaxError(truth.gradient, results.gradient) / limits.gradient;
    Expect(gradient <= 1, c, "gradient error " + std::to_string(gradient) + " times the limit");
    worst_gradient_ = std::max(worst_gradient_, gradient);
  }

  void Report(const char* group) const {
    std::printf("%-34s %3d cases, worst error / allowed error: KL %.2f, gradient %.2f", group, cases_, worst_kl_,
                worst_gradient_);
    if (kl_.composed > 0) {
      const double kl = std::sqrt(kl_.kernel / kl_.composed);
      const double gradient = std::sqrt(gradient_.kernel / std::max(gradient_.composed, 1e-300));
      std::printf("; TF32 error over composed TF32's: KL %.2f, gradient %.2f", kl, gradient);
      if (!(kl <= 2 && gradient <= 2)) {
        ++failures;
        std::printf(": FAILED");
      }
    }
    std::printf("\n");
    std::fflush(stdout);
  }

 private:
  struct Squares {
    double kernel = 0;
    double composed = 0;
  };

  static void AddSquares(const std::vector<double>& truth, const std::vector<double>& kernel,
                         const std::vector<double>& composed, double size, Squares* squares) {
    if (size == 0) return;
    for (size_t n = 0; n < truth.size(); ++n) {
      squares->kernel += std::pow((kernel[n] - truth[n]) / size, 2) / static_cast<double>(truth.size());
      squares->composed += std::pow((composed[n] - truth[n]) / size, 2) / static_cast<double>(truth.size());
    }
  }

  int cases_ = 0;
  double worst_kl_ = 0;
  double worst_gradient_ = 0;
  Squares kl_;
  Squares gradient_;
};

void TestTiles() {
  int count = 0;
  for (bool square : {false, true}) {
    for (int columns : {1, 2, 7, 8, 9, 16, 17, 31, 1024}) {
      for (int rows : {1, 2, 9, 1024}) {
        if (square && rows != 1) continue;
        const int row_tiles = square ? columns : rows;
        const int64_t tiles = cuda::NumTiles(square, row_tiles, columns);
        std::vector<char> seen(static_cast<size_t>(row_tiles) * columns, 0);
        bool good = true;
        for (int64_t n = 0; n < tiles; ++n) {
          const cuda::Tile tile = cuda::DecodeTile(square, static_cast<int>(n), row_tiles, columns);
          good = good && tile.row >= 0 && tile.row < row_tiles && tile.column >= 0 && tile.column < columns &&
                 (!square || tile.row <= tile.column) && seen[tile.row * columns + tile.column]++ == 0;
        }
        if (!good) {
          ++failures;
          std::printf("FAILED tile numbering: square %d, %d x %d\n", square, row_tiles, columns);
        }
        ++count;
      }
    }
  }
  std::printf("%-34s %3d cases\n", "tile numbering", count);
}

template <typename T>
T Pick(std::mt19937* random, const std::vector<T>& from) {
  return from[(*random)() % from.size()];
}

void TestPath(const char* name, CudaPath path, const std::vector<int64_t>& sizes) {
  Errors errors;
  std::mt19937 random(static_cast<unsigned>(path));
  const bool large = path == CudaPath::kLarge64 || path == CudaPath::kLarge128;
  for (int64_t columns : sizes) {
    for (Scalar scalar : {Scalar::kFloat32, Scalar::kFloat16, Scalar::kBfloat16}) {
      for (bool tf32 : {false, true}) {
        if (tf32 && scalar != Scalar::kFloat32) continue;
        const bool big = columns > 100;
        const int64_t dim = Pick<int64_t>(&random, {1, 7, 33, 128, big ? 20 : 300});
        std::vector<int64_t> teachers = {Pick<int64_t>(&random, {1, 7, 33, 128, 300})};
        if (random() % 2 == 0) teachers.insert(teachers.end(), {33, 64});
        if (!big && random() % 2 == 0) teachers.insert(teachers.end(), {1, 7, 16, 40, 128});
        Case c = {columns, 0, columns, dim, teachers, Pick<float>(&random, {0.05f, 0.2f, 1, 4}), scalar, tf32, path};
        c.misalignment = random() % 3;
        c.kept_tiles = large ? random() % 5 : 0;
        errors.Add(c);
        c.misalignment = 0;
        c.temperature = 0.05f;
        c.row_offset = random() % columns;
        c.rows = 1 + random() % (columns - c.row_offset);
        errors.Add(c);
      }
    }
  }
  Case c = {sizes.back(), 0, sizes.back(), 33, {40, 9}, 0.05f, Scalar::kBfloat16, false, path};
  c.gradient = false;
  errors.Add(c);
  c.scalar = Scalar::kFloat32;
  errors.Add(c);
  errors.Report(name);
}

// The path that the kernel chooses by itself.
void TestChosen() {
  Errors errors;
  for (int64_t columns : {112, 256, 257}) {
    for (Scalar scalar : {Scalar::kFloat32, Scalar::kBfloat16}) {
      Case c = {columns, 0, columns, 128, {300, 33}, 0.2f, scalar};
      c.kept_tiles = 100;
      errors.Add(c);
    }
  }
  errors.Report("paths as chosen");
}

// Rows of any length, and temperatures so small that the rounding of products shows, as in the CPU kernel's test.
void TestAnyLength() {
  Errors errors;
  std::mt19937 random(9);
  for (CudaPath path : {CudaPath::kSmall16, CudaPath::kSmall32, CudaPath::kLarge64, CudaPath::kLarge128}) {
    for (float spread : {0.3f, 1.0f, 3.0f}) {
      for (Scalar scalar : {Scalar::kFloat32, Scalar::kBfloat16}) {
        Case c = {70, 0, 70, 9, {33, 8}, Pick<float>(&random, {0.05f, 1, 4}), scalar, false, path};
        c.spread = spread;
        c.kept_tiles = random() % 2;
        errors.Add(c);
        c.row_offset = 11;
        c.rows = 41;
        errors.Add(c);
      }
    }
    for (float t : {1e-2f, 1e-3f, 1e-5f}) errors.Add({41, 0, 41, 9, {33, 8}, t, Scalar::kFloat32, false, path});
  }
  // More tiles than blocks: blocks of the maxima's kernel take several.
  harness::emulator.multiprocessors = 1;
  Case c = {300, 0, 300, 9, {300}, 1, Scalar::kFloat32, false, CudaPath::kLarge64};
  c.spread = 1;
  errors.Add(c);
  harness::emulator.multiprocessors = 3;
  errors.Report("rows of any length, tiny T");
}

// With a wide float32 teacher, truncated sums would show.
void TestDepth() {
  Errors errors;
  for (CudaPath path : {CudaPath::kSmall16, CudaPath::kLarge64, CudaPath::kLarge128}) {
    for (float t : {0.05f, 1.0f}) {
      errors.Add({41, 0, 41, 128, {2048}, t, Scalar::kFloat32, false, path});
      errors.Add({41, 0, 41, 128, {2048}, t, Scalar::kFloat32, true, path});
      errors.Add({41, 0, 41, 128, {2048}, t, Scalar::kBfloat16, false, path});
    }
  }
  errors.Report("depth 2048");
}

// If blocks divide the teachers among themselves, each has a part of H that does not cancel.
void TestGroups() {
  for (int groups : {1, 2, 5}) {
    Errors errors;
    Case c = {320, 0, 320, 128, {64, 96, 128, 160, 160}, 1, Scalar::kFloat32, true, CudaPath::kLarge64};
    c.groups = groups;
    errors.Add(c);
    const std::string name = "TF32, 320 rows, " + std::to_string(groups) + " groups of teachers";
    errors.Report(name.c_str());
  }
}

void TestDeterminism() {
  int count = 0;
  for (CudaPath path : {CudaPath::kSmall16, CudaPath::kSmall32, CudaPath::kLarge64, CudaPath::kLarge128}) {
    const bool small = path == CudaPath::kSmall16 || path == CudaPath::kSmall32;
    const int64_t columns = small ? 41 : 150;
    Case c = {columns, 0, columns, 33, {40, 7}, 0.2f, Scalar::kFloat32, false, path};
    const HostProblem inputs = MakeInputs(c, 11);
    const Results first = RunKernel(c, inputs);
    for (unsigned seed = 2; seed < 5; ++seed) {
      harness::emulator.seed = seed;
      // The small path distributes its work over as many blocks as there are.
      if (small) harness::emulator.resident_blocks = static_cast<int>(seed);
      c.kept_tiles = seed - 2;  // kept similarities equal recomputed ones
      Expect(RunKernel(c, inputs).bits == first.bits, c, "the bits depend on the order of blocks or on what is kept");
      ++count;
    }
    harness::emulator.seed = 1;
    harness::emulator.resident_blocks = 1;
  }
  std::printf("%-34s %3d cases\n", "determinism", count);
}

void TestInvalid() {
  int count = 0;
  for (CudaPath path : {CudaPath::kSmall16, CudaPath::kSmall32, CudaPath::kLarge64, CudaPath::kLarge128}) {
    const Case good = {70, 20, 41, 9, {33, 8}, 0.2f, Scalar::kFloat32, false, path};
    const auto expect_nan = [&](const Case& c, const HostProblem& inputs, const char* what) {
      const Results results = RunKernel(c, inputs);
      bool all = std::isnan(results.total);
      for (double x : results.per_teacher) all = all && std::isnan(x);
      for (double x : results.gradient) all = all && std::isnan(x);
      Expect(all, c, std::string("not all NaN: ") + what);
      ++count;
    };
    for (int m = 0; m < 3; ++m) {
      for (float bad : {NAN, INFINITY, -INFINITY, 1e30f, harness::BitsToFloat(0x7fffffff)}) {
        HostProblem inputs = MakeInputs(good, 5);
        inputs.matrices[m][m == 1 ? 0 : inputs.matrices[m].size() - 1] = bad;
        expect_nan(good, inputs, "an element that is not finite or is huge");
      }
    }
    for (float t : {0.0f, -1.0f, NAN, INFINITY}) {
      Case c = good;
      c.temperature = t;
      expect_nan(c, MakeInputs(c, 5), "temperature");
    }
    HostProblem inputs = MakeInputs(good, 5);
    inputs.weights[1] = NAN;
    expect_nan(good, inputs, "weight");

    // Rows that are nearly zero, and zero.
    for (float length : {1e-13f, 0.0f}) {
      inputs = MakeInputs(good, 5);
      for (std::vector<float>& matrix : inputs.matrices) {
        for (float& x : matrix) x *= length;
      }
      const Results tiny = RunKernel(good, inputs);
      Expect(std::fabs(tiny.total) < 1e-6 && MaxAbs(tiny.gradient) < 1e-6, good, "rows that are nearly zero");
      ++count;
    }
    // Weights of any size, and zero.
    for (float w : {1e-30f, 1e30f, 0.0f}) {
      inputs = MakeInputs(good, 5);
      for (float& weight : inputs.weights) weight *= w;
      const Results scaled = RunKernel(good, inputs);
      const HostResults expected = Composed<double>(inputs);
      Expect(MaxError(expected.gradient, scaled.gradient) <= 1e-5 * MaxAbs(expected.gradient), good,
             "gradient with weights times " + std::to_string(w));
      ++count;
    }
  }
  for (Case bad : {Case{3, 2, 2, 2, {2}, 1}, Case{3, -1, 2, 2, {2}, 1}, Case{3, 0, 0, 2, {2}, 1}}) {
    const Matrix teacher = {nullptr, 2};
    const Problem problem = {bad.scalar, bad.columns, bad.row_offset, bad.rows, teacher, &teacher, 1, nullptr, nullptr};
    Expect(SimilarityKlCuda(problem, {}, {}, nullptr, nullptr) != nullptr, bad, "accepted");
    ++count;
  }
  std::printf("%-34s %3d cases\n", "invalid inputs and borders", count);
}

void TestManyTeachers() {
  Errors errors;
  const std::vector<int64_t> teachers(kCudaMaxTeachers, 3);
  errors.Add({5, 0, 5, 4, teachers, 1});
  errors.Add({5, 1, 3, 4, teachers, 1, Scalar::kFloat32, false, CudaPath::kLarge64});
  errors.Report("64 teachers");
}

// The plan on both sides of its thresholds.
void TestPlan() {
  int count = 0;
  const auto expect = [&](bool condition, int64_t columns, const char* what) {
    ++count;
    if (condition) return;
    ++failures;
    std::printf("FAILED plan of %d columns: %s\n", static_cast<int>(columns), what);
  };
  const std::vector<Matrix> teachers(5, Matrix{nullptr, 512});
  Problem problem = {Scalar::kFloat32, 0, 0, 0, {nullptr, 128}, teachers.data(), 5, nullptr, nullptr};
  const auto plan = [&](int64_t columns, int64_t rows, CudaOptions options = {}, bool gradient = true) {
    problem.columns = columns;
    problem.rows = rows;
    return PlanCuda(problem, options, gradient);
  };
  expect(plan(128, 128).path == CudaPath::kSmall16 && plan(129, 129).path == CudaPath::kSmall32, 128, "path");
  expect(plan(256, 256).path == CudaPath::kSmall32 && plan(257, 257).path == CudaPath::kLarge64, 256, "path");
  // 16 tiles of 128 a side are 136 on or above the diagonal.
  expect(plan(1920, 1920).path == CudaPath::kLarge64 && plan(1921, 1921).path == CudaPath::kLarge128, 1920, "path");
  expect(plan(4096, 512).path == CudaPath::kLarge64 && plan(4224, 512).path == CudaPath::kLarge128, 4096, "rows");
  expect(plan(257, 257).groups == 5 && plan(1600, 1600).groups == 2 && plan(8192, 8192).groups == 1, 257, "groups");
  for (int64_t columns : {300, 2000, 4096, 65536}) {
    CudaOptions options;
    const int64_t tile = plan(columns, columns).tile;
    const int64_t side = (columns + tile - 1) / tile;
    const int64_t tile_bytes = 6 * 4 * tile * tile;
    options.kept_bytes = int64_t{1} << 40;
    const CudaPlan all = plan(columns, columns, options);
    expect(all.tiles == side * (side + 1) / 2 && all.kept == all.tiles, columns, "all are kept if there is room");
    options.kept_bytes = all.kept * tile_bytes - 1;
    expect(plan(columns, columns, options).kept == all.tiles - 1, columns, "one byte less, one tile less");
    options.kept_bytes = tile_bytes;
    const int64_t one = plan(columns, columns, options).workspace_bytes;
    expect(plan(columns, columns, options).kept == 1, columns, "room for one");
    options.kept_bytes = tile_bytes - 1;
    expect(plan(columns, columns, options).kept == 0, columns, "room for none");
    expect(one - plan(columns, columns, options).workspace_bytes == tile_bytes, columns, "the size of one");
    options.kept_bytes = int64_t{1} << 40;
    expect(plan(columns, columns, options, false).kept == 0, columns, "nothing is kept without a gradient");
  }
  expect(plan(65536, 65536).workspace_bytes < int64_t{400} << 20, 65536, "workspace");
  std::printf("%-34s %3d cases\n", "plan", count);
}

}  // namespace
}  // namespace s2sd

// Runs all groups, or only those whose numbers are given, counting from 0.
int main(int argc, char** argv) {
  using s2sd::CudaPath;
  using s2sd::TestPath;
  const std::vector<int64_t> small = {1, 2, 3, 41, 112, 130};
  // At most one more than two tiles: a tile in the middle, and a remainder.
  const std::vector<int64_t> large64 = {1, 2, 3, 41, 112, 129};
  const std::vector<int64_t> large128 = {1, 2, 3, 41, 112, 257};
  const std::vector<std::function<void()>> groups = {
      [] { s2sd::TestTiles(); },
      [] { s2sd::TestPlan(); },
      [&] { TestPath("small path, tiles of 16", CudaPath::kSmall16, small); },
      [&] { TestPath("small path, tiles of 32", CudaPath::kSmall32, small); },
      [&] { TestPath("large path, tiles of 64", CudaPath::kLarge64, large64); },
      [&] { TestPath("large path, tiles of 128", CudaPath::kLarge128, large128); },
      [] { s2sd::TestChosen(); },
      [] { s2sd::TestAnyLength(); },
      [] { s2sd::TestDepth(); },
      [] { s2sd::TestGroups(); },
      [] { s2sd::TestManyTeachers(); },
      [] { s2sd::TestDeterminism(); },
      [] { s2sd::TestInvalid(); },
  };
  for (int n = 0; n < static_cast<int>(groups.size()); ++n) {
    bool chosen = argc == 1;
    for (int a = 1; a < argc; ++a) chosen = chosen || std::atoi(argv[a]) == n;
    if (chosen) groups[n]();
  }
  std::printf("%s\n", s2sd::failures == 0 ? "all passed" : "FAILED");
  return s2sd::failures == 0 ? 0 : 1;
}
