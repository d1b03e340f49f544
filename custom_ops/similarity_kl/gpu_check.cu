// Checks the CUDA kernels on a GPU, without TensorFlow. gpu_check.py builds and runs this.
//
//   gpu_check [--sanitize] [--quick] [--lines=PATH]
//
// Values are compared with the definition in double, computed on the CPU if small and otherwise on the GPU by plain
// kernels. Errors are reported next to those of the definition in float32 or TF32. --sanitize: small problems that
// reach every kernel, for compute-sanitizer. Memory is then not filled before use, so that reads of uninitialised
// memory are found. --quick skips the large problems. --lines: writes one line of JSON per check as soon as it is done.
// Exits with 1 on failure.

#ifdef __CUDACC__
#include "cuda_primitives.cuh"
#else
#undef _FORTIFY_SOURCE  // the emulator jumps between stacks
#include "cuda_kernel.cu"
#endif

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda_kernel.h"
#include "reference.h"

namespace s2sd {
namespace {

void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

template <typename... Parameters, typename... Arguments>
void Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  Check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "launch");
}

bool fill_memory = true;

// Filled with NaNs, so that use before writing shows. A sanitizer would take the filling for writing.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t count) : count_(count) {
    Check(cudaMalloc(&data_, count * sizeof(T)), "cudaMalloc");
    if (fill_memory) Check(cudaMemset(data_, 0xff, count * sizeof(T)), "cudaMemset");
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(static_cast<int64_t>(values.size())) {
    Check(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }

  T* data() { return data_; }
  std::vector<T> ToHost() const {
    std::vector<T> values(count_);
    Check(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }

 private:
  T* data_ = nullptr;
  int64_t count_;
};

struct Case {
  int64_t columns;
  int64_t row_offset;
  int64_t rows;
  int64_t dim;
  std::vector<int64_t> teacher_dims;
  float temperature = 1;
  Scalar scalar = Scalar::kFloat32;
  bool allow_tf32 = false;
  CudaPath path = CudaPath::kAuto;
  int64_t kept_tiles = -1;  // all
  bool gradient = true;
  float length = 1;          // of the rows
  bool on_device = false;    // the reference
  int64_t misalignment = 0;  // of every matrix, in scalars

  bool tf32() const { return allow_tf32 && scalar == Scalar::kFloat32; }
};

std::string Describe(const Case& c) {
  std::string dims;
  for (int64_t dim : c.teacher_dims) dims += (dims.empty() ? "" : ",") + std::to_string(dim);
  const char* type = c.scalar == Scalar::kFloat16    ? "float16"
                     : c.scalar == Scalar::kBfloat16 ? "bfloat16"
                     : c.allow_tf32                  ? "TF32"
                                                     : "float32";
  const char* paths[] = {"auto", "small 16", "small 32", "large 64", "large 128"};
  char text[256];
  std::snprintf(text, sizeof(text), "%lld of %lld x %lld, teachers %s, T %g, %s, %s, kept %lld%s%s",
                static_cast<long long>(c.rows), static_cast<long long>(c.columns), static_cast<long long>(c.dim),
                dims.c_str(), c.temperature, type, paths[static_cast<int>(c.path)],
                static_cast<long long>(c.kept_tiles), c.gradient ? "" : ", value only",
                c.length == 1 ? "" : ", rows of other lengths");
  return text;
}

__device__ float Uniform(uint64_t key) {  // splitmix64, in (0, 1)
  key += 0x9e3779b97f4a7c15ull;
  key = (key ^ key >> 30) * 0xbf58476d1ce4e5b9ull;
  key = (key ^ key >> 27) * 0x94d049bb133111ebull;
  key ^= key >> 31;
  return (static_cast<float>(key >> 41) + 0.5f) * (1.0f / 8388608.0f);
}

__device__ float Normal(uint64_t key) {
  return sqrtf(-2.0f * logf(Uniform(2 * key))) * cospif(2.0f * Uniform(2 * key + 1));
}

// One block per row. Rows have length 1 and `length` alternately; rows 2 n and 2 n + 1 are of one class. Values are
// rounded to `scalar`.
__global__ void GenerateKernel(uint64_t seed, int64_t dim, Scalar scalar, float length, void* out) {
  __shared__ float sums[256];
  const int64_t row = blockIdx.x;
  const auto value = [&](int64_t d) {
    return Normal(seed << 48 ^ (row * dim + d)) + Normal(seed << 48 ^ 1ull << 47 ^ (row / 2 * dim + d));
  };
  float sum = 0;
  for (int64_t d = threadIdx.x; d < dim; d += blockDim.x) sum += value(d) * value(d);
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned n = 128; n > 0; n /= 2) {
    if (threadIdx.x < n) sums[threadIdx.x] += sums[threadIdx.x + n];
    __syncthreads();
  }
  const float scale = rsqrtf(sums[0]) * (row % 2 == 0 ? 1.0f : length);
  for (int64_t d = threadIdx.x; d < dim; d += blockDim.x) {
    const float x = value(d) * scale;
    const int64_t n = row * dim + d;
    if (scalar == Scalar::kFloat32) static_cast<float*>(out)[n] = x;
    if (scalar == Scalar::kFloat16) static_cast<uint16_t*>(out)[n] = cuda::FloatToFloat16(x);
    if (scalar == Scalar::kBfloat16) {
      const unsigned bits = __float_as_uint(x);
      static_cast<uint16_t*>(out)[n] = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
  }
}

__global__ void ToFloatKernel(const void* in, Scalar scalar, int64_t count, float* out) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= count) return;
  const uint16_t* halves = static_cast<const uint16_t*>(in);
  out[n] = scalar == Scalar::kFloat32   ? static_cast<const float*>(in)[n]
           : scalar == Scalar::kFloat16 ? cuda::Float16ToFloat(halves[n])
                                        : __uint_as_float(static_cast<unsigned>(halves[n]) << 16);
}

