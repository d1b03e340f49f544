// What the large and the small path share: parameters, tile numbering, loads, and products on tensor cores.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_COMMON_CUH_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_COMMON_CUH_

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "cuda_kernel.h"
#include "cuda_primitives.cuh"

namespace s2sd {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.44269504f;

// A similarity is at most the larger of two squared norms, so up to this norm nothing below overflows.
constexpr float kMaxSquaredNorm = 1e36f;
// Below this, log2(e) / T overflows.
constexpr float kMinTemperature = 1e-37f;

// The widest load that a matrix's base address and row pitch allow, in bytes.
enum class Access : int { k16, k4, k2 };

struct DeviceMatrix {
  const char* data;
  int dim;
  int row_bytes;
  Access access;
};

// The parameters of both paths.
struct Params {
  int columns;
  int row_offset;
  int rows;
  bool square;
  int num_matrices;  // student, then teachers
  const float* temperature;
  const float* weights;
  float* total;
  float* per_teacher;
  float* gradient;
  float* inverse_sums;  // (num_matrices, rows)
  DeviceMatrix matrices[1 + kCudaMaxTeachers];
};

inline __host__ __device__ int CeilDiv(int a, int b) { return (a + b - 1) / b; }

struct Tile {
  int row;
  int column;
};

// The pair (i <= j) at position `index` in (0,0), (0,1), (1,1), (0,2), ...
inline __host__ __device__ Tile TriangularPair(int index) {
  // The square root is a first guess, corrected in integers.
  int j = static_cast<int>((sqrtf(8.0f * static_cast<float>(index) + 1.0f) - 1.0f) * 0.5f);
  while (static_cast<int64_t>(j) * (j + 1) / 2 > index) --j;
  while (static_cast<int64_t>(j + 1) * (j + 2) / 2 <= index) ++j;
  return {static_cast<int>(index - static_cast<int64_t>(j) * (j + 1) / 2), j};
}

inline __host__ __device__ int64_t NumTiles(bool square, int row_tiles, int column_tiles) {
  const int64_t n = column_tiles;
  return square ? n * (n + 1) / 2 : row_tiles * n;
}

// Tiles go in bands of 8 tile columns, row by row within a band, so that the tiles in flight share
// their rows in the L2 cache.
inline __host__ __device__ Tile DecodeTile(bool square, int index, int row_tiles, int column_tiles) {
  constexpr int kBand = 8;
  int band;
  int64_t before;
  if (square) {
    band = TriangularPair(index).column / kBand;
    before = static_cast<int64_t>(band) * kBand * (band * kBand + 1) / 2;
  } else {
    band = static_cast<int>(index / (static_cast<int64_t>(kBand) * row_tiles));
    before = static_cast<int64_t>(band) * kBand * row_tiles;
  }
  const int first = band * kBand;
  const int width = column_tiles - first < kBand ? column_tiles - first : kBand;
  const int within = static_cast<int>(index - before);
  const int full_rows = square ? first : row_tiles;
  if (within < full_rows * width) return {within / width, first + within % width};
  const Tile corner = TriangularPair(within - full_rows * width);
  return {first + corner.row, first + corner.column};
}

__device__ __forceinline__ bool ValidNorm(float squared_norm) {
  return squared_norm <= kMaxSquaredNorm;  // false for a NaN
}

__device__ __forceinline__ bool ValidScalars(const Params& p) {
  const float t = *p.temperature;
  bool valid = t >= kMinTemperature && t <= FLT_MAX;
  for (int k = 0; k < p.num_matrices - 1; ++k) valid = valid && fabsf(p.weights[k]) <= FLT_MAX;
  return valid;
}

// The base-2 logarithm of an exponential's bound; see kNormSlack in cuda_large.cuh.
constexpr float kMaxLog2Exp = 1.8f;

// exp((s - shift) / T) for scale = log2(e) / T. A product that is recomputed in another order may exceed its row's
// maximum by a rounding error, which a tiny T would magnify: hence the cap, which nothing else reaches.
__device__ __forceinline__ float ShiftedExp(float s, float shift, float scale) {
  return Exp2(fminf((s - shift) * scale, kMaxLog2Exp));
}

template <Scalar kScalar>
__device__ __forceinline__ float HalfToFloat(uint16_t bits) {
  return kScalar == Scalar::kFloat16 ? Float16ToFloat(bits) : __uint_as_float(static_cast<unsigned>(bits) << 16);
}

template <Scalar kScalar>
__device__ __forceinline__ float LoadScalar(const DeviceMatrix& x, int64_t row, int d) {
  if constexpr (kScalar == Scalar::kFloat32) {
    return reinterpret_cast<const float*>(x.data)[row * x.dim + d];
  } else {
    return HalfToFloat<kScalar>(reinterpret_cast<const uint16_t*>(x.data)[row * x.dim + d]);
  }
}

// Loads 16 bytes from `from` on, for rows that allow no 16-byte loads. The row has `bytes` of them, which may be 0 or
// less. The others are zeros.
__device__ __forceinline__ uint4 LoadChunk(Access access, const char* from, int bytes) {
  uint4 chunk = make_uint4(0, 0, 0, 0);
  if (bytes <= 0) return chunk;
  if (access == Access::k4) {
    const unsigned* words = reinterpret_cast<const unsigned*>(from);
    chunk.x = words[0];
    if (bytes > 4) chunk.y = words[1];
    if (bytes > 8) chunk.z = words[2];
    if (bytes > 12) chunk.w = words[3];
    return chunk;
  }
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
  const auto word = [&](int n) -> unsigned {
    const unsigned low = bytes > 4 * n ? halves[2 * n] : 0u;
    const unsigned high = bytes > 4 * n + 2 ? halves[2 * n + 1] : 0u;
    return low | high << 16;
  };
  return make_uint4(word(0), word(1), word(2), word(3));
}

template <Scalar kScalar>
__device__ __forceinline__ float SquaredNorm(uint4 chunk) {
  const unsigned words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  float sum = 0;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if constexpr (kScalar == Scalar::kFloat32) {
      const float x = __uint_as_float(words[e]);
      sum += x * x;
    } else {
      const float low = HalfToFloat<kScalar>(static_cast<uint16_t>(words[e]));
      const float high = HalfToFloat<kScalar>(static_cast<uint16_t>(words[e] >> 16));
      sum += low * low + high * high;
    }
  }
  return sum;
}

