// The large path: two passes over tiles of the similarity matrices.
//
//   CheckKernel      squared norms: whether anything is not finite, and whether rows are of about unit length
//   MaximaKernel     tiles -> row maxima, if rows are of other lengths
//   SumsKernel       tiles -> row sums (and, transposed, column sums) of exp and of exp * (logit difference)
//   NormalizeKernel  sums -> KL and 1 / sum, by row
//   GradientKernel   the tiles again -> H = G + G^T in shared memory -> H z
//   FinishKernel     KL by row -> outputs
//   ConvertKernel    fixed-point gradient -> float32
//
// The first tiles' similarities stay in a workspace of bounded size between the two passes; those of the others are
// recomputed.
//
// Tiles add to shared sums in 64-bit fixed point. Integer addition is associative, so the order in which tiles finish
// does not change a bit of the result.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_LARGE_CUH_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_LARGE_CUH_

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "cuda_common.cuh"

namespace s2sd {
namespace cuda {

constexpr int kStages = 3;
constexpr int kStageDepthBytes = 128;  // of each row of a tile
constexpr int kStepBytes = 32;         // of each row, for one mma
constexpr int kGradientChunk = 64;     // columns of z at a time

template <int kTile>
constexpr int kStageBytes = 2 * kTile * kStageDepthBytes;

// The pipeline's stages, later reused for H and a chunk of z.
template <int kTile>
constexpr int kLargeSharedBytes = kStages * kStageBytes<kTile>;

// If squared norms are within T of 1, exp((s - 1) / T) is at most e and no row's sum is below 1 / e: one shift works
// for all rows. Rows of other lengths are shifted by their own maxima, and so are all rows if T is so small that a
// product's rounding error shows.
constexpr float kNormSlack = 1.0f;
constexpr float kMinFixedShiftTemperature = 0.004f;
constexpr float kMaxExp = 3.5f;  // e, plus TF32 rounding at the smallest such T; 2^kMaxLog2Exp

// A row's sum is at most kMaxExp * 2^17 < 2^18.9, so at 2^43 units for 1 it stays below 2^62.
constexpr float kExpSumScale = 8796093022208.0f;

// Read and written by single threads between kernels.
struct Header {
  int invalid;           // something is not finite, or T or a weight is not valid: all outputs are NaN
  int shift_by_maxima;   // see kNormSlack
  int max_student_norm;  // squared norms as the bits of floats >= 0, so that integer maxima work
  int max_teacher_norm;
  float gradient_scale;  // fixed-point units for 1
  double gradient_factor;
  float coefficients[1 + kCudaMaxTeachers];
};

struct LargeParams : Params {
  Header* header;
  unsigned long long* exp_sums;    // (num_matrices, rows), fixed point
  unsigned long long* cross_sums;  // (num_matrices - 1, rows), fixed point
  unsigned long long* gradient_sums;
  int* maxima;                           // (num_matrices, rows), the bits of floats >= 0
  double* partial_kl;                    // (num_matrices - 1, blocks of the normalising kernel)
  float4* kept;                          // (kept_tiles, num_matrices, kTile * kTile / 4)
  int kept_tiles;                        // how many: the first ones
  uint8_t group_ends[kCudaMaxTeachers];  // blocks of y = g handle the teachers from group_ends[g - 1] up to here
};

__device__ __forceinline__ void AddFixed(unsigned long long* sum, float x, float scale) {
  atomicAdd(sum, static_cast<unsigned long long>(__float2ll_rn(x * scale)));
}

// The power of two that keeps magnitudes up to `bound` below 2^61; float32's largest if rows are nearly zero.
__device__ __forceinline__ float FixedPointScale(double bound) {
  const int exponent = 60 - ilogb(bound);
  return ldexpf(1.0f, exponent < 127 ? exponent : 127);
}

// The scale for a row's sums of exp * (similarity - student's similarity), which the norms bound.
__device__ __forceinline__ float CrossSumScale(const LargeParams& p) {
  const float norms = __int_as_float(p.header->max_student_norm) + __int_as_float(p.header->max_teacher_norm);
  return FixedPointScale(static_cast<double>(kMaxExp) * p.columns * fmaxf(norms, FLT_MIN));
}

// One warp per row.
template <Scalar kScalar>
__global__ void __launch_bounds__(kThreads) CheckKernel(const __grid_constant__ LargeParams p) {
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
    for (int n = 16 * lane; n < x.row_bytes; n += 16 * 32) {
      norm += SquaredNorm<kScalar>(LoadChunk(x.access, from + n, x.row_bytes - n));
    }
  }
  norm = WarpSum(norm);
  if (lane != 0) return;
  if (!ValidNorm(norm) || (row == 0 && m == 0 && !ValidScalars(p))) {
    p.header->invalid = 1;
    return;
  }
  const float t = *p.temperature;
  if (fabsf(norm - 1.0f) > kNormSlack * t || t < kMinFixedShiftTemperature) p.header->shift_by_maxima = 1;
  atomicMax(m == 0 ? &p.header->max_student_norm : &p.header->max_teacher_norm, __float_as_int(norm));
}

// The matrices that a block works on: the student if asked for, then the teachers of its group.
struct MatrixRange {
  int first;
  int end;
};

__device__ __forceinline__ int FirstTeacher(const LargeParams& p) {
  return 1 + (blockIdx.y == 0 ? 0 : p.group_ends[blockIdx.y - 1]);
}

__device__ __forceinline__ int NextMatrix(const LargeParams& p, int m) { return m == 0 ? FirstTeacher(p) : m + 1; }

__device__ __forceinline__ MatrixRange BlockMatrices(const LargeParams& p, bool student) {
  return {student ? 0 : FirstTeacher(p), 1 + p.group_ends[blockIdx.y]};
}

template <int kTile>
__device__ __forceinline__ Tile TileAt(const LargeParams& p, int index) {
  return DecodeTile(p.square, index, CeilDiv(p.rows, kTile), CeilDiv(p.columns, kTile));
}

// A stage's rows are 128 bytes long. XORing a byte's position with this value of its row makes the 8 rows of a matrix
// load hit every bank once.
__device__ __forceinline__ int StageSwizzle(int row) { return (row & 7) << 4; }

// Copies a tile's rows and columns to shared memory, one matrix after another, 128 bytes of each row at a time. A
// thread copies the same 16 of these bytes of every 32nd row. All it needs for this is computed when a matrix starts.
template <int kTile>
class StageLoader {
 public:
  __device__ __forceinline__ StageLoader(const LargeParams& p, Tile tile) {
    const int thread = OpaqueThreadIndex();
    const int row = thread / 8;
    to_and_inside_ = row * kStageDepthBytes + (thread % 8 * 16 ^ StageSwizzle(row));
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      if (tile.row * kTile + row + n * kThreads / 8 < p.rows) to_and_inside_ |= kInside << n;
      if (tile.column * kTile + row + n * kThreads / 8 < p.columns) to_and_inside_ |= kInside << (kRows + n);
    }
  }

