// Runs the CUDA kernels' own source through the emulator, on shapes that are hard to index, against a naive computation
// in double. Exits with 1 after a failure.
//
//   g++ -std=c++17 -O2 -Wno-unknown-pragmas cuda_kernel_test.cc -o cuda_kernel_test && ./cuda_kernel_test

// The emulator jumps between stacks, which a fortified longjmp takes for a mistake.
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

using cuda::Path;
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
  Path path = Path::kSmall;
  int tile = 0;              // 0: the kernel's choice
  int64_t misalignment = 0;  // of every matrix, in scalars
  bool gradient = true;
};

struct Results : HostResults {
  std::vector<uint32_t> bits;  // of all of these
  std::string error;
};

uint16_t ToFloat16(float x) {
  // Nearest of all finite values: slow, but without a rounding rule of its own.
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return 0x7e00;
  uint16_t low = 0, high = 0x7bff;
  while (high - low > 1) {
    const uint16_t middle = (low + high) / 2;
    (harness::Float16ToFloat(middle) <= magnitude ? low : high) = middle;
  }
  const float below = magnitude - harness::Float16ToFloat(low);
  const float above = harness::Float16ToFloat(high) - magnitude;
  return sign | (below <= above ? low : high);
}

uint16_t ToBfloat16(float x) {
  if (std::isnan(x)) return 0x7fc0;
  const uint32_t bits = harness::FloatToBits(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float Round(float x, Scalar scalar) {
  switch (scalar) {
    case Scalar::kFloat16:
      return harness::Float16ToFloat(ToFloat16(x));
    case Scalar::kBfloat16:
      return harness::BitsToFloat(static_cast<uint32_t>(ToBfloat16(x)) << 16);
    default:
      return x;
  }
}

// Rows in pairs of one class, so that similarities are spread out.
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
      for (int64_t d = 0; d < dim; ++d) {
        float& x = matrix[i * dim + d];
        x = Round(static_cast<float>(x / std::sqrt(norm)), c.scalar);
      }
    }
    inputs.matrices.push_back(matrix);
    if (m > 0) inputs.weights.push_back(0.1f + std::fabs(normal(random)) * (m == 3 ? -1.0f : 1.0f));
  }
  return inputs;
}

template <Scalar kScalar, bool kCompensated>
cudaError_t LaunchTile(const Case& c, const cuda::Params& p, const cuda::Layout& layout, const cuda::Device& device) {
  if (c.path == Path::kSmall) {
    return c.tile == 16 ? cuda::LaunchSmall<kScalar, kCompensated, 16>(p, device, nullptr)
                        : cuda::LaunchSmall<kScalar, kCompensated, 32>(p, device, nullptr);
  }
  return c.tile == 64 ? cuda::LaunchLarge<kScalar, kCompensated, 64>(p, layout, device, nullptr)
                      : cuda::LaunchLarge<kScalar, kCompensated, 128>(p, layout, device, nullptr);
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
      const uint16_t half = c.scalar == Scalar::kFloat16 ? ToFloat16(values[n]) : ToBfloat16(values[n]);
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
  cuda::Params params = {};
  const cuda::Layout layout = cuda::LayOut(problem, c.gradient, c.path, nullptr, &params);
  GuardedArray workspace(layout.bytes, 256);
  const CudaOptions options = {c.allow_tf32};
  Results results;
  const char* error = nullptr;
  if (c.tile == 0) {
    error = cuda::Run(problem, options, outputs, workspace.data(), nullptr, c.path);
  } else {
    params = cuda::MakeParams(problem, outputs);
    cuda::LayOut(problem, c.gradient, c.path, workspace.data(), &params);
    cuda::Device device;
    cuda::QueryDevice(&device);
    const auto launch = c.scalar == Scalar::kBfloat16  ? LaunchTile<Scalar::kBfloat16, true>
                        : c.scalar == Scalar::kFloat16 ? LaunchTile<Scalar::kFloat16, true>
                        : c.allow_tf32                 ? LaunchTile<Scalar::kFloat32, false>
                                                       : LaunchTile<Scalar::kFloat32, true>;
    const cudaError_t code = launch(c, params, layout, device);
    if (code != cudaSuccess) error = cudaGetErrorString(code);
  }
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
                "columns %d rows %d+%d dim %d teachers%s T %g scalar %d tf32 %d path %d tile %d shift %d",
                static_cast<int>(c.columns), static_cast<int>(c.row_offset), static_cast<int>(c.rows),
                static_cast<int>(c.dim), dims.c_str(), c.temperature, static_cast<int>(c.scalar), c.allow_tf32,
                static_cast<int>(c.path), c.tile, static_cast<int>(c.misalignment));
  return text;
}

