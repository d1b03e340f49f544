// The large path: two passes over tiles of the similarity matrices, none of which is ever stored.
//
//   CheckKernel      refuses rows that are not normalised
//   SumsKernel       tiles -> row sums (and, transposed, column sums) of exp and of exp * (logit difference)
//   NormalizeKernel  sums -> KL and 1 / sum, by row
//   GradientKernel   tiles again -> H = G + G^T in shared memory -> H z
//   FinishKernel     KL by row -> outputs
//   ConvertKernel    fixed-point gradient -> float32
//
// What tiles have in common they add up in 64-bit fixed point: integer addition is associative, so the order in which
// tiles finish leaves no trace in the bits.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_LARGE_CUH_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_LARGE_CUH_

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda_common.cuh"

namespace s2sd {
namespace cuda {

constexpr int kStages = 3;
constexpr int kStageDepthBytes = 128;  // of each row of a tile
constexpr int kGradientChunk = 64;     // columns of z at a time

template <int kTile>
constexpr int kStageBytes = 2 * kTile * kStageDepthBytes;

// The pipeline's stages, and after them, in the same place, H and a chunk of z.
template <int kTile>
constexpr int kLargeSharedBytes = kStages * kStageBytes<kTile>;

// exp sums: at most exp(8) * 2^17 < 2^28.6, so 2^34 units in 1 stay below 2^63.
constexpr float kExpSumScale = 17179869184.0f;

__device__ __forceinline__ void AddFixed(unsigned long long* sum, float x, float scale) {
  atomicAdd(sum, static_cast<unsigned long long>(__float2ll_rn(x * scale)));
}

// The power of two that keeps magnitudes up to `bound` below 2^61.
__device__ __forceinline__ float FixedPointScale(float bound) { return ldexpf(1.0f, 60 - ilogbf(bound)); }

// Cross sums: similarities are within +-(1 + 8 T), so a term is at most exp(8) (2 / T + 16).
__device__ __forceinline__ float CrossSumScale(const Params& p, float temperature) {
  return FixedPointScale(kMaxExp * static_cast<float>(p.columns) * (2.0f / temperature + 16.0f));
}

// One warp a row.
template <Scalar kScalar>
__global__ void __launch_bounds__(kThreads) CheckKernel(const __grid_constant__ Params p) {
  const int m = blockIdx.y;
  const DeviceMatrix& x = p.matrices[m];
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row >= p.columns) return;
  const char* from = x.data + static_cast<int64_t>(row) * x.row_bytes;
  float norm = 0;
  if (x.access == Access::k16) {
#pragma unroll 4
    for (int n = 16 * lane; n < x.row_bytes; n += 16 * 32) {
      norm += SquaredNorm<kScalar>(*reinterpret_cast<const uint4*>(from + n));
    }
  } else {
    for (int n = 16 * lane; n < x.row_bytes; n += 16 * 32) norm += SquaredNorm<kScalar>(LoadChunk(x, from, n, true));
  }
  norm = WarpSum(norm);
  if (lane != 0) return;
  const bool valid = ValidNorm(norm, *p.temperature);
  if (!valid || (row == 0 && m == 0 && !ValidScalars(p))) p.header->invalid = 1;
  if (valid && m == 0) atomicMax(&p.header->max_student_norm, __float_as_int(norm));
}

// The matrices that a block works on: maybe the student, then a range of teachers.
struct MatrixRange {
  int first;
  int first_teacher;
  int end;
  __device__ int Next(int m) const { return m == 0 ? first_teacher : m + 1; }
};

__device__ __forceinline__ MatrixRange BlockMatrices(const Params& p, bool student) {
  const int first = 1 + (blockIdx.y == 0 ? 0 : p.group_ends[blockIdx.y - 1]);
  return {student ? 0 : first, first, 1 + p.group_ends[blockIdx.y]};
}

template <int kTile>
__device__ __forceinline__ Tile BlockTile(const Params& p) {
  return DecodeTile(p.square, blockIdx.x, CeilDiv(p.rows, kTile), CeilDiv(p.columns, kTile));
}

// A stage's rows are 128 bytes long. XOR of a byte's position with this, by row, lets 16-byte reads of a quarter warp
// (2 rows, 4 lanes each) and 8-byte reads of a half warp (4 rows, 4 lanes each) meet every bank once.
__device__ __forceinline__ int StageSwizzle(int row) { return (row & 1) << 6 | (row & 2) << 4; }

template <int kTile>
__device__ __forceinline__ void LoadStage(const DeviceMatrix& x, int first_row, int end_row, int depth, char* shared) {
  const int thread = OpaqueThreadIndex();
  const int chunk = thread % 8;
  const int offset = depth * kStageDepthBytes + chunk * 16;
#pragma unroll
  for (int n = 0; n < kTile * 8 / kThreads; ++n) {
    const int r = thread / 8 + n * (kThreads / 8);
    const bool valid = first_row + r < end_row;
    const char* row = x.data + static_cast<int64_t>(valid ? first_row + r : 0) * x.row_bytes;
    char* to = shared + r * kStageDepthBytes + (chunk * 16 ^ StageSwizzle(r));
    if (x.access == Access::k16) {
      const bool inside = valid && offset < x.row_bytes;
      CopyAsync16(to, inside ? row + offset : x.data, inside);
    } else if (x.access == Access::k4) {
#pragma unroll
      for (int q = 0; q < 16; q += 4) {
        const bool inside = valid && offset + q < x.row_bytes;
        CopyAsync4(to + q, inside ? row + offset + q : x.data, inside);
      }
    } else {
      *reinterpret_cast<uint4*>(to) = LoadChunk(x, row, offset, valid);
    }
  }
}

// Calls epilogue(m, acc) with the tile of each matrix's similarities in turn. 2 x 4 warps; acc[r][c][2 h + v] is row
// warp_row * kTile / 2 + 16 r + 8 h + lane / 4 and column warp_column * kTile / 4 + 8 c + 2 (lane % 4) + v of the tile.
// The pipeline runs on through the epilogues: the next matrix arrives meanwhile.
template <Scalar kScalar, bool kCompensated, int kTile, typename Epilogue>
__device__ __forceinline__ void ForEachSimilarityTile(const Params& p, Tile tile, MatrixRange range, char* shared,
                                                      const Epilogue& epilogue) {
  constexpr bool kSplit = kCompensated && kScalar == Scalar::kFloat32;
  constexpr int kUnits = kTile / 32;                       // mma tiles of a warp, either way
  using Chunk = std::conditional_t<kSplit, uint2, uint4>;  // split products need the registers for other things
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int swizzle = StageSwizzle(lane / 4);
  const int a_offset = (warp / 4 * (kTile / 2) + lane / 4) * kStageDepthBytes;
  const int b_offset = (kTile + warp % 4 * (kTile / 4) + lane / 4) * kStageDepthBytes;

  int load_matrix = range.first;
  int load_depth = 0;
  const auto load_next = [&](int stage) {
    if (load_matrix < range.end) {
      const DeviceMatrix& x = p.matrices[load_matrix];
      char* to = shared + stage * kStageBytes<kTile>;
      LoadStage<kTile>(x, p.row_offset + tile.row * kTile, p.row_offset + p.rows, load_depth, to);
      LoadStage<kTile>(x, tile.column * kTile, p.columns, load_depth, to + kTile * kStageDepthBytes);
      if (++load_depth * kStageDepthBytes >= x.row_bytes) {
        load_matrix = range.Next(load_matrix);
        load_depth = 0;
      }
    }
    CopyAsyncCommit();
  };
  for (int stage = 0; stage < kStages - 1; ++stage) load_next(stage);

  int stage = 0;
  for (int m = range.first; m < range.end; m = range.Next(m)) {
    float acc[kUnits][kUnits][4] = {};
    for (int depth = 0; depth < p.matrices[m].row_bytes; depth += kStageDepthBytes) {
      CopyAsyncWait<kStages - 2>();
      __syncthreads();
      load_next(stage == 0 ? kStages - 1 : stage - 1);
      const char* from = shared + stage * kStageBytes<kTile>;
#pragma unroll 1
      for (int slice = 0; slice < kStageDepthBytes; slice += 4 * sizeof(Chunk)) {
        const int byte = (slice + lane % 4 * static_cast<int>(sizeof(Chunk))) ^ swizzle;
        const auto operand = [&](int offset) {
          return MakeOperand<kScalar, kSplit>(*reinterpret_cast<const Chunk*>(from + offset + byte));
        };
        Operand<kSplit, sizeof(Chunk) / 4> b[kUnits];
#pragma unroll
        for (int c = 0; c < kUnits; ++c) b[c] = operand(b_offset + c * 8 * kStageDepthBytes);
#pragma unroll
        for (int r = 0; r < kUnits; ++r) {
          const int row = a_offset + r * 16 * kStageDepthBytes;
          MultiplySlice<kScalar>(operand(row), operand(row + 8 * kStageDepthBytes), b, acc[r]);
        }
      }
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    epilogue(m, acc);
  }
}

template <Scalar kScalar, bool kCompensated, int kTile>
__global__ void __launch_bounds__(kThreads, kTile == 64 ? 2 : 1) SumsKernel(const __grid_constant__ Params p) {
  if (p.header->invalid) return;
  constexpr int kUnits = kTile / 32;
  const Tile tile = BlockTile<kTile>(p);
  float student[kUnits][kUnits][4];
  ForEachSimilarityTile<kScalar, kCompensated, kTile>(
      p, tile, BlockMatrices(p, true), SharedMemory(), [&](int m, const float (&s)[kUnits][kUnits][4]) {
        if (m == 0) {
#pragma unroll
          for (int r = 0; r < kUnits; ++r) {
#pragma unroll
            for (int c = 0; c < kUnits; ++c) {
#pragma unroll
              for (int v = 0; v < 4; ++v) student[r][c][v] = s[r][c][v];
            }
          }
          if (blockIdx.y != 0) return;  // every group of teachers needs the student, one adds it up
        }
        const int thread = OpaqueThreadIndex();
        const int g = thread % 32 / 4;
        const int t = thread % 4;
        const int first_row = tile.row * kTile + thread / 128 * (kTile / 2) + g;
        const int first_column = tile.column * kTile + thread / 32 % 4 * (kTile / 4);
        const float temperature = *p.temperature;
        const float inverse_temperature = 1.0f / temperature;
        const float exp_scale = kLog2E / temperature;
        const float cross_scale = CrossSumScale(p, temperature);
        unsigned long long* exp_sums = p.exp_sums + static_cast<int64_t>(m) * p.rows;
        unsigned long long* cross_sums = p.cross_sums + static_cast<int64_t>(m - 1) * p.rows;
        float column_exp[kUnits][2] = {};
        float column_cross[kUnits][2] = {};
#pragma unroll
        for (int r = 0; r < kUnits; ++r) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int row = first_row + 16 * r + 8 * h;
            float row_exp = 0;
            float row_cross = 0;
#pragma unroll
            for (int c = 0; c < kUnits; ++c) {
#pragma unroll
              for (int v = 0; v < 2; ++v) {
                const bool inside = row < p.rows && first_column + 8 * c + 2 * t + v < p.columns;
                const float similarity = s[r][c][2 * h + v];
                const float e = inside ? ShiftedExp(similarity, exp_scale) : 0.0f;
                const float cross = e * ((similarity - student[r][c][2 * h + v]) * inverse_temperature);
                row_exp += e;
                row_cross += cross;
                column_exp[c][v] += e;
                column_cross[c][v] += cross;
              }
            }
#pragma unroll
            for (int delta = 1; delta < 4; delta *= 2) {
              row_exp += __shfl_xor_sync(kAllLanes, row_exp, delta);
              row_cross += __shfl_xor_sync(kAllLanes, row_cross, delta);
            }
            if (t == r && row < p.rows) {
              AddFixed(exp_sums + row, row_exp, kExpSumScale);
              if (m > 0) AddFixed(cross_sums + row, row_cross, cross_scale);
            }
          }
        }
        if (!p.square || tile.row == tile.column) return;
#pragma unroll
        for (int c = 0; c < kUnits; ++c) {
#pragma unroll
          for (int v = 0; v < 2; ++v) {
#pragma unroll
            for (int delta = 4; delta < 32; delta *= 2) {
              column_exp[c][v] += __shfl_xor_sync(kAllLanes, column_exp[c][v], delta);
              column_cross[c][v] += __shfl_xor_sync(kAllLanes, column_cross[c][v], delta);
            }
            const int column = first_column + 8 * c + 2 * t + v;
            if (g == 2 * c + v && column < p.columns) {
              AddFixed(exp_sums + column, column_exp[c][v], kExpSumScale);
              if (m > 0) AddFixed(cross_sums + column, column_cross[c][v], cross_scale);
            }
          }
        }
      });
}

