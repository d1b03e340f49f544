// Where a computation's numbers live.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_BUFFERS_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_BUFFERS_H_

#include <cstdint>
#include <vector>

#include "cpu_dots.h"
#include "cpu_kernel.h"
#include "cpu_memory.h"
#include "cpu_schedule.h"
#include "cpu_simd.h"

namespace s2sd {

constexpr int64_t kGradientWidth = 192;  // columns of the student that a tile's weights are multiplied with at once

// What one tile adds to the sums of its rows and, as its mirror image, of its columns: the exponentials (z), and the
// exponentials * (logit - student's logit) (a).
struct TileSums {
  TileSums(float* floats, int64_t tile)
      : row_z(floats), row_a(floats + tile), column_z(floats + 2 * tile), column_a(floats + 3 * tile) {}
  static int64_t Floats(int64_t tile) { return 4 * tile; }

  float *row_z, *row_a, *column_z, *column_a;
};

// The sums of all tiles for every row of the similarity matrices, and what follows from them.
struct RowSums {
  RowSums(int64_t rows, int teachers)
      : stride(RoundUp(rows, kTileGranularity)),
        z((teachers + 1) * stride),
        a(teachers * stride),
        factors(2 * teachers * stride) {}

  void Clear() {
    std::fill(z.begin(), z.end(), 0);
    std::fill(a.begin(), a.end(), 0);
  }

  // Adds what a tile found in `matrix` for `count` rows from `first` on.
  void Add(int matrix, int64_t first, int count, const float* tile_z, const float* tile_a) {
    double* to_z = Z(matrix) + first;
    for (int i = 0; i < count; ++i) to_z[i] += tile_z[i];
    if (matrix == 0) return;
    double* to_a = A(matrix - 1) + first;
    for (int i = 0; i < count; ++i) to_a[i] += tile_a[i];
  }

  double* Z(int matrix) { return z.data() + matrix * stride; }
  double* A(int teacher) { return a.data() + teacher * stride; }
  float* OwnFactors(int teacher) { return factors.data() + 2 * teacher * stride; }
  float* StudentFactors(int teacher) { return OwnFactors(teacher) + stride; }

  int64_t stride;
  std::vector<double> z;       // of every matrix
  std::vector<double> a;       // of every teacher
  std::vector<float> factors;  // of every teacher; see Factors
};

// The buffers of one thread.
struct ThreadBuffers {
  ThreadBuffers(float* floats, int64_t tile, bool packs) : tile(tile) {
    const auto take = [&](int64_t count) {
      float* taken = floats;
      floats += count;
      return taken;
    };
    operands.rows = take(DotProducts::RowFloats(tile));
    operands.columns = take(DotProducts::ColumnFloats(tile, packs));
    student = take(tile * tile);
    teacher = take(tile * tile);
    weights = take(tile * tile);
    packed_student = take(tile * kGradientWidth);
    product = take(tile * kGradientWidth);
    sums = take(TileSums::Floats(tile));
  }

  // A multiple of 64 bytes.
  static int64_t Floats(int64_t tile, bool packs) {
    return DotProducts::RowFloats(tile) + DotProducts::ColumnFloats(tile, packs) + 3 * tile * tile +
           2 * tile * kGradientWidth + TileSums::Floats(tile);
  }

  int64_t tile;
  DotBuffers operands;
  float *student, *teacher, *weights, *packed_student, *product, *sums;
};

// One allocation for what is kept of tiles from pass 1 on, and for the buffers of all threads.
class Workspace {
 public:
  Workspace(const CpuPlan& plan, int matrices, int num_threads)
      : tile_(plan.tile),
        matrices_(matrices),
        arena_((plan.kept * matrices * (tile_ * tile_ + TileSums::Floats(tile_)) +
                num_threads * ThreadBuffers::Floats(tile_, plan.packs)) *
               int64_t{sizeof(float)}) {
    kept_sums_ = arena_.floats() + plan.kept * matrices * tile_ * tile_;
    float* floats = kept_sums_ + plan.kept * matrices * TileSums::Floats(tile_);
    threads_.reserve(num_threads);
    for (int thread = 0; thread < num_threads; ++thread) {
      threads_.emplace_back(floats, tile_, plan.packs);
      floats += ThreadBuffers::Floats(tile_, plan.packs);
    }
  }

  // Of a tile that is kept: the student's logits (matrix 0), and a teacher's exponentials.
  float* Kept(int64_t tile, int matrix) const { return arena_.floats() + (tile * matrices_ + matrix) * tile_ * tile_; }
  int64_t matrix_stride() const { return tile_ * tile_; }
  TileSums KeptSums(int64_t tile, int matrix) const {
    return {kept_sums_ + (tile * matrices_ + matrix) * TileSums::Floats(tile_), tile_};
  }

  const ThreadBuffers& thread(int thread) const { return threads_[thread]; }

 private:
  int64_t tile_;
  int matrices_;
  ArenaLoan arena_;
  float* kept_sums_;
  std::vector<ThreadBuffers> threads_;
};

}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_BUFFERS_H_
