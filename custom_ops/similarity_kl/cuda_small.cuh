// The small path: one cooperative launch, for problems where launches and latencies cost more than arithmetic.
//
//   similarities, one tile of one matrix per block   -> workspace (at most 256 x 256 per matrix)
//   sums and KL, one row of one teacher per warp     -> workspace
//   gradient, one row per block; the last block also sums the KL
//
// No two blocks add to the same number, so their order does not change a bit of the result.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_SMALL_CUH_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_SMALL_CUH_

#include <cmath>
#include <cstdint>

#include "cuda_common.cuh"

namespace s2sd {
namespace cuda {

constexpr int kSmallColumns = 256;
constexpr int kSmallGradientChunk = 128;
constexpr int kSliceBytes = 64;  // of each row
static_assert(kSmallColumns <= kThreads, "the gradient has one thread per column");
static_assert(kSmallColumns * (kCudaMaxDim * int64_t{4}) <= int64_t{1} << 32, "offsets in a matrix have 32 bits");

template <int kTile>
constexpr int kSmallTileBytes = kWarps * (kTile + 1) * kTile * static_cast<int>(sizeof(float));

struct SmallParams : Params {
  float* similarities;  // (num_matrices, rows, columns)
  float* maxima;        // of the similarities, by row: (num_matrices, rows)
  double* row_kl;       // (num_matrices - 1, rows)
  int* invalid;         // (num_matrices, column tiles)
};

// The last phase's shared memory. Its two uses, the last block's sums of the KL and the gradient, follow each other.
struct SmallShared {
  double factor;
  float coefficients[1 + kCudaMaxTeachers];
  union {
    double kl[kCudaMaxTeachers];
    struct {
      float of_columns[kSmallColumns];
      float parts[kWarps][kSmallGradientChunk];
    } gradient;
  };
};

template <int kTile>
constexpr int kSmallSharedBytes = kSmallTileBytes<kTile> > static_cast<int>(sizeof(SmallShared))
                                      ? kSmallTileBytes<kTile>
                                      : sizeof(SmallShared);

// The warps divide the depth among themselves, so none reads what another reads, and slices go straight into registers.
// `kAligned`: the matrix allows 16-byte loads. Checking this at every load would keep loads from overlapping.
template <Scalar kScalar, bool kCompensated, int kTile, bool kAligned>
__device__ __forceinline__ void StoreSimilarities(const SmallParams& p, int m, Tile tile, float* shared) {
  constexpr bool kSplit = kCompensated && kScalar == Scalar::kFloat32;
  constexpr int kRowUnits = kTile / 16;
  constexpr int kColumnUnits = kTile / 8;
  constexpr int kBatch = kTile == 16 ? 4 : 1;  // slices in flight
  const DeviceMatrix& x = p.matrices[m];
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const int warp = threadIdx.x / 32;
  const int first_row = p.row_offset + tile.row * kTile;
  const int end_row = p.row_offset + p.rows;
  const int first_column = tile.column * kTile;
  const auto load = [&](int row, int end, int slice) {
    const char* from = x.data + static_cast<unsigned>(row) * static_cast<unsigned>(x.row_bytes);
    const int offset = slice * kSliceBytes + 16 * t;
    if constexpr (kAligned) {
      return row < end && offset < x.row_bytes ? *reinterpret_cast<const uint4*>(from + offset)
                                               : make_uint4(0, 0, 0, 0);
    } else {
      return LoadChunk(x.access, from + offset, row < end ? x.row_bytes - offset : 0);
    }
  };

  float acc[kRowUnits][kColumnUnits / 2][2][4] = {};
  float norms[kColumnUnits] = {};
  const int slices = CeilDiv(x.row_bytes, kSliceBytes);
#pragma unroll 1
  for (int first = warp; first < slices; first += kWarps * kBatch) {
    uint4 a[kBatch][kRowUnits][2];
    uint4 b[kBatch][kColumnUnits];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int slice = first + n * kWarps;  // slices beyond the depth are zeros
#pragma unroll
      for (int r = 0; r < kRowUnits; ++r) {
        a[n][r][0] = load(first_row + 16 * r + g, end_row, slice);
        a[n][r][1] = load(first_row + 16 * r + 8 + g, end_row, slice);
      }
#pragma unroll
      for (int c = 0; c < kColumnUnits; ++c) b[n][c] = load(first_column + 8 * c + g, p.columns, slice);
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      if (tile.row == 0) {
#pragma unroll
        for (int c = 0; c < kColumnUnits; ++c) norms[c] += SquaredNorm<kScalar>(b[n][c]);
      }
#pragma unroll
      for (int c = 0; c < kColumnUnits; c += 2) {
        FragmentB<kSplit> columns[2][2];
        MakeFragments<kScalar>(b[n][c], 0, columns);
        MakeFragments<kScalar>(b[n][c + 1], 1, columns);
#pragma unroll
        for (int r = 0; r < kRowUnits; ++r) {
          FragmentA<kSplit> rows[2];
          MakeFragments<kScalar>(a[n][r][0], a[n][r][1], rows);
          MultiplySteps<kScalar>(rows, columns, acc[r][c / 2]);
        }
      }
    }
  }