// All inputs of the kernel, on the device.
struct Inputs {
  explicit Inputs(const Case& c)
      : shape(c), temperature(std::vector<float>{c.temperature}), weights(MakeWeights(c.teacher_dims.size())) {
    const int64_t size = c.scalar == Scalar::kFloat32 ? 4 : 2;
    for (size_t m = 0; m <= c.teacher_dims.size(); ++m) {
      const int64_t dim = m == 0 ? c.dim : c.teacher_dims[m - 1];
      storage.push_back(std::make_unique<DeviceArray<char>>((c.columns * dim + c.misalignment) * size));
      char* data = storage.back()->data() + c.misalignment * size;
      Launch(GenerateKernel, static_cast<unsigned>(c.columns), 256, m + 1, dim, c.scalar, c.length, data);
      matrices.push_back({data, dim});
    }
  }

  static std::vector<float> MakeWeights(size_t count) {
    std::vector<float> weights;
    for (size_t k = 0; k < count; ++k) weights.push_back(0.5f + 0.25f * static_cast<float>(k % 4));
    return weights;
  }

  Problem problem() {
    return {shape.scalar,
            shape.columns,
            shape.row_offset,
            shape.rows,
            matrices[0],
            matrices.data() + 1,
            static_cast<int>(matrices.size()) - 1,
            temperature.data(),
            weights.data()};
  }

  std::unique_ptr<DeviceArray<float>> AsFloat(size_t m) {
    const int64_t count = shape.columns * matrices[m].dim;
    auto values = std::make_unique<DeviceArray<float>>(count);
    Launch(ToFloatKernel, static_cast<unsigned>((count + 255) / 256), 256, matrices[m].data, shape.scalar, count,
           values->data());
    return values;
  }

  HostProblem ToHost() {
    HostProblem host = {shape.columns, shape.row_offset, shape.rows, shape.temperature, weights.ToHost(), {}};
    for (size_t m = 0; m < matrices.size(); ++m) host.matrices.push_back(AsFloat(m)->ToHost());
    return host;
  }

  const Case shape;
  DeviceArray<float> temperature;
  DeviceArray<float> weights;
  std::vector<std::unique_ptr<DeviceArray<char>>> storage;
  std::vector<Matrix> matrices;
};