  __device__ __forceinline__ void Start(const LargeParams& p, Tile tile, const DeviceMatrix& x) {
    const int thread = OpaqueThreadIndex();
    const int64_t row = thread / 8 + p.row_offset + tile.row * kTile;
    const int64_t column = thread / 8 + tile.column * kTile;
    const int byte = thread % 8 * 16;
    rows_ = x.data + row * x.row_bytes + byte;
    columns_ = x.data + column * x.row_bytes + byte;
    left_ = x.row_bytes;
  }

  __device__ __forceinline__ bool Done() const { return left_ <= 0; }

  __device__ __forceinline__ void Load(const DeviceMatrix& x, char* shared) {
    char* to = shared + to_and_inside_ % kInside;
    const int64_t stride = x.row_bytes * (kThreads / 8);
    const int left = left_ - OpaqueThreadIndex() % 8 * 16;
    const unsigned inside = left > 0 ? to_and_inside_ / kInside : 0;
    if (x.access == Access::k16) {
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        CopyAsync16(to + n * kStride, rows_ + n * stride, inside >> n & 1);
      }
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        CopyAsync16(to + (kRows + n) * kStride, columns_ + n * stride, inside >> (kRows + n) & 1);
      }
    } else {
#pragma unroll 1
      for (int n = 0; n < 2 * kRows; ++n) {
        const char* from = n < kRows ? rows_ + n * stride : columns_ + (n - kRows) * stride;
        if (x.access == Access::k4) {
#pragma unroll
          for (int q = 0; q < 16; q += 4) CopyAsync4(to + n * kStride + q, from + q, (inside >> n & 1) && q < left);
        } else {
          *reinterpret_cast<uint4*>(to + n * kStride) = LoadChunk(x.access, from, inside >> n & 1 ? left : 0);
        }
      }
    }
    rows_ += kStageDepthBytes;
    columns_ += kStageDepthBytes;
    left_ -= kStageDepthBytes;
  }

 private:
  static constexpr int kRows = kTile * 8 / kThreads;  // per thread, and as many columns
  static constexpr unsigned kInside = 1u << 16;
  static constexpr int kStride = kThreads / 8 * kStageDepthBytes;

  const char* rows_;
  const char* columns_;
  int left_ = 0;  // bytes left of every row
  // The position in a stage and, above it, one bit for every row, then column, that lies in the matrix. They share one
  // number because the kernels have no register to spare.
  unsigned to_and_inside_;
};

