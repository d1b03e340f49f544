// Tests and times the CUDA kernel on a GPU, without TensorFlow.
//
//   nvcc -O3 -std=c++17 -arch=native cuda_program.cu cuda_kernel.cu -o cuda_program
//   ./cuda_program [--json=path]
//   compute-sanitizer ./cuda_program --quick
//
// Values are checked against the definition in double, on the CPU where it is small, else on the GPU by plain kernels,
// and errors are put beside those of the definition in float32. --quick leaves out the large shapes and the timing.
// Exits with 1 after a failure.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
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

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t count) : count_(count) {
    Check(cudaMalloc(&data_, count * sizeof(T)), "cudaMalloc");
    Check(cudaMemset(data_, 0xff, count * sizeof(T)), "cudaMemset");
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

struct Shape {
  int64_t columns;
  int64_t row_offset;
  int64_t rows;
  int64_t dim;
  std::vector<int64_t> teacher_dims;
  float temperature;
  Scalar scalar;
  bool allow_tf32;
};

std::string Describe(const Shape& shape) {
  std::string dims;
  for (int64_t dim : shape.teacher_dims) dims += (dims.empty() ? "" : ",") + std::to_string(dim);
  const char* type = shape.scalar == Scalar::kFloat16    ? "float16"
                     : shape.scalar == Scalar::kBfloat16 ? "bfloat16"
                     : shape.allow_tf32                  ? "float32 as TF32"
                                                         : "float32";
  char text[256];
  std::snprintf(text, sizeof(text), "%lld of %lld x %lld, teachers %s, T %g, %s", static_cast<long long>(shape.rows),
                static_cast<long long>(shape.columns), static_cast<long long>(shape.dim), dims.c_str(),
                shape.temperature, type);
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

// One block a row, normalised; rows 2 n and 2 n + 1 are of one class. Values are rounded to `scalar`.
__global__ void GenerateKernel(uint64_t seed, int64_t dim, Scalar scalar, void* out) {
  __shared__ float sums[256];
  const int64_t row = blockIdx.x;
  const auto value = [&](int64_t d) {
    return Normal(seed << 48 ^ (row * dim + d)) + Normal(seed << 48 ^ 1ull << 47 ^ (row / 2 * dim + d));
  };
  float sum = 0;
  for (int64_t d = threadIdx.x; d < dim; d += blockDim.x) sum += value(d) * value(d);
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int n = 128; n > 0; n /= 2) {
    if (threadIdx.x < n) sums[threadIdx.x] += sums[threadIdx.x + n];
    __syncthreads();
  }
  const float scale = rsqrtf(sums[0]);
  for (int64_t d = threadIdx.x; d < dim; d += blockDim.x) {
    const float x = value(d) * scale;
    const int64_t n = row * dim + d;
    if (scalar == Scalar::kFloat32) static_cast<float*>(out)[n] = x;
    if (scalar == Scalar::kFloat16) static_cast<__half*>(out)[n] = __float2half(x);
    if (scalar == Scalar::kBfloat16) static_cast<__nv_bfloat16*>(out)[n] = __float2bfloat16(x);
  }
}

__global__ void ToFloatKernel(const void* in, Scalar scalar, int64_t count, float* out) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= count) return;
  out[n] = scalar == Scalar::kFloat32   ? static_cast<const float*>(in)[n]
           : scalar == Scalar::kFloat16 ? __half2float(static_cast<const __half*>(in)[n])
                                        : __bfloat162float(static_cast<const __nv_bfloat16*>(in)[n]);
}