  float* shared_norms = shared + kWarps * kTile * kTile;  // (warps, kTile)
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRowUnits; ++r) {
#pragma unroll
    for (int c = 0; c < kColumnUnits; ++c) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int row = 16 * r + v / 2 * 8 + g;
        shared[(warp * kTile + row) * kTile + 8 * c + 2 * t + v % 2] = acc[r][c / 2][c % 2][v];
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kColumnUnits; ++c) {
    norms[c] += __shfl_xor_sync(kAllLanes, norms[c], 1);
    norms[c] += __shfl_xor_sync(kAllLanes, norms[c], 2);
    if (t == 0) shared_norms[warp * kTile + 8 * c + g] = norms[c];
  }
  __syncthreads();

  float* similarities = p.similarities + static_cast<int64_t>(m) * p.rows * p.columns;
  for (int n = threadIdx.x; n < kTile * kTile; n += kThreads) {
    float s = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) s += shared[w * kTile * kTile + n];
    const int row = tile.row * kTile + n / kTile;
    const int column = first_column + n % kTile;
    if (row >= p.rows || column >= p.columns) continue;
    similarities[row * p.columns + column] = s;
    if (p.square && tile.row < tile.column) similarities[column * p.columns + row] = s;
  }
  // As columns, the tiles of the first tile row cover every row of the matrix.
  if (tile.row == 0 && warp == 0) {
    float norm = 0;
    for (int w = 0; w < kWarps; ++w) norm += shared_norms[w * kTile + lane % kTile];
    const bool inside = lane < kTile && first_column + lane < p.columns;
    const unsigned bad = __ballot_sync(kAllLanes, inside && !ValidNorm(norm));
    if (lane == 0) p.invalid[m * CeilDiv(p.columns, kTile) + tile.column] = bad != 0;
  }
}

__device__ __forceinline__ float WarpMax(float x) {
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, delta));
  return x;
}

__device__ __forceinline__ void StoreRowKl(const SmallParams& p, int row, int m) {
  const int lane = threadIdx.x % 32;
  const float temperature = *p.temperature;
  const float exp_scale = kLog2E / temperature;
  const float* student = p.similarities + row * p.columns;
  const float* teacher = student + static_cast<int64_t>(m) * p.rows * p.columns;
  float student_max = 0;  // a row's largest is at least its product with itself
  float teacher_max = 0;
  for (int j = lane; j < p.columns; j += 32) {
    student_max = fmaxf(student_max, student[j]);
    teacher_max = fmaxf(teacher_max, teacher[j]);
  }
  student_max = WarpMax(student_max);
  teacher_max = WarpMax(teacher_max);
  float student_sum = 0;
  float teacher_sum = 0;
  float cross_sum = 0;
  for (int j = lane; j < p.columns; j += 32) {
    const float e = ShiftedExp(teacher[j], teacher_max, exp_scale);
    student_sum += ShiftedExp(student[j], student_max, exp_scale);
    teacher_sum += e;
    cross_sum += e * (teacher[j] - student[j]);
  }
  student_sum = WarpSum(student_sum);
  teacher_sum = WarpSum(teacher_sum);
  cross_sum = WarpSum(cross_sum);
  if (lane != 0) return;
  p.maxima[m * p.rows + row] = teacher_max;
  p.inverse_sums[m * p.rows + row] = 1.0f / teacher_sum;
  if (m == 1) {
    p.maxima[row] = student_max;
    p.inverse_sums[row] = 1.0f / student_sum;
  }
  p.row_kl[(m - 1) * p.rows + row] = RowKl(cross_sum, teacher_sum, student_sum, teacher_max, student_max, temperature);
}