// Calls epilogue(m, acc) with each matrix's tile of similarities in turn. 2 x 4 warps; acc[r][c][2 h + v] is row
// warp_row * kTile / 2 + 16 r + 8 h + lane / 4 and column warp_column * kTile / 4 + 8 c + 2 (lane % 4) + v of the tile.
// The pipeline continues during the epilogues: the next matrix is being loaded meanwhile.
template <Scalar kScalar, bool kCompensated, int kTile, typename Epilogue>
__device__ __forceinline__ void ForEachSimilarityTile(const LargeParams& p, Tile tile, MatrixRange range, char* shared,
                                                      const Epilogue& epilogue) {
  constexpr bool kSplit = kCompensated && kScalar == Scalar::kFloat32;
  constexpr int kUnits = kTile / 32;      // mma tiles per warp, in both directions
  constexpr int kSteps = kSplit ? 1 : 4;  // of the depth at a time; split factors need the registers
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  // Where a lane's row of a matrix load begins. For a, rows come first, then the next 16 bytes; for b, the reverse.
  const int a_row = warp / 4 * (kTile / 2) + lane % 16;
  const int b_row = kTile + warp % 4 * (kTile / 4) + lane / 16 * 8 + lane % 8;
  const int a_offset = a_row * kStageDepthBytes + (lane / 16 * 16 ^ StageSwizzle(a_row));
  const int b_offset = b_row * kStageDepthBytes + (lane / 8 % 2 * 16 ^ StageSwizzle(b_row));

  StageLoader<kTile> loader(p, tile);
  int load_matrix = range.first;
  const auto load_next = [&](int stage) {
    if (load_matrix < range.end) {
      const DeviceMatrix& x = p.matrices[load_matrix];
      if (loader.Done()) loader.Start(p, tile, x);
      loader.Load(x, shared + stage * kStageBytes<kTile>);
      if (loader.Done()) load_matrix = NextMatrix(p, load_matrix);
    }
    CopyAsyncCommit();
  };
  for (int stage = 0; stage < kStages - 1; ++stage) load_next(stage);

  int stage = 0;
  for (int m = range.first; m < range.end; m = NextMatrix(p, m)) {
    float acc[kUnits][kUnits][4] = {};
    for (int depth = 0; depth < p.matrices[m].row_bytes; depth += kStageDepthBytes) {
      CopyAsyncWait<kStages - 2>();
      __syncthreads();
      load_next(stage == 0 ? kStages - 1 : stage - 1);
      const char* from = shared + stage * kStageBytes<kTile>;
#pragma unroll 1
      for (int first = 0; first < kStageDepthBytes; first += kSteps * kStepBytes) {
        FragmentB<kSplit> b[kSteps][kUnits];
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int c = 0; c < kUnits; c += 2) {
            unsigned words[4];
            LoadMatrices(from + (b_offset ^ (first + step * kStepBytes)) + c * 8 * kStageDepthBytes, words);
            b[step][c] = MakeFragment<kScalar, kSplit>({words[0], words[1]});
            b[step][c + 1] = MakeFragment<kScalar, kSplit>({words[2], words[3]});
          }
        }
#pragma unroll
        for (int r = 0; r < kUnits; ++r) {
          FragmentA<kSplit> a[kSteps];
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            unsigned words[4];
            LoadMatrices(from + (a_offset ^ (first + step * kStepBytes)) + r * 16 * kStageDepthBytes, words);
            a[step] = MakeFragment<kScalar, kSplit>(words);
          }
          MultiplySteps<kScalar>(a, b, acc[r]);
        }
      }
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    epilogue(m, acc);
  }
}

