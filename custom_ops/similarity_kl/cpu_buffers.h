// The memory of a tiled computation.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_BUFFERS_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_BUFFERS_H_

#include <cstdint>
#include <vector>

#include "cpu_dots.h"
#include "cpu_gradient.h"
#include "cpu_kernel.h"
#include "cpu_memory.h"
#include "cpu_row_sums.h"

namespace s2sd {

// The buffers of one thread.
struct ThreadBuffers {
  ThreadBuffers(float* floats, int64_t tile) {
    const auto take = [&](int64_t count) {
      float* taken = floats;
      floats += count;
      return taken;
    };
    operands.rows = take(DotProducts::RowFloats(tile));
    operands.columns = take(DotProducts::kColumnFloats);
    student = take(tile * tile);
    teacher = take(tile * tile);
    weights = take(tile * tile);
    packed_student = take(tile * kGradientWidth);
    product = take(tile * kGradientWidth);
    sums = take(TileSums::Floats(tile));
  }

  // A multiple of 64 bytes.
  static int64_t Floats(int64_t tile) {
    return DotProducts::RowFloats(tile) + DotProducts::kColumnFloats + 3 * tile * tile + 2 * tile * kGradientWidth +
           TileSums::Floats(tile);
  }

  DotBuffers operands;
  float *student, *teacher, *weights, *packed_student, *product, *sums;
};

// One allocation for what pass 1 keeps of tiles for pass 2, and for the buffers of all threads.
class Workspace {
 public:
  Workspace(const CpuPlan& plan, int matrices, int num_threads)
      : tile_(plan.tile),
        matrices_(matrices),
        arena_((plan.kept * matrices * (tile_ * tile_ + TileSums::Floats(tile_)) +
                num_threads * ThreadBuffers::Floats(tile_)) *
               int64_t{sizeof(float)}) {
    kept_sums_ = arena_.floats() + plan.kept * matrices * tile_ * tile_;
    float* floats = kept_sums_ + plan.kept * matrices * TileSums::Floats(tile_);
    threads_.reserve(num_threads);
    for (int thread = 0; thread < num_threads; ++thread) {
      threads_.emplace_back(floats, tile_);
      floats += ThreadBuffers::Floats(tile_);
    }
  }

  // A kept tile's values: the student's logits (matrix 0) or a teacher's exponentials.
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
