// The dot products of a tile, between rows of one matrix.
//
// There are two ways. If rows are few, they are multiplied as they lie in memory, and every dot product is the sum of a
// vector's lanes. Otherwise one side is transposed ("packed") first, so that a vector's lanes are different dot
// products. Packing costs time per row, which pays off if every packed row meets many others.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_DOTS_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_DOTS_H_

#include <algorithm>
#include <cstdint>

#include "cpu_schedule.h"
#include "cpu_simd.h"

namespace s2sd {

// A thread's copies of operands that cannot be used as they lie in memory.
struct DotBuffers {
  float* rows;
  float* columns;
};

class DotProducts {
 public:
  // Words of a row that are multiplied at a time: a page of memory, so that the hardware prefetcher can follow. Shorter
  // pieces of rows that lie pages apart would be fetched one by one.
  static constexpr int64_t kDepth = 1024;

  // Up to this many columns are multiplied unpacked, in tiles of at most kLargestUnpackedTile. This needs wide vectors,
  // because their lanes are summed for every dot product.
  static constexpr int64_t kUnpackedColumns = 128;
  static constexpr int kLargestUnpackedTile = 48;

  DotProducts(const Problem& problem, const SimdKernels& kernels)
      : problem_(problem),
        kernels_(kernels),
        packs_(problem.columns > kUnpackedColumns || kernels.width < kTileGranularity),
        pairs_(kernels.bfloat16 && problem.scalar == Scalar::kBfloat16) {}

  // The sizes in floats of DotBuffers::rows, for tiles of `tile` rows, and of DotBuffers::columns, packed or not.
  static int64_t RowFloats(int64_t tile) { return tile * kDepth; }
  static constexpr int64_t kColumnFloats = kPackedPanels * kTileGranularity * kDepth;
  static_assert(kLargestUnpackedTile <= kPackedPanels * kTileGranularity);

  // tile = a b^T, where a are the matrix's rows from `first_row` on and b its rows from `first_column` on. If these are
  // the same rows, each dot product is computed once and mirrored.
  void operator()(const Matrix& matrix, int64_t first_row, int64_t first_column, const Tile& tile,
                  const DotBuffers& buffers) const {
    const bool same = first_row == first_column && tile.rows == tile.columns;
    const int64_t words = WordsOf(matrix);
    const char* a = RowAt(matrix, first_row);
    const char* b = RowAt(matrix, first_column);
    for (int64_t first = 0; first < words; first += kDepth) {
      Add(matrix, a, b, first, std::min(kDepth, words - first), first > 0, same, tile, buffers);
    }
    if (same) kernels_.mirror(tile);
  }

  // The dot products of all rows with each other, on and above the diagonal, over the given words only.
  void Part(const Matrix& matrix, int64_t first_word, int64_t words, const Tile& tile,
            const DotBuffers& buffers) const {
    const char* rows = RowAt(matrix, 0);
    Add(matrix, rows, rows, first_word, words, /*accumulate=*/false, /*same=*/true, tile, buffers);
  }

  int64_t WordsOf(const Matrix& matrix) const { return pairs_ ? DivideUp(matrix.dim, 2) : matrix.dim; }

 private:
  const char* RowAt(const Matrix& matrix, int64_t row) const {
    return static_cast<const char*>(matrix.data) + row * matrix.dim * ScalarBytes(problem_.scalar);
  }

  // Whether words can be multiplied as they lie in memory: they are floats, or whole pairs.
  bool PlainWords(const Matrix& matrix) const {
    return problem_.scalar == Scalar::kFloat32 || (pairs_ && matrix.dim % 2 == 0);
  }

  void Add(const Matrix& matrix, const char* a, const char* b, int64_t first, int64_t words, bool accumulate, bool same,
           const Tile& tile, const DotBuffers& buffers) const {
    if (packs_) {
      AddPacked(matrix, a, b, first, words, accumulate, same, tile, buffers);
    } else {
      AddRows(matrix, a, b, first, words, accumulate, same, tile, buffers);
    }
  }

  void AddPacked(const Matrix& matrix, const char* a, const char* b, int64_t first, int64_t words, bool accumulate,
                 bool same, const Tile& tile, const DotBuffers& buffers) const {
    const float* rows = reinterpret_cast<const float*>(a) + first;
    int64_t stride = WordsOf(matrix);
    if (!PlainWords(matrix) || tile.rows % kTileGranularity != 0) {
      kernels_.widen(problem_.scalar, a, matrix.dim, tile.rows, first, words, buffers.rows);
      rows = buffers.rows;
      stride = RoundUp(words, kernels_.width);
    }
    const int64_t row_bytes = matrix.dim * ScalarBytes(problem_.scalar);
    const int packed_columns = kPackedPanels * kernels_.width;
    for (int column = 0; column < tile.columns; column += packed_columns) {
      const int columns = std::min(packed_columns, tile.columns - column);
      kernels_.pack(problem_.scalar, b + column * row_bytes, matrix.dim, columns, first, words, buffers.columns);
      kernels_.panel_products(rows, stride, buffers.columns, columns, words, pairs_, accumulate,
                              same ? column : tile.rows, {tile.values + column, tile.stride, tile.rows, columns});
    }
  }

  void AddRows(const Matrix& matrix, const char* a, const char* b, int64_t first, int64_t words, bool accumulate,
               bool same, const Tile& tile, const DotBuffers& buffers) const {
    const float* rows = reinterpret_cast<const float*>(a) + first;
    const float* columns = reinterpret_cast<const float*>(b) + first;
    int64_t stride = WordsOf(matrix), depth = words;
    if (!PlainWords(matrix) || words % kernels_.width != 0) {
      kernels_.widen(problem_.scalar, a, matrix.dim, tile.rows, first, words, buffers.rows);
      if (!same) kernels_.widen(problem_.scalar, b, matrix.dim, tile.columns, first, words, buffers.columns);
      rows = buffers.rows;
      columns = same ? buffers.rows : buffers.columns;
      stride = depth = RoundUp(words, kernels_.width);
    }
    kernels_.row_dots(rows, columns, stride, depth, pairs_, accumulate, same, tile);
  }

  const Problem& problem_;
  const SimdKernels& kernels_;
  const bool packs_, pairs_;
};

}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_DOTS_H_