void Expect(bool condition, const Case& c, const std::string& what) {
  if (condition) return;
  ++failures;
  std::printf("FAILED %s: %s\n", Describe(c).c_str(), what.c_str());
}

struct Worst {
  double kl = 0;
  double gradient = 0;
};

// Errors in units of what is allowed.
void CheckValues(const Case& c, Worst* worst) {
  const HostProblem inputs = MakeInputs(c, 7);
  const HostResults truth = Composed<double>(inputs);
  const Limits limits = ErrorLimits(inputs, truth, Composed<float>(inputs), c.allow_tf32);
  const Results results = RunKernel(c, inputs);
  Expect(results.error.empty(), c, results.error);
  const double kl = std::max(MaxError(truth.per_teacher, results.per_teacher) / limits.per_teacher,
                             std::fabs(truth.total - results.total) / limits.total);
  Expect(kl <= 1, c, "KL error " + std::to_string(kl) + " of what is allowed");
  worst->kl = std::max(worst->kl, kl);
  if (!c.gradient) return;
  const double gradient = MaxError(truth.gradient, results.gradient) / limits.gradient;
  Expect(gradient <= 1, c, "gradient error " + std::to_string(gradient) + " of what is allowed");
  worst->gradient = std::max(worst->gradient, gradient);
}

void Report(const char* group, int cases, const Worst& worst) {
  std::printf("%-34s %3d cases, worst error over allowed: KL %.2f, gradient %.2f\n", group, cases, worst.kl,
              worst.gradient);
  std::fflush(stdout);
}

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

void TestSmall() {
  Worst worst;
  int count = 0;
  const std::vector<std::vector<int64_t>> teachers = {{33}, {300, 7, 128}, {1, 7, 33, 128, 300, 64, 16, 40}};
  std::mt19937 random(3);
  for (int64_t columns : {1, 2, 3, 41, 112, 130}) {
    for (Scalar scalar : {Scalar::kFloat32, Scalar::kFloat16, Scalar::kBfloat16}) {
      for (bool tf32 : {false, true}) {
        if (tf32 && scalar != Scalar::kFloat32) continue;
        const float t = std::vector<float>{0.05f, 0.2f, 1, 4}[random() % 4];
        const int64_t dim = std::vector<int64_t>{1, 7, 33, 128, 300}[random() % 5];
        Case c = {columns, 0, columns, dim, teachers[random() % (columns > 100 ? 2 : 3)], t, scalar, tf32};
        c.misalignment = random() % 3;
        CheckValues(c, &worst);
        c.temperature = 1;
        c.misalignment = 0;
        c.row_offset = random() % columns;
        c.rows = 1 + random() % (columns - c.row_offset);
        c.tile = random() % 2 == 0 ? 16 : 32;
        CheckValues(c, &worst);
        count += 2;
      }
    }
  }
  Case c = {257 - 1, 0, 256, 128, {300, 33}, 0.2f};
  CheckValues(c, &worst);
  c.gradient = false;
  CheckValues(c, &worst);
  Report("small path", count + 2, worst);
}