// Everything the kernel needs, on the device.
struct Inputs {
  explicit Inputs(const Shape& shape)
      : shape(shape),
        temperature(std::vector<float>{shape.temperature}),
        weights(MakeWeights(shape.teacher_dims.size())) {
    const int64_t size = shape.scalar == Scalar::kFloat32 ? 4 : 2;
    for (size_t m = 0; m <= shape.teacher_dims.size(); ++m) {
      const int64_t dim = m == 0 ? shape.dim : shape.teacher_dims[m - 1];
      storage.push_back(std::make_unique<DeviceArray<char>>(shape.columns * dim * size));
      GenerateKernel<<<static_cast<unsigned>(shape.columns), 256>>>(m + 1, dim, shape.scalar, storage.back()->data());
      Check(cudaGetLastError(), "GenerateKernel");
      matrices.push_back({storage.back()->data(), dim});
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
    ToFloatKernel<<<static_cast<unsigned>((count + 255) / 256), 256>>>(matrices[m].data, shape.scalar, count,
                                                                       values->data());
    Check(cudaGetLastError(), "ToFloatKernel");
    return values;
  }

  HostProblem ToHost() {
    HostProblem host = {shape.columns, shape.row_offset, shape.rows, shape.temperature, weights.ToHost(), {}};
    for (size_t m = 0; m < matrices.size(); ++m) host.matrices.push_back(AsFloat(m)->ToHost());
    return host;
  }

  const Shape shape;
  DeviceArray<float> temperature;
  DeviceArray<float> weights;
  std::vector<std::unique_ptr<DeviceArray<char>>> storage;
  std::vector<Matrix> matrices;
};

struct Run {
  explicit Run(Inputs* inputs, bool with_gradient)
      : inputs(inputs),
        workspace_bytes(SimilarityKlCudaWorkspaceBytes(inputs->problem(), with_gradient)),
        total(1),
        per_teacher(inputs->matrices.size() - 1),
        gradient(inputs->shape.columns * inputs->shape.dim),
        workspace(workspace_bytes),
        with_gradient(with_gradient) {}

  void Enqueue() {
    const Outputs outputs = {total.data(), per_teacher.data(), with_gradient ? gradient.data() : nullptr};
    const char* error =
        SimilarityKlCuda(inputs->problem(), {inputs->shape.allow_tf32}, outputs, workspace.data(), nullptr);
    if (error != nullptr) {
      std::fprintf(stderr, "SimilarityKlCuda: %s\n", error);
      std::exit(1);
    }
  }

  HostResults Results() {
    Check(cudaDeviceSynchronize(), "kernel");
    const std::vector<float> k = per_teacher.ToHost();
    const std::vector<float> g = gradient.ToHost();
    HostResults results;
    results.total = total.ToHost()[0];
    results.per_teacher.assign(k.begin(), k.end());
    results.gradient.assign(g.begin(), g.end());
    return results;
  }

  Inputs* inputs;
  int64_t workspace_bytes;
  DeviceArray<float> total;
  DeviceArray<float> per_teacher;
  DeviceArray<float> gradient;
  DeviceArray<char> workspace;
  bool with_gradient;
};

// The definition once more, for shapes that take a CPU too long: one plain kernel a step, every number of type T.

template <typename T>
__global__ void LogitsKernel(const float* x, int64_t columns, int64_t row_offset, int64_t rows, int64_t dim, T t,
                             T* logits) {
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
    for (int k = 0; k < 16; ++k) s += static_cast<T>(a[threadIdx.y][k]) * static_cast<T>(b[threadIdx.x][k]);
    __syncthreads();
  }
  if (i < rows && j < columns) logits[i * columns + j] = s / t;
}

