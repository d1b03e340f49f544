// The computation for batches whose similarity matrices all fit into the caches.
//
// Most of its time goes into reading the inputs from memory, not into the dot products, which are kept. So a thread
// multiplies all rows with each other over some of their words, and no two threads read the same words. The rest works
// on rows of the similarity matrices, which are then complete: their sums, their normalisers and the gradient.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_SMALL_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_SMALL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu_dots.h"
#include "cpu_gradient.h"
#include "cpu_kernel.h"
#include "cpu_memory.h"
#include "cpu_row_sums.h"
#include "cpu_schedule.h"
#include "cpu_simd.h"

namespace s2sd {

class SmallComputation {
 public:
  // The problem must be in the square form.
  SmallComputation(const Problem& problem, const CpuOptions& options, const Outputs& outputs,
                   const SimdKernels& kernels)
      : problem_(problem),
        options_(options),
        outputs_(outputs),
        kernels_(kernels),
        dots_(problem, kernels),
        gradient_products_(problem, kernels),
        matrices_(problem.num_teachers + 1),
        size_(problem.rows),
        stride_(RoundUp(problem.rows, kTileGranularity)),
        strips_(DivideUp(problem.rows, kernels.width)),
        sums_(problem.rows, problem.num_teachers),
        divergences_(strips_ * problem.num_teachers) {
    CutIntoParts();
    arena_.reset(new ArenaLoan(
        (ThreadFloats() * options.num_threads + static_cast<int64_t>(parts_.size() + matrices_) * stride_ * stride_) *
        static_cast<int64_t>(sizeof(float))));
  }

  // Returns whether the outputs are valid, that is, whether all normalisers were in range.
  bool Run() {
    const int64_t parts = parts_.size(), gradient_strips = outputs_.gradient ? strips_ : 0;
    RunPhases({{parts, [this](int64_t item, int thread) { Multiply(by_length_[item], thread); }},
               {strips_, [this](int64_t strip, int thread) { Sum(strip, thread); }},
               {gradient_strips, [this](int64_t strip, int thread) { WriteGradient(strip, thread); }}},
              options_);
    if (out_of_range_.load()) return false;
    WriteLoss(problem_, divergences_, outputs_);
    return true;
  }

 private:
  // A range of words of all rows of a matrix.
  struct Part {
    int matrix;
    int64_t first, words;
  };

  // Long parts need fewer sums over vector lanes; short parts give work to more threads.
  void CutIntoParts() {
    int64_t words = 0, depth = DotProducts::kDepth;
    for (int matrix = 0; matrix < matrices_; ++matrix) words += dots_.WordsOf(MatrixOf(problem_, matrix));
    while (depth > 256 && words < depth * options_.num_threads) depth /= 2;
    for (int matrix = 0; matrix < matrices_; ++matrix) {
      first_part_.push_back(parts_.size());
      const int64_t end = dots_.WordsOf(MatrixOf(problem_, matrix));
      for (int64_t first = 0; first < end; first += depth)
        parts_.push_back({matrix, first, std::min(depth, end - first)});
    }
    first_part_.push_back(parts_.size());
    by_length_.resize(parts_.size());
    std::iota(by_length_.begin(), by_length_.end(), 0);
    std::stable_sort(by_length_.begin(), by_length_.end(),
                     [&](int a, int b) { return parts_[a].words > parts_[b].words; });
  }

  // ---- Buffers ----

  int64_t ThreadFloats() const {
    return DotProducts::RowFloats(stride_) + DotProducts::kColumnFloats + stride_ * kGradientWidth +
           kTileGranularity * (stride_ + kGradientWidth) + TileSums::Floats(kTileGranularity);
  }
  float* ThreadBuffer(int thread) const { return arena_->floats() + thread * ThreadFloats(); }

  // A part's dot products, on and above the diagonal.
  float* Dots(int part) const { return ThreadBuffer(options_.num_threads) + part * stride_ * stride_; }
  // The student's logits (matrix 0) or a teacher's exponentials.
  float* Values(int matrix) const { return Dots(parts_.size() + matrix); }