// Blocks of y = 0 see to the student and to the gradient's scales, the others to a teacher each.
static __global__ void __launch_bounds__(kThreads) NormalizeKernel(const __grid_constant__ Params p) {
  if (__syncthreads_or(p.header->invalid)) return;
  double* shared = reinterpret_cast<double*>(SharedMemory());
  const int m = blockIdx.y;
  const int row = blockIdx.x * kThreads + threadIdx.x;
  const float temperature = *p.temperature;
  double kl = 0;
  if (row < p.rows) {
    const int64_t n = static_cast<int64_t>(m) * p.rows + row;
    const double sum = static_cast<double>(p.exp_sums[n]);
    if (sum == 0) p.header->invalid = 1;  // T beyond the products' resolution
    p.inverse_sums[n] = static_cast<float>(kExpSumScale / sum);
    if (m > 0) {
      const double cross = static_cast<double>(static_cast<long long>(p.cross_sums[n - p.rows]));
      const double student_sum = static_cast<double>(p.exp_sums[row]);
      kl = cross * (kExpSumScale / static_cast<double>(CrossSumScale(p, temperature))) / sum - log(sum / student_sum);
    }
  }
  if (m > 0) {
    kl = WarpSum(kl);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = kl;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kWarps; ++w) kl += shared[w];
      p.partial_kl[static_cast<int64_t>(m - 1) * gridDim.x + blockIdx.x] = kl;
    }
  } else if (row < 32) {
    // Rows of |H| sum up to 2 at most, columns to 2 rows, so an element of H z is below 2 (rows + 1) max |z|.
    const double factor = MakeCoefficients(p, p.header->coefficients);
    const float max_norm = fmaxf(__int_as_float(p.header->max_student_norm), FLT_MIN);
    const float scale = FixedPointScale(2.0f * static_cast<float>(p.rows + 1) * sqrtf(max_norm));
    if (row == 0) {
      p.header->gradient_scale = scale;
      p.header->gradient_factor = factor / scale;
    }
  }
}