template <typename T, typename Combine>
__device__ T BlockReduce(T x, T* shared, Combine combine) {
  __syncthreads();
  shared[threadIdx.x] = x;
  __syncthreads();
  for (int n = 128; n > 0; n /= 2) {
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
                              int64_t dim, T* gradient) {
  const int64_t n = blockIdx.x;
  const int64_t local = n - row_offset;
  for (int64_t d = threadIdx.x; d < dim; d += blockDim.x) {
    T sum = 0;
    if (local >= 0 && local < rows) {
      for (int64_t j = 0; j < columns; ++j) sum += g[local * columns + j] * static_cast<T>(z[j * dim + d]);
    }
    for (int64_t i = 0; i < rows; ++i) sum += g[i * columns + n] * static_cast<T>(z[(row_offset + i) * dim + d]);
    gradient[n * dim + d] = sum;
  }
}

template <typename T>
HostResults ComposedOnDevice(Inputs* inputs) {
  const Shape& shape = inputs->shape;
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
    LogitsKernel<T><<<grid, dim3(16, 16)>>>(values->data(), shape.columns, shape.row_offset, shape.rows,
                                            inputs->matrices[m].dim, t, log_p.data());
    LogSoftmaxKernel<T><<<rows, 256>>>(shape.columns, log_p.data());
    if (m > 0) {
      const T weight = weights[m - 1];
      KlKernel<T><<<rows, 256>>>(teacher.data(), student.data(), shape.columns, t / static_cast<T>(shape.rows) * weight,
                                 g.data(), row_kl.data());
      T kl = 0;
      for (T x : row_kl.ToHost()) kl += x;
      kl *= t * t / static_cast<T>(shape.rows);
      results.per_teacher.push_back(kl);
      total += weight * kl;
    }
  }
  results.total = total;
  const auto z = inputs->AsFloat(0);
  ProductKernel<T><<<static_cast<unsigned>(shape.columns), 128>>>(g.data(), z->data(), shape.columns, shape.row_offset,
                                                                  shape.rows, shape.dim, gradient.data());
  Check(cudaDeviceSynchronize(), "reference kernels");
  const std::vector<T> host = gradient.ToHost();
  results.gradient.assign(host.begin(), host.end());
  return results;
}

struct Report {
  std::string json;
  bool failed = false;

  void Add(const std::string& object) { json += (json.empty() ? "    " : ",\n    ") + object; }
};

void CheckShape(const Shape& shape, bool on_device, Report* report) {
  Inputs inputs(shape);
  Run run(&inputs, true);
  run.Enqueue();
  const HostResults results = run.Results();
  run.Enqueue();
  const HostResults again = run.Results();
  HostProblem host = {shape.columns, shape.row_offset, shape.rows, shape.temperature, inputs.weights.ToHost(), {}};
  HostResults truth, composed;
  if (on_device) {
    truth = ComposedOnDevice<double>(&inputs);
    composed = ComposedOnDevice<float>(&inputs);
  } else {
    host = inputs.ToHost();
    truth = Composed<double>(host);
    composed = Composed<float>(host);
  }
  const Limits limits = ErrorLimits(host, truth, composed, shape.allow_tf32);
  const double kl = MaxError(truth.per_teacher, results.per_teacher);
  const double gradient = MaxError(truth.gradient, results.gradient);
  const double composed_kl = MaxError(truth.per_teacher, composed.per_teacher);
  const double composed_gradient = MaxError(truth.gradient, composed.gradient);
  const bool same =
      again.total == results.total && again.per_teacher == results.per_teacher && again.gradient == results.gradient;
  const bool good = same && kl <= limits.per_teacher && gradient <= limits.gradient &&
                    std::fabs(truth.total - results.total) <= limits.total;
  const double size = MaxAbs(truth.gradient);
  std::printf("%-6s %-62s KL error %.1e (composed %.1e), gradient %.1e (composed %.1e) of %.1e%s\n",
              good ? "ok" : "FAILED", Describe(shape).c_str(), kl, composed_kl, gradient, composed_gradient, size,
              same ? "" : ", NOT DETERMINISTIC");
  std::fflush(stdout);
  if (!good) report->failed = true;
  char object[1024];
  std::snprintf(object, sizeof(object),
                "{\"check\": \"%s\", \"ok\": %s, \"kl_error\": %.3e, \"composed_kl_error\": %.3e, "
                "\"gradient_error\": %.3e, \"composed_gradient_error\": %.3e, \"gradient_size\": %.3e}",
                Describe(shape).c_str(), good ? "true" : "false", kl, composed_kl, gradient, composed_gradient, size);
  report->Add(object);
}