void TestLarge(int tile) {
  Worst worst;
  int count = 0;
  std::mt19937 random(tile);
  for (int64_t columns : {1, 2, 3, 41, 112, 257}) {
    for (Scalar scalar : {Scalar::kFloat32, Scalar::kFloat16, Scalar::kBfloat16}) {
      for (bool tf32 : {false, true}) {
        if (tf32 && scalar != Scalar::kFloat32) continue;
        const bool big = columns > 100;
        const float t = std::vector<float>{0.05f, 0.2f, 1, 4}[random() % 4];
        const int64_t dim = std::vector<int64_t>{1, 7, 33, 128, 300}[random() % (big ? 4 : 5)];
        std::vector<int64_t> teachers = {std::vector<int64_t>{1, 7, 33, 128, 300}[random() % 5]};
        if (random() % 2 == 0) teachers.insert(teachers.end(), {33, 64});
        if (!big && random() % 2 == 0) teachers.insert(teachers.end(), {1, 7, 16, 40, 128});
        Case c = {columns, 0, columns, dim, teachers, t, scalar, tf32, Path::kLarge, tile};
        c.misalignment = random() % 3;
        CheckValues(c, &worst);
        c.temperature = 1;
        c.misalignment = 0;
        c.row_offset = random() % columns;
        c.rows = 1 + random() % (columns - c.row_offset);
        CheckValues(c, &worst);
        count += 2;
      }
    }
  }
  Case c = {401, 0, 401, 33, {40}, 1, Scalar::kBfloat16, false, Path::kLarge, tile};
  CheckValues(c, &worst);
  c.gradient = false;
  CheckValues(c, &worst);
  Report(tile == 64 ? "large path, tiles of 64" : "large path, tiles of 128", count + 2, worst);
}

// A wide float32 teacher is where truncating sums would show.
void TestDepth() {
  Worst worst;
  for (Path path : {Path::kSmall, Path::kLarge}) {
    for (float t : {0.05f, 1.0f}) {
      for (Scalar scalar : {Scalar::kFloat32, Scalar::kBfloat16}) {
        CheckValues({41, 0, 41, 128, {2048}, t, scalar, false, path}, &worst);
      }
    }
  }
  Report("depth 2048", 8, worst);
}

void TestDeterminism() {
  int count = 0;
  for (int tile : {16, 32, 64, 128}) {
    const Path path = tile < 64 ? Path::kSmall : Path::kLarge;
    Case c = {tile < 64 ? 41 : 150, 0, tile < 64 ? 41 : 150, 33, {40, 7}, 0.2f, Scalar::kFloat32, false, path, tile};
    const HostProblem inputs = MakeInputs(c, 11);
    const Results first = RunKernel(c, inputs);
    for (unsigned seed = 2; seed < 5; ++seed) {
      harness::emulator.seed = seed;
      // The small path shares its work out among as many blocks as there are.
      if (path == Path::kSmall) harness::emulator.resident_blocks = static_cast<int>(seed);
      Expect(RunKernel(c, inputs).bits == first.bits, c, "bits depend on the order of blocks");
      ++count;
    }
    harness::emulator.seed = 1;
    harness::emulator.resident_blocks = 1;
  }
  std::printf("%-34s %3d cases\n", "determinism", count);
}