// The rows and columns of a tile that ForEachSimilarityTile gives to a thread.
template <int kTile>
struct ThreadTile {
  __device__ __forceinline__ ThreadTile(Tile tile) {
    const int thread = OpaqueThreadIndex();
    quad = thread % 32 / 4;
    in_quad = thread % 4;
    first_row = tile.row * kTile + thread / 128 * (kTile / 2) + quad;
    first_column = tile.column * kTile + thread / 32 % 4 * (kTile / 4) + 2 * in_quad;
  }
  __device__ __forceinline__ int Row(int r, int h) const { return first_row + 16 * r + 8 * h; }
  __device__ __forceinline__ int Column(int c, int v) const { return first_column + 8 * c + v; }

  int quad;
  int in_quad;
  int first_row;
  int first_column;
};

// A tile of similarities kept between the passes: every thread reads back what it wrote.
template <int kTile>
__device__ __forceinline__ float4* KeptTile(const LargeParams& p, int tile, int m) {
  return p.kept + (static_cast<int64_t>(tile) * p.num_matrices + m) * (kTile * kTile / 4) + OpaqueThreadIndex();
}

__device__ __forceinline__ void RaiseMaximum(int* maximum, float x) {
  atomicMax(maximum, __float_as_int(fmaxf(x, 0.0f)));  // a row's largest is at least its product with itself
}

template <Scalar kScalar, bool kCompensated>
__global__ void __launch_bounds__(kThreads, 2) MaximaKernel(const __grid_constant__ LargeParams p) {
  if (p.header->invalid || !p.header->shift_by_maxima) return;
  constexpr int kTile = 64;
  constexpr int kUnits = kTile / 32;
  const int tiles = static_cast<int>(NumTiles(p.square, CeilDiv(p.rows, kTile), CeilDiv(p.columns, kTile)));
  for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile = TileAt<kTile>(p, index);
    __syncthreads();
    const auto raise = [&](int m, const float (&s)[kUnits][kUnits][4]) {
      const ThreadTile<kTile> at(tile);
      int* maxima = p.maxima + static_cast<int64_t>(m) * p.rows;
      float column_max[kUnits][2] = {};
#pragma unroll
      for (int r = 0; r < kUnits; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float row_max = 0;
#pragma unroll
          for (int c = 0; c < kUnits; ++c) {
#pragma unroll
            for (int v = 0; v < 2; ++v) {  // zeros outside
              row_max = fmaxf(row_max, s[r][c][2 * h + v]);
              column_max[c][v] = fmaxf(column_max[c][v], s[r][c][2 * h + v]);
            }
          }
#pragma unroll
          for (int delta = 1; delta < 4; delta *= 2) {
            row_max = fmaxf(row_max, __shfl_xor_sync(kAllLanes, row_max, delta));
          }
          if (at.in_quad == 0 && at.Row(r, h) < p.rows) RaiseMaximum(maxima + at.Row(r, h), row_max);
        }
      }
      if (!p.square || tile.row == tile.column) return;
#pragma unroll
      for (int c = 0; c < kUnits; ++c) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
#pragma unroll
          for (int delta = 4; delta < 32; delta *= 2) {
            column_max[c][v] = fmaxf(column_max[c][v], __shfl_xor_sync(kAllLanes, column_max[c][v], delta));
          }
          if (at.quad == 0 && at.Column(c, v) < p.columns) RaiseMaximum(maxima + at.Column(c, v), column_max[c][v]);
        }
      }
    };
    ForEachSimilarityTile<kScalar, kCompensated, kTile>(p, tile, {0, p.num_matrices}, SharedMemory(), raise);
  }
}