// H in shared memory: rows of kTile floats in 16-byte chunks. One swizzle serves 16-byte reads along rows (2 rows, 4
// chunks a quarter warp) and 4-byte reads down columns (rows 4 apart, 8 columns).
template <int kTile>
__device__ __forceinline__ int HalfGradientIndex(int row, int column) {
  return row * kTile + (column ^ ((row >> 2 & 3) << 3 ^ (row & 1) << 4));
}

// A chunk of z: 4-byte reads of 8 columns in 4 rows that are 4 apart.
__device__ __forceinline__ int ChunkIndex(int row, int column) {
  return row * kGradientChunk + (column ^ (row >> 2 & 3) << 3);
}

// gradient rows of the tile's rows += H z for the rows of z that are the tile's columns; or, transposed, the reverse.
template <Scalar kScalar, bool kCompensated, int kTile, bool kTransposed>
__device__ __forceinline__ void AddProduct(const Params& p, const float* h, float* chunk, int first_out, int end_out,
                                           int first_z, int end_z) {
  constexpr bool kSplitZ = kCompensated && kScalar == Scalar::kFloat32;  // halves are TF32 numbers as they are
  constexpr int kRowUnits = kTile / 64;
  constexpr int kColumnUnits = kGradientChunk / 16;
  const DeviceMatrix& z = p.matrices[0];
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const int warp = threadIdx.x / 32;
  const int warp_row = warp / 2 * (kTile / 4);
  const int warp_column = warp % 2 * (kGradientChunk / 2);
  const float scale = p.header->gradient_scale;

  for (int first_d = 0; first_d < z.dim; first_d += kGradientChunk) {
    __syncthreads();
#pragma unroll 8
    for (int n = threadIdx.x; n < kTile * kGradientChunk; n += kThreads) {
      const int row = n / kGradientChunk;
      const int d = n % kGradientChunk;
      const bool inside = first_z + row < end_z && first_d + d < z.dim;
      chunk[ChunkIndex(row, d)] = inside ? LoadScalar<kScalar>(z, first_z + row, first_d + d) : 0.0f;
    }
    __syncthreads();
    float acc[kRowUnits][kColumnUnits][4] = {};
#pragma unroll 1
    for (int depth = 4 * t; depth < kTile; depth += 16) {
      Operand<kSplitZ, 4> b[kColumnUnits];
#pragma unroll
      for (int c = 0; c < kColumnUnits; ++c) {
        unsigned values[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          values[e] = __float_as_uint(chunk[ChunkIndex(depth + e, warp_column + 8 * c + g)]);
        }
        b[c] = MakeOperand<Scalar::kFloat32, kSplitZ>(make_uint4(values[0], values[1], values[2], values[3]));
      }
#pragma unroll
      for (int r = 0; r < kRowUnits; ++r) {
        const auto operand = [&](int row) {
          uint4 values;
          if constexpr (kTransposed) {
            values.x = __float_as_uint(h[HalfGradientIndex<kTile>(depth, row)]);
            values.y = __float_as_uint(h[HalfGradientIndex<kTile>(depth + 1, row)]);
            values.z = __float_as_uint(h[HalfGradientIndex<kTile>(depth + 2, row)]);
            values.w = __float_as_uint(h[HalfGradientIndex<kTile>(depth + 3, row)]);
          } else {
            values = *reinterpret_cast<const uint4*>(h + HalfGradientIndex<kTile>(row, depth));
          }
          return MakeOperand<Scalar::kFloat32, kCompensated>(values);
        };
        const int row = warp_row + 16 * r + g;
        MultiplySlice<Scalar::kFloat32>(operand(row), operand(row + 8), b, acc[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowUnits; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_out + warp_row + 16 * r + 8 * half + g;
        if (row >= end_out) continue;
#pragma unroll
        for (int c = 0; c < kColumnUnits; ++c) {
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            const int d = first_d + warp_column + 8 * c + 2 * t + v;
            if (d < z.dim) {
              AddFixed(p.gradient_sums + static_cast<int64_t>(row) * z.dim + d, acc[r][c][2 * half + v], scale);
            }
          }
        }
      }
    }
  }
}

template <Scalar kScalar, bool kCompensated, int kTile>
__global__ void __launch_bounds__(kThreads, kTile == 64 ? 2 : 1) GradientKernel(const __grid_constant__ Params p) {
  if (p.header->invalid) return;
  constexpr int kUnits = kTile / 32;
  const Tile tile = BlockTile<kTile>(p);

  // Inside a square, a tile stands for both G and its mirror image's transpose: e is symmetric, the normalisers are
  // not.
  float h[kUnits][kUnits][4] = {};
  ForEachSimilarityTile<kScalar, kCompensated, kTile>(
      p, tile, BlockMatrices(p, blockIdx.y == 0), SharedMemory(), [&](int m, const float (&s)[kUnits][kUnits][4]) {
        const int thread = OpaqueThreadIndex();
        const int warp_row = thread / 128 * (kTile / 2) + thread % 32 / 4;
        const int warp_column = thread / 32 % 4 * (kTile / 4) + 2 * (thread % 4);
        const float exp_scale = kLog2E / *p.temperature;
        const float coefficient = p.header->coefficients[m];
        const float* inverse_sums = p.inverse_sums + static_cast<int64_t>(m) * p.rows;
        const auto normalizer = [&](int row) { return row < p.rows ? coefficient * inverse_sums[row] : 0.0f; };
        float column_normalizers[kUnits][2] = {};
        if (p.square) {
#pragma unroll
          for (int c = 0; c < kUnits; ++c) {
#pragma unroll
            for (int v = 0; v < 2; ++v) {
              column_normalizers[c][v] = normalizer(tile.column * kTile + warp_column + 8 * c + v);
            }
          }
        }
#pragma unroll
        for (int r = 0; r < kUnits; ++r) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float row_normalizer = normalizer(tile.row * kTile + warp_row + 16 * r + 8 * half);
#pragma unroll
            for (int c = 0; c < kUnits; ++c) {
#pragma unroll
              for (int v = 0; v < 2; ++v) {
                h[r][c][2 * half + v] +=
                    ShiftedExp(s[r][c][2 * half + v], exp_scale) * (row_normalizer + column_normalizers[c][v]);
              }
            }
          }
        }
      });

  static_assert(kTile * (kTile + kGradientChunk) * sizeof(float) <= kLargeSharedBytes<kTile>);
  float* shared_h = reinterpret_cast<float*>(SharedMemory());
  float* chunk = shared_h + kTile * kTile;
  const int thread = OpaqueThreadIndex();
  const int warp_row = thread / 128 * (kTile / 2) + thread % 32 / 4;
  const int warp_column = thread / 32 % 4 * (kTile / 4) + 2 * (thread % 4);
  CopyAsyncWait<0>();
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kUnits; ++r) {
#pragma unroll
    for (int c = 0; c < kUnits; ++c) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        // Rows and columns outside the matrix need no zeros: their z is zero, or their product is not kept.
        shared_h[HalfGradientIndex<kTile>(warp_row + 16 * r + v / 2 * 8, warp_column + 8 * c + v % 2)] = h[r][c][v];
      }
    }
  }
  const int first_row = p.row_offset + tile.row * kTile;
  const int first_column = tile.column * kTile;
  const int end_row = p.row_offset + p.rows;
  AddProduct<kScalar, kCompensated, kTile, false>(p, shared_h, chunk, first_row, end_row, first_column, p.columns);
  if (p.square && tile.row == tile.column) return;
  AddProduct<kScalar, kCompensated, kTile, true>(p, shared_h, chunk, first_column, p.columns, first_row, end_row);
}

static __global__ void __launch_bounds__(kThreads) FinishKernel(const __grid_constant__ Params p) {
  WriteResults(p, p.partial_kl, CeilDiv(p.rows, kThreads), p.header->invalid != 0,
               reinterpret_cast<double*>(SharedMemory()));
}

static __global__ void __launch_bounds__(kThreads) ConvertKernel(const __grid_constant__ Params p) {
  const bool invalid = p.header->invalid != 0;
  const double factor = p.header->gradient_factor;
  const int64_t count = static_cast<int64_t>(p.columns) * p.matrices[0].dim;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; n < count; n += step) {
    const double sum = static_cast<double>(static_cast<long long>(p.gradient_sums[n]));
    p.gradient[n] = invalid ? NAN : static_cast<float>(sum * factor);
  }
}

}  // namespace cuda
}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_LARGE_CUH_