void TestInvalid() {
  int count = 0;
  for (int tile : {16, 32, 64, 128}) {
    const Path path = tile < 64 ? Path::kSmall : Path::kLarge;
    const Case good = {70, 20, 41, 9, {33, 8}, 0.2f, Scalar::kFloat32, false, path, tile};
    const auto expect_nan = [&](const Case& c, const HostProblem& inputs, const char* what) {
      const Results results = RunKernel(c, inputs);
      bool all = std::isnan(results.total);
      for (double x : results.per_teacher) all = all && std::isnan(x);
      for (double x : results.gradient) all = all && std::isnan(x);
      Expect(all, c, std::string("not all NaN: ") + what);
      ++count;
    };
    for (int m = 0; m < 3; ++m) {
      for (float bad : {NAN, INFINITY, -INFINITY, 1e30f}) {
        HostProblem inputs = MakeInputs(good, 5);
        inputs.matrices[m][m == 1 ? 0 : inputs.matrices[m].size() - 1] = bad;
        expect_nan(good, inputs, "an element that is not finite or is huge");
      }
      HostProblem inputs = MakeInputs(good, 5);
      const int64_t dim = static_cast<int64_t>(inputs.matrices[m].size()) / good.columns;
      for (int64_t d = 0; d < dim; ++d) inputs.matrices[m][3 * dim + d] *= 1.7f;  // squared: 2.89, allowed: 2.6
      expect_nan(good, inputs, "a row that is not normalised");
    }
    for (float t : {0.0f, -1.0f, NAN, INFINITY}) {
      Case c = good;
      c.temperature = t;
      expect_nan(c, MakeInputs(c, 5), "temperature");
    }
    HostProblem inputs = MakeInputs(good, 5);
    inputs.weights[1] = NAN;
    expect_nan(good, inputs, "weight");

    // Inside the slack the answer is still right.
    inputs = MakeInputs(good, 5);
    for (int64_t n = 0; n < 18; ++n) inputs.matrices[0][21 * 9 + n] *= n < 9 ? 1.5f : 0.5f;
    const Results results = RunKernel(good, inputs);
    const HostResults truth = Composed<double>(inputs);
    Expect(MaxError(truth.per_teacher, results.per_teacher) < 1e-5, good, "KL of rows inside the slack");
    Expect(MaxError(truth.gradient, results.gradient) < 1e-5 * MaxAbs(truth.gradient), good,
           "gradient of rows inside the slack");
    // Weights of any size, and none.
    for (float w : {1e-30f, 1e30f, 0.0f}) {
      inputs = MakeInputs(good, 5);
      for (float& weight : inputs.weights) weight *= w;
      const Results scaled = RunKernel(good, inputs);
      const HostResults expected = Composed<double>(inputs);
      Expect(MaxError(expected.gradient, scaled.gradient) <= 1e-5 * MaxAbs(expected.gradient), good,
             "gradient with weights times " + std::to_string(w));
    }
    count += 4;
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
  Worst worst;
  const std::vector<int64_t> teachers(kCudaMaxTeachers, 3);
  CheckValues({5, 0, 5, 4, teachers, 1}, &worst);
  CheckValues({5, 1, 3, 4, teachers, 1, Scalar::kFloat32, false, Path::kLarge}, &worst);
  Report("64 teachers", 2, worst);
}

void TestWorkspace() {
  const std::vector<Matrix> teachers = {{nullptr, 512}, {nullptr, 1024}, {nullptr, 2048}};
  Problem problem = {Scalar::kFloat32, 65536, 0, 65536, {nullptr, 128}, teachers.data(), 3, nullptr, nullptr};
  const int64_t bytes = SimilarityKlCudaWorkspaceBytes(problem, true);
  if (bytes > int64_t{100} << 20) {
    ++failures;
    std::printf("FAILED workspace: %lld bytes\n", static_cast<long long>(bytes));
  }
  std::printf("%-34s %3d cases\n", "workspace", 1);
}

}  // namespace
}  // namespace s2sd

int main() {
  s2sd::TestTiles();
  s2sd::TestWorkspace();
  s2sd::TestSmall();
  s2sd::TestLarge(64);
  s2sd::TestLarge(128);
  s2sd::TestDepth();
  s2sd::TestManyTeachers();
  s2sd::TestDeterminism();
  s2sd::TestInvalid();
  std::printf("%s\n", s2sd::failures == 0 ? "all passed" : "FAILED");
  return s2sd::failures == 0 ? 0 : 1;
}