__device__ __forceinline__ float RowShift(const LargeParams& p, int m, int row) {
  if (!p.header->shift_by_maxima) return 1.0f;
  return row < p.rows ? __int_as_float(p.maxima[static_cast<int64_t>(m) * p.rows + row]) : 0.0f;
}

// Adds a matrix's tile to its rows' sums and, if the tile also stands for its mirror image, to its columns' sums.
// kCommon: the tile lies fully inside the matrix, and all rows have the common shift.
template <int kTile, bool kCommon>
__device__ __forceinline__ void AddSums(const LargeParams& p, Tile tile, int m,
                                        const float (&s)[kTile / 32][kTile / 32][4],
                                        const float (&student)[kTile / 32][kTile / 32][4]) {
  constexpr int kUnits = kTile / 32;
  const ThreadTile<kTile> at(tile);
  const float exp_scale = kLog2E / *p.temperature;
  const float cross_scale = CrossSumScale(p);
  unsigned long long* exp_sums = p.exp_sums + static_cast<int64_t>(m) * p.rows;
  unsigned long long* cross_sums = p.cross_sums + static_cast<int64_t>(m - 1) * p.rows;
  const bool mirrored = p.square && tile.row != tile.column;
  float column_exp[kUnits][2] = {};
  float column_cross[kUnits][2] = {};
  float column_shift[kUnits][2] = {};
  if (!kCommon && mirrored) {
#pragma unroll
    for (int c = 0; c < kUnits; ++c) {
#pragma unroll
      for (int v = 0; v < 2; ++v) column_shift[c][v] = RowShift(p, m, at.Column(c, v));
    }
  }
#pragma unroll
  for (int r = 0; r < kUnits; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = at.Row(r, h);
      const float row_shift = kCommon ? 1.0f : RowShift(p, m, row);
      float row_exp = 0;
      float row_cross = 0;
#pragma unroll
      for (int c = 0; c < kUnits; ++c) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const float similarity = s[r][c][2 * h + v];
          const float difference = similarity - student[r][c][2 * h + v];
          float e, column_e;
          if constexpr (kCommon) {
            e = column_e = Exp2(fmaf(similarity, exp_scale, -exp_scale));
          } else {
            const bool inside = row < p.rows && at.Column(c, v) < p.columns;
            e = inside ? ShiftedExp(similarity, row_shift, exp_scale) : 0.0f;
            column_e = inside ? ShiftedExp(similarity, column_shift[c][v], exp_scale) : 0.0f;
          }
          row_exp += e;
          row_cross += e * difference;
          column_exp[c][v] += column_e;
          column_cross[c][v] += column_e * difference;
        }
      }
#pragma unroll
      for (int delta = 1; delta < 4; delta *= 2) {
        row_exp += __shfl_xor_sync(kAllLanes, row_exp, delta);
        row_cross += __shfl_xor_sync(kAllLanes, row_cross, delta);
      }
      if (at.in_quad == r && row < p.rows) {
        AddFixed(exp_sums + row, row_exp, kExpSumScale);
        if (m > 0) AddFixed(cross_sums + row, row_cross, cross_scale);
      }
    }
  }
  if (!mirrored) return;
#pragma unroll
  for (int c = 0; c < kUnits; ++c) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
#pragma unroll
      for (int delta = 4; delta < 32; delta *= 2) {
        column_exp[c][v] += __shfl_xor_sync(kAllLanes, column_exp[c][v], delta);
        column_cross[c][v] += __shfl_xor_sync(kAllLanes, column_cross[c][v], delta);
      }
      const int column = at.Column(c, v);
      if (at.quad == 2 * c + v && column < p.columns) {
        AddFixed(exp_sums + column, column_exp[c][v], kExpSumScale);
        if (m > 0) AddFixed(cross_sums + column, column_cross[c][v], cross_scale);
      }
    }
  }
}