void CheckInvalid(Report* report) {
  for (int64_t columns : {41, 300}) {
    for (int bad = 0; bad < 3; ++bad) {
      Inputs inputs({columns, 0, columns, 16, {24}, bad == 2 ? -1.0f : 0.1f, Scalar::kFloat32, false});
      const float value = bad == 0 ? NAN : 3.0f;
      if (bad < 2) {
        Check(cudaMemcpy(inputs.storage[1]->data() + 4 * 7, &value, 4, cudaMemcpyHostToDevice), "cudaMemcpy");
      }
      Run run(&inputs, true);
      run.Enqueue();
      const HostResults results = run.Results();
      bool all = std::isnan(results.total) && std::isnan(results.per_teacher[0]);
      for (double x : results.gradient) all = all && std::isnan(x);
      if (!all) report->failed = true;
      std::printf("%-6s %lld rows, %s\n", all ? "ok" : "FAILED", static_cast<long long>(columns),
                  bad == 0   ? "NaN in, NaN out"
                  : bad == 1 ? "a row that is not normalised"
                             : "negative temperature");
    }
  }
}

// Dense TF32 multiply-adds a clock and multiprocessor; 0: not known.
int Tf32Rate(int major, int minor) {
  if (major == 8) return minor == 0 ? 512 : 128;
  if (major == 9) return 1024;
  if (major == 10) return 2048;
  if (major == 12) return 128;
  return 0;
}

struct DeviceInfo {
  std::string name;
  double tf32_peak;  // floating-point operations a second, or 0
};

DeviceInfo QueryDevice() {
  int id = 0, clock_khz = 0;
  cudaDeviceProp properties;
  Check(cudaGetDevice(&id), "cudaGetDevice");
  Check(cudaGetDeviceProperties(&properties, id), "cudaGetDeviceProperties");
  Check(cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, id), "cudaDeviceGetAttribute");
  return {properties.name, 2e3 * Tf32Rate(properties.major, properties.minor) * properties.multiProcessorCount *
                               static_cast<double>(clock_khz)};
}

// Tensor-core operations that the large path needs: half the similarity matrices, once a pass, and H z.
double TensorOperations(const Shape& shape, bool gradient) {
  const double b = static_cast<double>(shape.columns);
  double dims = static_cast<double>(shape.dim);
  for (int64_t dim : shape.teacher_dims) dims += static_cast<double>(dim);
  const double split = shape.scalar == Scalar::kFloat32 && !shape.allow_tf32 ? 3 : 1;
  const double gradient_split = shape.scalar != Scalar::kFloat32 ? 2 : split;
  return b * (b + 1) * dims * split * (gradient ? 2 : 1) +
         (gradient ? 2 * b * b * static_cast<double>(shape.dim) * gradient_split : 0);
}