// One call with its own memory, on its own stream, which waits for no other.
// `kept_tiles` is that of a `Case`.
HostResults RunKernel(Inputs* inputs, int64_t kept_tiles) {
  const Case& c = inputs->shape;
  CudaOptions options;
  options.allow_tf32 = c.allow_tf32;
  options.path = c.path;
  const int64_t tile = PlanCuda(inputs->problem(), options, c.gradient).tile;
  const int64_t tile_bytes = tile * tile * 4 * static_cast<int64_t>(inputs->matrices.size());
  options.kept_bytes = kept_tiles < 0 ? int64_t{4} << 30 : kept_tiles * tile_bytes;
  DeviceArray<char> workspace(PlanCuda(inputs->problem(), options, c.gradient).workspace_bytes);
  DeviceArray<float> total(1), per_teacher(inputs->matrices.size() - 1), gradient(c.columns * c.dim);
  Check(cudaDeviceSynchronize(), "inputs");
  cudaStream_t stream;
  Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  const Outputs outputs = {total.data(), per_teacher.data(), c.gradient ? gradient.data() : nullptr};
  const char* error = SimilarityKlCuda(inputs->problem(), options, outputs, workspace.data(), stream);
  if (error != nullptr) {
    std::fprintf(stderr, "SimilarityKlCuda: %s: %s\n", Describe(c).c_str(), error);
    std::exit(1);
  }
  Check(cudaStreamSynchronize(stream), "kernel");
  Check(cudaStreamDestroy(stream), "cudaStreamDestroy");
  const std::vector<float> k = per_teacher.ToHost();
  HostResults results;
  results.total = total.ToHost()[0];
  results.per_teacher.assign(k.begin(), k.end());
  if (c.gradient) {
    const std::vector<float> g = gradient.ToHost();
    results.gradient.assign(g.begin(), g.end());
  }
  return results;
}

// Computes the definition on the GPU, for shapes that would take a CPU too long: one plain kernel per step, every
// number of type T, the factors of products rounded to TF32 first if asked for.

template <typename T>
__device__ T Factor(T x, bool tf32) {
  return tf32 ? static_cast<T>(__uint_as_float((__float_as_uint(static_cast<float>(x)) + 0x1000u) & 0xffffe000u)) : x;
}

template <typename T>
__global__ void LogitsKernel(const float* x, int64_t columns, int64_t row_offset, int64_t rows, int64_t dim, T t,
                             bool tf32, T* logits) {
  __shared__ float a[16][17];
  __shared__ float b[16][17];
  const int64_t i = static_cast<int64_t>(blockIdx.y) * 16 + threadIdx.y;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * 16 + threadIdx.x;
  const int64_t b_row = static_cast<int64_t>(blockIdx.x) * 16 + threadIdx.y;
  T s = 0;
  for (int64_t first = 0; first < dim; first += 16) {
    const int64_t d = first + threadIdx.x;
    a[threadIdx.y][threadIdx.x] = i < rows && d < dim ? x[(row_offset + i) * dim + d] : 0.0f;
    b[threadIdx.y][threadIdx.x] = b_row < columns && d < dim ? x[b_row * dim + d] : 0.0f;
    __syncthreads();
    for (int k = 0; k < 16; ++k) s += Factor<T>(a[threadIdx.y][k], tf32) * Factor<T>(b[threadIdx.x][k], tf32);
    __syncthreads();
  }
  if (i < rows && j < columns) logits[i * columns + j] = s / t;
}

template <typename T, typename Combine>
__device__ T BlockReduce(T x, T* shared, Combine combine) {
  __syncthreads();
  shared[threadIdx.x] = x;
  __syncthreads();
  for (unsigned n = 128; n > 0; n /= 2) {
    if (threadIdx.x < n) shared[threadIdx.x] = combine(shared[threadIdx.x], shared[threadIdx.x + n]);
    __syncthreads();
  }
  return shared[0];
}

template <typename T>
__global__ void LogSoftmaxKernel(int64_t columns, T* logits) {
  __shared__ T shared[256];
  T* row = logits + blockIdx.x * columns;
  T max = row[0];
  for (int64_t j = threadIdx.x; j < columns; j += 256) max = row[j] > max ? row[j] : max;
  max = BlockReduce(max, shared, [](T a, T b) { return a > b ? a : b; });
  T sum = 0;
  for (int64_t j = threadIdx.x; j < columns; j += 256) sum += exp(row[j] - max);
  sum = BlockReduce(sum, shared, [](T a, T b) { return a + b; });
  for (int64_t j = threadIdx.x; j < columns; j += 256) row[j] -= max + log(sum);
}