template <Scalar kScalar, bool kCompensated, int kTile>
__global__ void __launch_bounds__(kThreads, kTile == 64 ? 2 : 1) SumsKernel(const __grid_constant__ LargeParams p) {
  if (p.header->invalid) return;
  constexpr int kUnits = kTile / 32;
  const Tile tile = TileAt<kTile>(p, blockIdx.x);
  float student[kUnits][kUnits][4];
  const auto add = [&](int m, const float (&s)[kUnits][kUnits][4]) {
    if (m == 0) {
#pragma unroll
      for (int r = 0; r < kUnits; ++r) {
#pragma unroll
        for (int c = 0; c < kUnits; ++c) {
#pragma unroll
          for (int v = 0; v < 4; ++v) student[r][c][v] = s[r][c][v];
        }
      }
      if (blockIdx.y != 0) return;  // every group of teachers needs the student, but only one adds it up
    }
    if (static_cast<int>(blockIdx.x) < p.kept_tiles) {
      float4* kept = KeptTile<kTile>(p, blockIdx.x, m);
#pragma unroll
      for (int r = 0; r < kUnits; ++r) {
#pragma unroll
        for (int c = 0; c < kUnits; ++c) {
          kept[(r * kUnits + c) * kThreads] = make_float4(s[r][c][0], s[r][c][1], s[r][c][2], s[r][c][3]);
        }
      }
    }
    const bool whole = (tile.row + 1) * kTile <= p.rows && (tile.column + 1) * kTile <= p.columns;
    if (whole && !p.header->shift_by_maxima) {
      AddSums<kTile, true>(p, tile, m, s, student);
    } else {
      AddSums<kTile, false>(p, tile, m, s, student);
    }
  };
  ForEachSimilarityTile<kScalar, kCompensated, kTile>(p, tile, BlockMatrices(p, true), SharedMemory(), add);
}

// Blocks of y = 0 handle the student and the gradient's scales, the others one teacher each.
static __global__ void __launch_bounds__(kThreads) NormalizeKernel(const __grid_constant__ LargeParams p) {
  if (p.header->invalid) return;
  double* shared = reinterpret_cast<double*>(SharedMemory());
  const int m = blockIdx.y;
  const int row = blockIdx.x * kThreads + threadIdx.x;
  double kl = 0;
  if (row < p.rows) {
    const int64_t n = static_cast<int64_t>(m) * p.rows + row;
    const double sum = static_cast<double>(p.exp_sums[n]);
    p.inverse_sums[n] = static_cast<float>(kExpSumScale / sum);
    if (m > 0) {
      const double cross = static_cast<double>(static_cast<long long>(p.cross_sums[n - p.rows]));
      kl = RowKl(cross * (kExpSumScale / static_cast<double>(CrossSumScale(p))), sum,
                 static_cast<double>(p.exp_sums[row]), RowShift(p, m, row), RowShift(p, 0, row), *p.temperature);
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
    // Rows of |H| sum to 2 at most, columns to 2 rows, so an element of H z is below 2 (rows + 1) max |z|.
    const double factor = MakeCoefficients(p, p.header->coefficients);
    const float max_norm = fmaxf(__int_as_float(p.header->max_student_norm), FLT_MIN);
    const float scale = FixedPointScale(2.0 * (p.rows + 1) * sqrtf(max_norm));
    if (row == 0) {
      p.header->gradient_scale = scale;
      p.header->gradient_factor = factor / scale;
    }
  }
}

// h += a matrix's part of H. In the square form, a tile stands for both G and its mirror image's transpose:
// similarities are symmetric, normalisers and the rows' own shifts are not. kCommon: all rows have the common shift.
template <int kTile, bool kCommon>
__device__ __forceinline__ void AddWeights(const LargeParams& p, Tile tile, int m,
                                           const float (&s)[kTile / 32][kTile / 32][4],
                                           float (&h)[kTile / 32][kTile / 32][4]) {
  constexpr int kUnits = kTile / 32;
  const ThreadTile<kTile> at(tile);
  const float exp_scale = kLog2E / *p.temperature;
  const float coefficient = p.header->coefficients[m];
  const float* inverse_sums = p.inverse_sums + static_cast<int64_t>(m) * p.rows;
  const auto normalizer = [&](int row) { return row < p.rows ? coefficient * inverse_sums[row] : 0.0f; };
  float column_normalizers[kUnits][2] = {};
  float column_shift[kUnits][2] = {};
  if (p.square) {
#pragma unroll
    for (int c = 0; c < kUnits; ++c) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        column_normalizers[c][v] = normalizer(at.Column(c, v));
        if (!kCommon) column_shift[c][v] = RowShift(p, m, at.Column(c, v));
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kUnits; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float row_normalizer = normalizer(at.Row(r, half));
      const float row_shift = kCommon ? 1.0f : RowShift(p, m, at.Row(r, half));
#pragma unroll
      for (int c = 0; c < kUnits; ++c) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const float similarity = s[r][c][2 * half + v];
          float& weight = h[r][c][2 * half + v];
          if constexpr (kCommon) {
            const float e = Exp2(fmaf(similarity, exp_scale, -exp_scale));
            weight += e * (row_normalizer + column_normalizers[c][v]);
          } else {
            weight += ShiftedExp(similarity, row_shift, exp_scale) * row_normalizer;
            if (p.square) weight += ShiftedExp(similarity, column_shift[c][v], exp_scale) * column_normalizers[c][v];
          }
        }
      }
    }
  }
}