// A lane's part of the factors of one mma, 16 x 8 x 8 in TF32 or 16 x 8 x 16 in 16 bits. Of a (16 rows), it holds the
// rows lane / 4 and lane / 4 + 8 at two words of the depth; of b (8 rows), the row lane / 4 at the same two words.
//
// Split: x = hi + lo with both in TF32, and x y = hi hi + hi lo + lo hi to float32's accuracy (lo lo is beyond it).
template <bool kSplit, int kWords>
struct Fragment {
  unsigned hi[kWords];
  unsigned lo[kWords];
};

template <int kWords>
struct Fragment<false, kWords> {
  unsigned hi[kWords];
};

template <bool kSplit>
using FragmentA = Fragment<kSplit, 4>;  // (row, word), (row + 8, word), (row, next word), (row + 8, next word)
template <bool kSplit>
using FragmentB = Fragment<kSplit, 2>;  // word, next word

// Tensor cores drop the lower 13 bits of a TF32 operand, so adding half a unit of what they keep rounds it. This is
// done in integers: the instruction for it is emulated by several, and its NaNs are not needed (the norms show them).
constexpr unsigned kHalfTf32Unit = 0x1000;
constexpr unsigned kTf32Bits = 0xffffe000;

template <Scalar kScalar, bool kSplit, int kWords>
__device__ __forceinline__ Fragment<kSplit, kWords> MakeFragment(const unsigned (&words)[kWords]) {
  Fragment<kSplit, kWords> fragment;
#pragma unroll
  for (int e = 0; e < kWords; ++e) {
    if constexpr (kScalar != Scalar::kFloat32) {
      fragment.hi[e] = words[e];
    } else {
      fragment.hi[e] = words[e] + kHalfTf32Unit;
      if constexpr (kSplit) {
        fragment.hi[e] &= kTf32Bits;
        // The dropped bits of this one weigh as much as float32's last bits.
        fragment.lo[e] = __float_as_uint(__uint_as_float(words[e]) - __uint_as_float(fragment.hi[e]));
      }
    }
  }
  return fragment;
}

// Lanes hold 4 consecutive words of a row; mma takes words 0 and 1 in one step, 2 and 3 in the next. These are not the
// elements of its documented layout, but they match in both factors, and the order does not matter to a dot product.
template <Scalar kScalar, bool kSplit>
__device__ __forceinline__ void MakeFragments(uint4 top, uint4 bottom, FragmentA<kSplit> (&steps)[2]) {
  const unsigned first[4] = {top.x, bottom.x, top.y, bottom.y};
  const unsigned second[4] = {top.z, bottom.z, top.w, bottom.w};
  steps[0] = MakeFragment<kScalar, kSplit>(first);
  steps[1] = MakeFragment<kScalar, kSplit>(second);
}

template <Scalar kScalar, bool kSplit, int kColumns>
__device__ __forceinline__ void MakeFragments(uint4 chunk, int column, FragmentB<kSplit> (&steps)[2][kColumns]) {
  const unsigned first[2] = {chunk.x, chunk.y};
  const unsigned second[2] = {chunk.z, chunk.w};
  steps[0][column] = MakeFragment<kScalar, kSplit>(first);
  steps[1][column] = MakeFragment<kScalar, kSplit>(second);
}