template <typename T>
__global__ void KlKernel(const T* teacher, const T* student, int64_t columns, T scale, T* g, T* row_kl) {
  __shared__ T shared[256];
  T sum = 0;
  for (int64_t j = threadIdx.x; j < columns; j += 256) {
    const int64_t n = blockIdx.x * columns + j;
    sum += exp(teacher[n]) * (teacher[n] - student[n]);
    g[n] += scale * (exp(student[n]) - exp(teacher[n]));
  }
  sum = BlockReduce(sum, shared, [](T a, T b) { return a + b; });
  if (threadIdx.x == 0) row_kl[blockIdx.x] = sum;
}

template <typename T>
__global__ void ProductKernel(const T* g, const float* z, int64_t columns, int64_t row_offset, int64_t rows,
                              int64_t dim, bool tf32, T* gradient) {
  const int64_t n = blockIdx.x;
  const int64_t local = n - row_offset;
  for (int64_t d = threadIdx.x; d < dim; d += blockDim.x) {
    T sum = 0;
    if (local >= 0 && local < rows) {
      for (int64_t j = 0; j < columns; ++j) {
        sum += Factor(g[local * columns + j], tf32) * Factor<T>(z[j * dim + d], tf32);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      sum += Factor(g[i * columns + n], tf32) * Factor<T>(z[(row_offset + i) * dim + d], tf32);
    }
    gradient[n * dim + d] = sum;
  }
}

template <typename T>
HostResults ComposedOnDevice(Inputs* inputs, bool tf32 = false) {
  const Case& shape = inputs->shape;
  const unsigned rows = static_cast<unsigned>(shape.rows);
  DeviceArray<T> student(shape.rows * shape.columns), teacher(shape.rows * shape.columns);
  DeviceArray<T> g(shape.rows * shape.columns), row_kl(shape.rows), gradient(shape.columns * shape.dim);
  Check(cudaMemset(g.data(), 0, shape.rows * shape.columns * sizeof(T)), "cudaMemset");
  const std::vector<float> weights = inputs->weights.ToHost();
  const T t = shape.temperature;
  HostResults results;
  T total = 0;
  for (size_t m = 0; m < inputs->matrices.size(); ++m) {
    const auto values = inputs->AsFloat(m);
    DeviceArray<T>& log_p = m == 0 ? student : teacher;
    const dim3 grid(static_cast<unsigned>((shape.columns + 15) / 16), (rows + 15) / 16);
    Launch(LogitsKernel<T>, grid, dim3(16, 16), values->data(), shape.columns, shape.row_offset, shape.rows,
           inputs->matrices[m].dim, t, tf32, log_p.data());
    Launch(LogSoftmaxKernel<T>, rows, 256, shape.columns, log_p.data());
    if (m > 0) {
      const T weight = weights[m - 1];
      Launch(KlKernel<T>, rows, 256, teacher.data(), student.data(), shape.columns,
             t / static_cast<T>(shape.rows) * weight, g.data(), row_kl.data());
      T kl = 0;
      for (T x : row_kl.ToHost()) kl += x;
      kl *= t * t / static_cast<T>(shape.rows);
      results.per_teacher.push_back(kl);
      total += weight * kl;
    }
  }
  results.total = total;
  const auto z = inputs->AsFloat(0);
  Launch(ProductKernel<T>, static_cast<unsigned>(shape.columns), 128, g.data(), z->data(), shape.columns,
         shape.row_offset, shape.rows, shape.dim, tf32, gradient.data());
  Check(cudaDeviceSynchronize(), "reference kernels");
  const std::vector<T> host = gradient.ToHost();
  results.gradient.assign(host.begin(), host.end());
  return results;
}

double Distance(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t n = 0; n < a.size(); ++n) sum += (a[n] - b[n]) * (a[n] - b[n]);
  return std::sqrt(sum);
}

class Report {
 public:
  explicit Report(const std::string& path) {
    if (path.empty()) return;
    file_ = std::fopen(path.c_str(), "w");
    if (file_ != nullptr) return;
    std::fprintf(stderr, "cannot write %s\n", path.c_str());
    std::exit(2);
  }

  void Add(const std::string& check, bool good, const std::string& numbers) {
    ++checks_;
    if (!good) ++failures_;
    if (!good || file_ == nullptr) {
      std::printf("%-6s %s: %s\n", good ? "ok" : "FAILED", check.c_str(), numbers.c_str());
      std::fflush(stdout);
    }
    if (file_ == nullptr) return;
    std::fprintf(file_, "{\"check\": \"%s\", \"ok\": %s, %s}\n", check.c_str(), good ? "true" : "false",
                 numbers.c_str());
    std::fflush(file_);
  }