// Index into H in shared memory: rows of kTile floats in 16-byte chunks. One swizzle serves 16-byte reads along rows (2
// rows, 4 chunks per quarter warp) and 4-byte reads down columns (rows 4 apart, 8 columns).
template <int kTile>
__device__ __forceinline__ int HalfGradientIndex(int row, int column) {
  return row * kTile + (column ^ ((row >> 2 & 3) << 3 ^ (row & 1) << 4));
}

// Index into a chunk of z, for 4-byte reads of 8 columns in 4 rows that are 4 apart. Runs of 8 columns stay together.
__device__ __forceinline__ int ChunkIndex(int row, int column) {
  return row * kGradientChunk + (column ^ (row >> 2 & 3) << 3);
}

// Loads rows [first_row, first_row + kRows) of z, columns from `first_d` on, as floats; zeros outside of z.
template <Scalar kScalar, int kRows>
__device__ __forceinline__ void LoadStudentChunk(const DeviceMatrix& z, int first_row, int end_row, int first_d,
                                                 float* chunk) {
  constexpr int kBytes = kScalar == Scalar::kFloat32 ? 4 : 2;
  constexpr int kLoads = kGradientChunk * kBytes / 16;  // per row
#pragma unroll 4
  for (int n = threadIdx.x; n < kRows * kLoads; n += kThreads) {
    const int row = n / kLoads;
    const int d = n % kLoads * (16 / kBytes);
    const char* from = z.data + static_cast<int64_t>(first_row + row) * z.row_bytes + (first_d + d) * kBytes;
    const int bytes = first_row + row < end_row ? z.row_bytes - (first_d + d) * kBytes : 0;
    uint4 words;
    if (z.access == Access::k16) {
      words = bytes > 0 ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
    } else {
      words = LoadChunk(z.access, from, bytes);
    }
    uint4* to = reinterpret_cast<uint4*>(chunk + ChunkIndex(row, d));
    if constexpr (kScalar == Scalar::kFloat32) {
      *to = words;
    } else {
      const auto low = [](unsigned word) { return __float_as_uint(HalfToFloat<kScalar>(word & 0xffff)); };
      const auto high = [](unsigned word) { return __float_as_uint(HalfToFloat<kScalar>(word >> 16)); };
      to[0] = make_uint4(low(words.x), high(words.x), low(words.y), high(words.y));
      to[1] = make_uint4(low(words.z), high(words.z), low(words.w), high(words.w));
    }
  }
}

