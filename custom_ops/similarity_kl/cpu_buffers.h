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

// The buffers of one thread.
struct ThreadBuffers {
  ThreadBuffers(float* floats, int64_t tile, bool packs) : tile(tile) {
    const auto take = [&](int64_t count) {
      float* taken = floats;
      floats += count;
      return taken;
    };
    operands.rows = take(DotProducts::RowFloats(tile, packs));
    operands.columns = take(DotProducts::ColumnFloats(tile, packs));
    student = take(tile * tile);
    teacher = take(tile * tile);
    weights = take(tile * tile);
    packed_student = take(tile * kGradientWidth);
    product = take(tile * kGradientWidth);
    sums = take(4 * tile);
  }

  // A multiple of 64 bytes.
  static int64_t Floats(int64_t tile, bool packs) {
    return DotProducts::RowFloats(tile, packs) + DotProducts::ColumnFloats(tile, packs) + 3 * tile * tile +
           2 * tile * kGradientWidth + 4 * tile;
  }

  float* row_z() const { return sums; }
  float* row_a() const { return sums + tile; }
  float* column_z() const { return sums + 2 * tile; }
  float* column_a() const { return sums + 3 * tile; }

  int64_t tile;
  DotBuffers operands;
  float *student, *teacher, *weights, *packed_student, *product, *sums;
};

// What is known of every row of the similarity matrices.
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

  double* Z(int matrix) { return z.data() + matrix * stride; }
  double* A(int teacher) { return a.data() + teacher * stride; }
  float* OwnFactors(int teacher) { return factors.data() + 2 * teacher * stride; }
  float* StudentFactors(int teacher) { return OwnFactors(teacher) + stride; }

  int64_t stride;
  std::vector<double> z;       // of every matrix, the sums of exponentials
  std::vector<double> a;       // of every teacher, the sums of exponential * (logit - student's logit)
  std::vector<float> factors;  // of every teacher; see Factors
};

// One allocation for the exponentials that are kept from pass 1 to pass 2, and for the buffers of all threads.
class Workspace {
 public:
  Workspace(const CpuPlan& plan, int matrices, int num_threads)
      : tile_floats_(int64_t{plan.tile} * plan.tile),
        matrices_(matrices),
        arena_(plan.kept_bytes +
               num_threads * ThreadBuffers::Floats(plan.tile, plan.packs) * int64_t{sizeof(float)}) {
    float* floats = arena_.floats() + plan.kept * matrices * tile_floats_;
    threads_.reserve(num_threads);
    for (int thread = 0; thread < num_threads; ++thread) {
      threads_.emplace_back(floats, plan.tile, plan.packs);
      floats += ThreadBuffers::Floats(plan.tile, plan.packs);
    }
  }

  // Of a tile that is kept: the student's logits (matrix 0), and a teacher's exponentials.
  float* Kept(int64_t tile, int matrix) const { return arena_.floats() + (tile * matrices_ + matrix) * tile_floats_; }
  int64_t matrix_stride() const { return tile_floats_; }
  const ThreadBuffers& thread(int thread) const { return threads_[thread]; }

 private:
  int64_t tile_floats_;
  int matrices_;
  ArenaLoan arena_;
  std::vector<ThreadBuffers> threads_;
};

}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_BUFFERS_H_