template <Scalar kScalar>
__device__ __forceinline__ void WriteGradient(const SmallParams& p, int row, int first_d, bool invalid,
                                              SmallShared* shared) {
  const DeviceMatrix& z = p.matrices[0];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const float exp_scale = kLog2E / *p.temperature;
  // A row is `local` if its softmax is part of the loss.
  const int j = threadIdx.x;
  const int local_row = row - p.row_offset;
  const int local_j = j - p.row_offset;
  const bool row_is_local = local_row >= 0 && local_row < p.rows;
  if (j < p.columns) {
    const bool j_is_local = local_j >= 0 && local_j < p.rows;
    float sum = 0;
    for (int m = 0; m < p.num_matrices; ++m) {
      const float* similarities = p.similarities + static_cast<int64_t>(m) * p.rows * p.columns;
      const float* maxima = p.maxima + m * p.rows;
      const float* inverse_sums = p.inverse_sums + m * p.rows;
      float term = 0;
      if (row_is_local) {
        const float s = similarities[local_row * p.columns + j];
        term += ShiftedExp(s, maxima[local_row], exp_scale) * inverse_sums[local_row];
      }
      if (j_is_local) {
        // In the square form, read the same number along the row instead of down the column.
        const int n = p.square ? row * p.columns + j : local_j * p.columns + row;
        term += ShiftedExp(similarities[n], maxima[local_j], exp_scale) * inverse_sums[local_j];
      }
      sum += shared->coefficients[m] * term;
    }
    shared->gradient.of_columns[j] = sum;
  }
  __syncthreads();
  constexpr int kUnits = kSmallGradientChunk / 32;
  float acc[kUnits] = {};
#pragma unroll 4
  for (int n = warp; n < p.columns; n += kWarps) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int d = first_d + 32 * u + lane;
      if (d < z.dim) acc[u] += shared->gradient.of_columns[n] * LoadScalar<kScalar>(z, n, d);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnits; ++u) shared->gradient.parts[warp][32 * u + lane] = acc[u];
  __syncthreads();
  const int d = threadIdx.x;
  if (d < kSmallGradientChunk && first_d + d < z.dim) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += shared->gradient.parts[w][d];
    const int64_t n = static_cast<int64_t>(row) * z.dim + first_d + d;
    p.gradient[n] = invalid ? NAN : static_cast<float>(sum * shared->factor);
  }
}

template <Scalar kScalar, bool kCompensated, int kTile>
__global__ void __launch_bounds__(kThreads, kTile == 16 ? 2 : 1) SmallKernel(const __grid_constant__ SmallParams p) {
  const int row_tiles = CeilDiv(p.rows, kTile);
  const int column_tiles = CeilDiv(p.columns, kTile);
  const int tiles = static_cast<int>(NumTiles(p.square, row_tiles, column_tiles));
  for (int n = blockIdx.x; n < tiles * p.num_matrices; n += gridDim.x) {
    const int m = p.num_matrices - 1 - n / tiles;  // the student, which is small, comes last
    const Tile tile = DecodeTile(p.square, n % tiles, row_tiles, column_tiles);
    if (p.matrices[m].access == Access::k16) {
      StoreSimilarities<kScalar, kCompensated, kTile, true>(p, m, tile, reinterpret_cast<float*>(SharedMemory()));
    } else {
      StoreSimilarities<kScalar, kCompensated, kTile, false>(p, m, tile, reinterpret_cast<float*>(SharedMemory()));
    }
  }
  GridSync();

  for (int n = blockIdx.x * kWarps + threadIdx.x / 32; n < p.rows * (p.num_matrices - 1); n += gridDim.x * kWarps) {
    StoreRowKl(p, n % p.rows, n / p.rows + 1);
  }
  GridSync();

  SmallShared* shared = reinterpret_cast<SmallShared*>(SharedMemory());
  if (threadIdx.x < 32) {
    const double factor = MakeCoefficients(p, shared->coefficients);
    if (threadIdx.x == 0) shared->factor = factor;
  }
  bool invalid = !ValidScalars(p);
  for (int n = threadIdx.x; n < p.num_matrices * column_tiles; n += kThreads) invalid = invalid || p.invalid[n] != 0;
  invalid = __syncthreads_or(invalid) != 0;
  if (blockIdx.x == gridDim.x - 1) WriteResults(p, p.row_kl, p.rows, invalid, shared->kl);
  if (p.gradient == nullptr) return;
  __syncthreads();
  const int chunks = CeilDiv(p.matrices[0].dim, kSmallGradientChunk);
  for (int n = blockIdx.x; n < p.columns * chunks; n += gridDim.x) {
    WriteGradient<kScalar>(p, n / chunks, n % chunks * kSmallGradientChunk, invalid, shared);
  }
}

}  // namespace cuda
}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_SMALL_CUH_