void Time(const Shape& shape, bool gradient, const DeviceInfo& device, Report* report) {
  Inputs inputs(shape);
  Run run(&inputs, gradient);
  cudaEvent_t start, stop;
  Check(cudaEventCreate(&start), "cudaEventCreate");
  Check(cudaEventCreate(&stop), "cudaEventCreate");
  const int warmups = shape.columns > 8192 ? 1 : 10;
  const int repeats = shape.columns > 32768 ? 5 : shape.columns > 8192 ? 15 : 100;
  std::vector<float> times;
  for (int n = 0; n < warmups + repeats; ++n) {
    Check(cudaEventRecord(start), "cudaEventRecord");
    run.Enqueue();
    Check(cudaEventRecord(stop), "cudaEventRecord");
    Check(cudaEventSynchronize(stop), "cudaEventSynchronize");
    float ms = 0;
    Check(cudaEventElapsedTime(&ms, start, stop), "cudaEventElapsedTime");
    if (n >= warmups) times.push_back(ms);
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  std::sort(times.begin(), times.end());
  const float lower = times[times.size() / 4];
  const float median = times[times.size() / 2];
  const float upper = times[times.size() * 3 / 4];
  const double rate = TensorOperations(shape, gradient) / (median * 1e-3);
  const double fraction = device.tf32_peak > 0 ? rate / device.tf32_peak : 0;
  std::printf("%-62s %s %10.4f ms (quartiles %.4f, %.4f), workspace %.1f MiB, %.1f TFLOP/s, %.0f%% of TF32 peak\n",
              Describe(shape).c_str(), gradient ? "with gradient" : "value only   ", median, lower, upper,
              static_cast<double>(run.workspace_bytes) / (1 << 20), rate * 1e-12, 100 * fraction);
  std::fflush(stdout);
  char object[1024];
  std::snprintf(object, sizeof(object),
                "{\"time\": \"%s\", \"columns\": %lld, \"gradient\": %s, \"ms\": %.5f, \"ms_lower_quartile\": %.5f, "
                "\"ms_upper_quartile\": %.5f, \"workspace_bytes\": %lld, \"tensor_flops_per_s\": %.4e, "
                "\"fraction_of_tf32_peak\": %.4f}",
                Describe(shape).c_str(), static_cast<long long>(shape.columns), gradient ? "true" : "false", median,
                lower, upper, static_cast<long long>(run.workspace_bytes), rate, fraction);
  report->Add(object);
}

int Main(bool quick, const std::string& json_path) {
  const DeviceInfo device = QueryDevice();
  std::printf("%s, TF32 peak %.0f TFLOP/s\n", device.name.c_str(), device.tf32_peak * 1e-12);
  Report report;
  const std::vector<int64_t> paper = {512, 1024, 1536, 2048, 2048};
  struct Type {
    Scalar scalar;
    bool allow_tf32;
  };
  const std::vector<Type> types = {
      {Scalar::kFloat32, false}, {Scalar::kFloat32, true}, {Scalar::kFloat16, false}, {Scalar::kBfloat16, false}};
  for (const Type& type : types) {
    for (float t : {0.1f, 1.0f}) {
      const auto check = [&](int64_t columns, int64_t row_offset, int64_t rows, int64_t dim,
                             const std::vector<int64_t>& teachers, bool on_device) {
        CheckShape({columns, row_offset, rows, dim, teachers, t, type.scalar, type.allow_tf32}, on_device, &report);
      };
      check(1, 0, 1, 1, {1}, false);
      check(41, 0, 41, 7, {33, 300, 1}, false);
      check(112, 0, 112, 128, {512, 96}, false);
      check(112, 33, 50, 33, {128, 7}, false);
      check(256, 0, 256, 128, {300}, false);
      check(257, 0, 257, 128, {300, 65}, false);
      check(401, 123, 150, 100, {128, 7}, false);
      if (quick) continue;
      check(112, 0, 112, 128, paper, true);
      check(1271, 0, 1271, 128, paper, true);
      check(2048, 512, 512, 128, paper, true);
      check(4096, 0, 4096, 128, paper, true);
    }
  }
  CheckInvalid(&report);
  if (!quick) {
    for (int64_t columns : {112, 512, 2048, 4096, 16384, 65536}) {
      for (const Type& type : types) {
        const Shape shape = {columns, 0, columns, 128, paper, 1, type.scalar, type.allow_tf32};
        Time(shape, true, device, &report);
        Time(shape, false, device, &report);
      }
    }
  }
  if (!json_path.empty()) {
    std::FILE* file = std::fopen(json_path.c_str(), "w");
    if (file == nullptr) {
      std::fprintf(stderr, "cannot write %s\n", json_path.c_str());
      return 1;
    }
    std::fprintf(file, "{\n  \"device\": \"%s\",\n  \"tf32_peak_flops_per_s\": %.4e,\n  \"results\": [\n%s\n  ]\n}\n",
                 device.name.c_str(), device.tf32_peak, report.json.c_str());
    std::fclose(file);
  }
  std::printf("%s\n", report.failed ? "FAILED" : "all passed");
  return report.failed ? 1 : 0;
}

}  // namespace
}  // namespace s2sd

int main(int argc, char** argv) {
  bool quick = false;
  std::string json_path;
  for (int n = 1; n < argc; ++n) {
    const std::string argument = argv[n];
    if (argument == "--quick") {
      quick = true;
    } else if (argument.rfind("--json=", 0) == 0) {
      json_path = argument.substr(7);
    } else {
      std::fprintf(stderr, "usage: %s [--quick] [--json=path]\n", argv[0]);
      return 2;
    }
  }
  return s2sd::Main(quick, json_path);
}