  int End() const {
    std::printf("%d checks, %d failed\n", checks_, failures_);
    return failures_ > 0;
  }

 private:
  std::FILE* file_ = nullptr;
  int checks_ = 0;
  int failures_ = 0;
};

// The limit is twice the error of the definition in the same precision. The gradient's error is taken over all its
// numbers together, because a single one may be right by luck. So may a divergence in TF32, which is judged with all
// others in CheckAll.
struct Tf32Kl {
  double kernel = 0;
  double composed = 0;
};

void CheckCase(const Case& c, Report* report, Tf32Kl* tf32_kl) {
  Inputs inputs(c);
  const HostResults results = RunKernel(&inputs, c.kept_tiles);
  const auto has_same_bits = [&](const HostResults& other) {
    return other.total == results.total && other.per_teacher == results.per_teacher &&
           other.gradient == results.gradient;
  };
  const bool same = has_same_bits(RunKernel(&inputs, c.kept_tiles));
  // Where memory is short, tiles are computed again instead of kept.
  const bool same_kept = has_same_bits(RunKernel(&inputs, c.kept_tiles == 0 ? -1 : 0));
  HostProblem host = {c.columns, c.row_offset, c.rows, c.temperature, inputs.weights.ToHost(), {}};
  HostResults truth, composed;
  if (c.on_device) {
    truth = ComposedOnDevice<double>(&inputs);
    composed = ComposedOnDevice<float>(&inputs, c.tf32());
  } else {
    host = inputs.ToHost();
    truth = Composed<double>(host);
    composed = Composed<float>(host, c.tf32());
  }
  const Limits limits = ErrorLimits(host, truth, composed);
  const double kl = MaxError(truth.per_teacher, results.per_teacher);
  const double composed_kl = MaxError(truth.per_teacher, composed.per_teacher);
  const double size = std::max(Distance(truth.gradient, std::vector<double>(truth.gradient.size(), 0)), 1e-30);
  const double composed_gradient = Distance(truth.gradient, composed.gradient);
  const double gradient = c.gradient ? Distance(truth.gradient, results.gradient) : 0;
  // Beyond twice the composed error the limits have a floor, here per number.
  const double floor = limits.gradient - 2 * MaxError(truth.gradient, composed.gradient);
  bool good = same && same_kept && gradient <= 2 * composed_gradient + floor * std::sqrt(double(c.columns * c.dim));
  if (c.tf32()) {
    tf32_kl->kernel += kl * kl;
    tf32_kl->composed += composed_kl * composed_kl;
    good = good && kl <= 8 * composed_kl + 1e-3 * c.temperature;
  } else {
    good = good && kl <= limits.per_teacher && std::fabs(truth.total - results.total) <= limits.total;
  }
  const auto text = [](double x) {
    char digits[32];
    std::snprintf(digits, sizeof(digits), "%.2e", x);
    return std::isfinite(x) ? std::string(digits) : std::string("null");  // JSON has no number for it
  };
  const std::string numbers = "\"kl_error\": " + text(kl) + ", \"composed_kl_error\": " + text(composed_kl) +
                              ", \"gradient_error\": " + text(gradient / size) +
                              ", \"composed_gradient_error\": " + text(composed_gradient / size) +
                              ", \"same_bits_twice\": " + (same ? "true" : "false") +
                              ", \"same_bits_however_many_kept\": " + (same_kept ? "true" : "false");
  report->Add(Describe(c), good, numbers);
}