// Adds H z to the gradient of the tile's rows, with z the rows that are the tile's columns; transposed, the reverse.
//
// H is always split: blocks that divide the teachers among themselves each hold a part of H that is much larger than
// the whole, and parts rounded to TF32 would not cancel.
template <Scalar kScalar, bool kCompensated, int kTile, bool kTransposed>
__device__ __forceinline__ void AddProduct(const LargeParams& p, const float* h, float* chunk, int first_out,
                                           int end_out, int first_z, int end_z) {
  constexpr bool kSplitZ = kCompensated && kScalar == Scalar::kFloat32;  // 16-bit floats are exact in TF32
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
    LoadStudentChunk<kScalar, kTile>(z, first_z, end_z, first_d, chunk);
    __syncthreads();
    float acc[kRowUnits][kColumnUnits][4] = {};
#pragma unroll 1
    for (int depth = 4 * t; depth < kTile; depth += 16) {
      FragmentB<kSplitZ> b[2][kColumnUnits];
#pragma unroll
      for (int c = 0; c < kColumnUnits; ++c) {
        const auto value = [&](int e) {
          return __float_as_uint(chunk[ChunkIndex(depth + e, warp_column + 8 * c + g)]);
        };
        MakeFragments<Scalar::kFloat32>(make_uint4(value(0), value(1), value(2), value(3)), c, b);
      }
#pragma unroll
      for (int r = 0; r < kRowUnits; ++r) {
        const auto load = [&](int row) {
          if constexpr (kTransposed) {
            const auto value = [&](int e) { return __float_as_uint(h[HalfGradientIndex<kTile>(depth + e, row)]); };
            return make_uint4(value(0), value(1), value(2), value(3));
          } else {
            return *reinterpret_cast<const uint4*>(h + HalfGradientIndex<kTile>(row, depth));
          }
        };
        const int row = warp_row + 16 * r + g;
        FragmentA<true> a[2];
        MakeFragments<Scalar::kFloat32>(load(row), load(row + 8), a);
        MultiplySteps<Scalar::kFloat32>(a, b, acc[r]);
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
__global__ void __launch_bounds__(kThreads, kTile == 64 ? 2 : 1) GradientKernel(const __grid_constant__ LargeParams p) {
  if (p.header->invalid) return;
  constexpr int kUnits = kTile / 32;
  const Tile tile = TileAt<kTile>(p, blockIdx.x);
  const MatrixRange range = BlockMatrices(p, blockIdx.y == 0);
  float h[kUnits][kUnits][4] = {};
  const auto weigh = [&](int m, const float (&s)[kUnits][kUnits][4]) {
    if (p.header->shift_by_maxima) {
      AddWeights<kTile, false>(p, tile, m, s, h);
    } else {
      AddWeights<kTile, true>(p, tile, m, s, h);
    }
  };
  if (static_cast<int>(blockIdx.x) < p.kept_tiles) {
    for (int m = range.first; m < range.end; m = NextMatrix(p, m)) {
      const float4* kept = KeptTile<kTile>(p, blockIdx.x, m);
      float s[kUnits][kUnits][4];
#pragma unroll
      for (int r = 0; r < kUnits; ++r) {
#pragma unroll
        for (int c = 0; c < kUnits; ++c) {
          const float4 values = kept[(r * kUnits + c) * kThreads];
          s[r][c][0] = values.x;
          s[r][c][1] = values.y;
          s[r][c][2] = values.z;
          s[r][c][3] = values.w;
        }
      }
      weigh(m, s);
    }
  } else {
    ForEachSimilarityTile<kScalar, kCompensated, kTile>(p, tile, range, SharedMemory(), weigh);
    CopyAsyncWait<0>();
  }

  static_assert(kTile * (kTile + kGradientChunk) * sizeof(float) <= kLargeSharedBytes<kTile>);
  float* shared_h = reinterpret_cast<float*>(SharedMemory());
  float* chunk = shared_h + kTile * kTile;
  const ThreadTile<kTile> at({0, 0});
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kUnits; ++r) {
#pragma unroll
    for (int c = 0; c < kUnits; ++c) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        // Rows and columns outside the matrix need no zeros: their z is zero, or their product is discarded.
        shared_h[HalfGradientIndex<kTile>(at.Row(r, v / 2), at.Column(c, v % 2))] = h[r][c][v];
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

static __global__ void __launch_bounds__(kThreads) FinishKernel(const __grid_constant__ LargeParams p) {
  const bool invalid = p.header->invalid != 0;  // if so, the partial sums were not written
  WriteResults(p, p.partial_kl, invalid ? 0 : CeilDiv(p.rows, kThreads), invalid,
               reinterpret_cast<double*>(SharedMemory()));
}

static __global__ void __launch_bounds__(kThreads) ConvertKernel(const __grid_constant__ LargeParams p) {
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