  Tile StripOf(int64_t strip, float* values) const {
    const int64_t first = strip * kernels_.width;
    return {values, stride_, static_cast<int>(std::min<int64_t>(kernels_.width, size_ - first)), size_};
  }

  // ---- Phases ----

  void Multiply(int index, int thread) {
    const Part& part = parts_[index];
    dots_.Part(MatrixOf(problem_, part.matrix), part.first, part.words, {Dots(index), stride_, size_, size_},
               {ThreadBuffer(thread), ThreadBuffer(thread) + DotProducts::RowFloats(stride_)});
  }

  void Sum(int64_t strip, int thread) {
    const int64_t first = strip * kernels_.width;
    const TileSums tile_sums(ThreadBuffer(thread), kTileGranularity);
    std::vector<float> shifts(matrices_);
    for (int matrix = 0; matrix < matrices_; ++matrix) {
      const int first_part = first_part_[matrix], parts = first_part_[matrix + 1] - first_part;
      // The first row's dot product with itself, summed as in `symmetric_rows`; see TiledComputation::FindShifts.
      shifts[matrix] = Dots(first_part)[0];
      for (int part = 1; part < parts; ++part) shifts[matrix] += Dots(first_part + part)[0];
      const Shift shift{1.0f / *problem_.temperature, shifts[matrix], nullptr, nullptr};
      const Tile tile = StripOf(strip, Values(matrix) + first * stride_);
      kernels_.symmetric_rows(Dots(first_part), stride_ * stride_, parts, size_, stride_, first, tile.values);
      if (matrix == 0) {
        kernels_.student_sums(tile, shift, tile_sums.row_z, nullptr);
      } else {
        kernels_.teacher_sums(tile, shift, Values(0) + first * stride_, tile_sums.row_z, tile_sums.row_a, nullptr,
                              nullptr);
      }
      sums_.Add(matrix, first, tile.rows, tile_sums.row_z, tile_sums.row_a);
    }
    const int64_t last = std::min<int64_t>(first + kernels_.width, size_);
    const bool in_range =
        Normalise(problem_, {shifts.data(), nullptr}, first, last, sums_, &divergences_[strip * problem_.num_teachers]);
    if (!in_range) out_of_range_.store(true);
  }

  void WriteGradient(int64_t strip, int thread) {
    if (out_of_range_.load()) return;
    const int64_t first = strip * kernels_.width, dim = problem_.student.dim;
    float* packed = ThreadBuffer(thread);
    float* product = packed + stride_ * kGradientWidth;
    const Tile weights = StripOf(strip, product + kTileGranularity * kGradientWidth);
    const float* factors = sums_.factors.data();
    kernels_.weigh_kept(StripOf(strip, Values(0) + first * stride_), stride_ * stride_, problem_.num_teachers,
                        {factors + first, factors, sums_.stride}, weights.values);
    for (int64_t begin = 0; begin < dim; begin += kGradientWidth) {
      const int stride = gradient_products_(weights, /*transpose=*/false, 0, begin, packed, product);
      const int64_t width = std::min(kGradientWidth, dim - begin);
      for (int row = 0; row < weights.rows; ++row) {
        std::memcpy(outputs_.gradient + (first + row) * dim + begin, product + int64_t{row} * stride,
                    width * sizeof(float));
      }
    }
  }

  const Problem& problem_;
  const CpuOptions& options_;
  const Outputs& outputs_;
  const SimdKernels& kernels_;
  const DotProducts dots_;
  const GradientProducts gradient_products_;
  const int matrices_;  // the student's and the teachers'
  const int size_;
  const int64_t stride_;
  const int64_t strips_;         // of as many rows as a vector has lanes
  std::vector<Part> parts_;      // matrix by matrix
  std::vector<int> first_part_;  // of every matrix, and the end of the last
  std::vector<int> by_length_;   // the parts, longest first, so that the last ones to finish are short
  RowSums sums_;
  std::vector<double> divergences_;  // (strips, teachers)
  std::unique_ptr<ArenaLoan> arena_;
  std::atomic<bool> out_of_range_{false};
};

}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_SMALL_H_