template <Scalar kScalar>
__device__ __forceinline__ void Mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (kScalar == Scalar::kFloat32) {
    MmaTf32(c, a, b0, b1);
  } else if constexpr (kScalar == Scalar::kFloat16) {
    MmaFloat16(c, a, b0, b1);
  } else {
    MmaBfloat16(c, a, b0, b1);
  }
}

// acc += products of 16 rows with kColumns times 8 columns, over kSteps steps of the depth.
//
// Tensor cores truncate when they accumulate, a bias that grows with the depth. So they sum only these steps, or one
// step of a split product, and the float32 units, which round, add the rest.
template <Scalar kScalar, bool kSplitA, bool kSplitB, int kSteps, int kColumns>
__device__ __forceinline__ void MultiplySteps(const FragmentA<kSplitA> (&a)[kSteps],
                                              const FragmentB<kSplitB> (&b)[kSteps][kColumns],
                                              float (&acc)[kColumns][4]) {
  constexpr int kStepsInCore = kSplitA || kSplitB ? 1 : kSteps;
#pragma unroll
  for (int first = 0; first < kSteps; first += kStepsInCore) {
    float part[kColumns][4] = {};
#pragma unroll
    for (int step = first; step < first + kStepsInCore; ++step) {
      if constexpr (kSplitA) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) Mma<kScalar>(part[n], a[step].lo, b[step][n].hi[0], b[step][n].hi[1]);
      }
      if constexpr (kSplitB) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) Mma<kScalar>(part[n], a[step].hi, b[step][n].lo[0], b[step][n].lo[1]);
      }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) Mma<kScalar>(part[n], a[step].hi, b[step][n].hi[0], b[step][n].hi[1]);
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int r = 0; r < 4; ++r) acc[n][r] += part[n][r];
    }
  }
}

template <typename T>
__device__ __forceinline__ T WarpSum(T x) {
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) x += __shfl_xor_sync(kAllLanes, x, delta);
  return x;
}

// The gradient is factor * (H z). H uses only the signs and proportions of the weights, so that large or small weights
// and temperatures cannot overflow it: the magnitudes of the teachers' coefficients sum to 1, and the student's
// coefficient cancels theirs. Must be called by a whole warp. Returns the factor.
__device__ __forceinline__ double MakeCoefficients(const Params& p, float* coefficients) {
  const int lane = threadIdx.x % 32;
  double magnitude = 0;
  for (int m = 1 + lane; m < p.num_matrices; m += 32) magnitude += fabs(static_cast<double>(p.weights[m - 1]));
  magnitude = WarpSum(magnitude);
  const double scale = magnitude > 0 ? 1 / magnitude : 0;
  double sum = 0;
  for (int m = 1 + lane; m < p.num_matrices; m += 32) {
    const float coefficient = static_cast<float>(-p.weights[m - 1] * scale);
    coefficients[m] = coefficient;
    sum -= coefficient;
  }
  sum = WarpSum(sum);
  if (lane == 0) coefficients[0] = static_cast<float>(sum);
  return magnitude * *p.temperature / p.rows;
}

// A row's divergence. `cross` is the sum of exponential * (similarity - student's similarity). The student's
// exponentials are shifted by `student_shift`, the teacher's by `shift`.
__device__ __forceinline__ double RowKl(double cross, double sum, double student_sum, double shift,
                                        double student_shift, double temperature) {
  return (cross / sum - shift + student_shift) / temperature - log(sum / student_sum);
}

// Writes per_teacher and total, from a single block. `partial_kl` is (teachers, count): partial sums over rows.
__device__ __forceinline__ void WriteResults(const Params& p, const double* partial_kl, int count, bool invalid,
                                             double* shared) {
  const int lane = threadIdx.x % 32;
  const double t = *p.temperature;
  const int teachers = p.num_matrices - 1;
  __syncthreads();
  for (int k = threadIdx.x / 32; k < teachers; k += blockDim.x / 32) {
    double sum = 0;
    for (int n = lane; n < count; n += 32) sum += partial_kl[static_cast<int64_t>(k) * count + n];
    sum = WarpSum(sum) * (t * t / p.rows);
    if (lane == 0) {
      shared[k] = sum;
      p.per_teacher[k] = invalid ? NAN : static_cast<float>(sum);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (int k = 0; k < teachers; ++k) total += p.weights[k] * shared[k];
    *p.total = invalid ? NAN : static_cast<float>(total);
  }
}

}  // namespace cuda
}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_COMMON_CUH_