// NaN in, NaN out.
void CheckInvalid(CudaPath path, Report* report) {
  for (int bad = 0; bad < 3; ++bad) {
    Case c = {70, 20, 41, 16, {24}, bad == 2 ? -1.0f : 0.1f};
    c.path = path;
    Inputs inputs(c);
    const float value = bad == 0 ? NAN : INFINITY;
    if (bad < 2) {
      Check(cudaMemcpy(inputs.storage[bad]->data() + 4 * 7, &value, 4, cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    const HostResults results = RunKernel(&inputs, c.kept_tiles);
    bool all = std::isnan(results.total) && std::isnan(results.per_teacher[0]);
    for (double x : results.gradient) all = all && std::isnan(x);
    const char* what[] = {"a NaN in the student", "infinity in a teacher", "a negative temperature"};
    report->Add(std::string(what[bad]) + ", " + Describe(c), all,
                "\"all_nan\": " + std::string(all ? "true" : "false"));
  }
}

int CheckAll(bool sanitize, bool quick, const std::string& lines) {
  Report report(lines);
  Tf32Kl tf32_kl;
  const std::vector<int64_t> paper = {512, 1024, 1536, 2048, 2048};
  struct Type {
    Scalar scalar;
    bool allow_tf32;
  };
  for (const Type& type : std::vector<Type>{{Scalar::kFloat32, false},
                                            {Scalar::kFloat32, true},
                                            {Scalar::kFloat16, false},
                                            {Scalar::kBfloat16, false}}) {
    const auto check = [&](Case c) {
      c.scalar = type.scalar;
      c.allow_tf32 = type.allow_tf32;
      CheckCase(c, &report, &tf32_kl);
    };
    for (CudaPath path : {CudaPath::kSmall16, CudaPath::kSmall32, CudaPath::kLarge64, CudaPath::kLarge128}) {
      const bool large = path == CudaPath::kLarge64 || path == CudaPath::kLarge128;
      for (float t : {0.05f, 1.0f}) {
        if (sanitize && t == 1) continue;
        // Ragged edges, rectangles, odd and unaligned rows; none, some and all of the tiles kept.
        Case c = {large ? 150 : 41, 0, large ? 150 : 41, 33, {40, 7, 128}, t};
        c.path = path;
        c.kept_tiles = 1;
        check(c);
        c.row_offset = 13;
        c.rows = 23;
        check(c);
        c.misalignment = 1;
        c.kept_tiles = 0;
        check(c);
        c.length = 3;
        check(c);
        c.gradient = false;
        check(c);
        if (sanitize) continue;
        check({1, 0, 1, 1, {1}, t, {}, {}, path});
        check({112, 0, 112, 128, {512, 96}, t, {}, {}, path});
        check({112, 33, 50, 33, {128, 7}, t, {}, {}, path});
        check({256, 0, 256, 128, {300}, t, {}, {}, path});
        if (!large) continue;
        check({401, 123, 150, 100, {128, 7}, t, {}, {}, path});
        check({257, 0, 257, 128, {300, 65}, t, {}, {}, path});
        Case one = {257, 0, 257, 128, {300, 65}, t, {}, {}, path};
        one.gradient = false;
        check(one);
      }
    }
    if (sanitize) continue;
    for (float t : {0.05f, 1.0f}) {
      const auto check_on_device = [&](Case c) {
        c.temperature = t;
        c.on_device = true;
        check(c);
      };
      check_on_device({112, 0, 112, 128, paper});
      if (quick) continue;
      check_on_device({512, 0, 512, 128, paper});
      check_on_device({1271, 0, 1271, 128, paper});
      check_on_device({2051, 0, 2051, 33, {40, 129}});
      check_on_device({2048, 512, 512, 128, paper});
      check_on_device({4001, 1000, 2500, 100, {513, 96}});
      check_on_device({4096, 0, 4096, 128, paper});
      check_on_device({16384, 8001, 512, 128, paper});
    }
  }
  const double ratio = std::sqrt(tf32_kl.kernel / std::max(tf32_kl.composed, 1e-30));
  char numbers[64];
  std::snprintf(numbers, sizeof(numbers), "\"over_composed\": %.2f", ratio);
  if (!sanitize) report.Add("root mean square of the TF32 divergences' errors", ratio <= 2, numbers);
  for (CudaPath path : {CudaPath::kSmall16, CudaPath::kLarge64}) CheckInvalid(path, &report);
  return report.End();
}

}  // namespace
}  // namespace s2sd

int main(int argc, char** argv) {
  bool sanitize = false, quick = false;
  std::string lines;
  for (int n = 1; n < argc; ++n) {
    const std::string argument = argv[n];
    if (argument == "--sanitize") {
      sanitize = true;
    } else if (argument == "--quick") {
      quick = true;
    } else if (argument.rfind("--lines=", 0) == 0) {
      lines = argument.substr(8);
    } else {
      std::fprintf(stderr, "usage: %s [--sanitize] [--quick] [--lines=path]\n", argv[0]);
      return 2;
    }
  }
  s2sd::fill_memory = !sanitize;
  return s2sd::CheckAll(sanitize, quick, lines);
}
