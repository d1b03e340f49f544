// The computation by tiles of the similarity matrices. No columns x columns matrix ever exists.
//
// Pass 1 sums the rows' normalisers Z and the sums A of exponential * difference of logits. Pass 2, which needs the
// complete normalisers of a row and of a column, weights the same exponentials, kept from pass 1 or recomputed, and
// multiplies them with the student's rows. In the square form every tile above the diagonal also stands for its mirror
// image.
//
// Pass 1 goes through the kept tiles matrix by matrix: the threads share one matrix's rows in the caches, and all have
// work even if tiles are few. A tile that is not kept is processed for all matrices at once.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_TILED_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_TILED_H_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu_buffers.h"
#include "cpu_dots.h"
#include "cpu_gradient.h"
#include "cpu_kernel.h"
#include "cpu_row_sums.h"
#include "cpu_schedule.h"
#include "cpu_simd.h"

namespace s2sd {

class TiledComputation {
 public:
  TiledComputation(const Problem& problem, const CpuOptions& options, const Outputs& outputs,
                   const SimdKernels& kernels, const CpuPlan& plan)
      : problem_(problem),
        options_(options),
        outputs_(outputs),
        kernels_(kernels),
        plan_(plan),
        grid_(problem, plan_.tile),
        dots_(problem, kernels_),
        gradient_products_(problem, kernels_),
        matrices_(problem.num_teachers + 1),
        kept_(plan_.kept),
        sum_turns_(matrices_ * grid_.row_blocks()),
        gradient_turns_(Blocks()),
        sums_(problem.rows, problem.num_teachers),
        workspace_(plan_, matrices_, options.num_threads),
        logits_ready_(new std::atomic<bool>[kept_]),
        divergences_(grid_.row_blocks() * problem.num_teachers) {
    // The most expensive first, so that the last items to finish are short.
    order_.resize(matrices_);
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin() + 1, order_.end(),
                     [&](int a, int b) { return MatrixOf(problem_, a).dim > MatrixOf(problem_, b).dim; });
    for (int64_t index = 0; index < kept_; ++index) {
      logits_ready_[index].store(false, std::memory_order_relaxed);
      const TileTask& task = grid_.tasks()[index];
      for (int matrix = 0; matrix < matrices_; ++matrix) {
        sum_turns_.Skip(SumSlot(matrix, task.row_block));
        if (grid_.HasMirrorImage(task)) sum_turns_.Skip(SumSlot(matrix, task.column_block));
      }
    }
    if (outputs.gradient && !grid_.square()) row_gradient_.resize(problem.rows * problem.student.dim);
  }

  void Run() {
    FindShifts();
    RunPhases({SumPhase(), NormalisePhase(), GradientPhase(), AddRowsPhase()}, options_);
    if (out_of_range_.load()) return RunForAnyLength();
    WriteLoss(problem_, divergences_, outputs_);
  }

  // Shifts every row by its own maximum, which takes one more pass.
  void RunForAnyLength() {
    general_ = true;
    kept_ = 0;
    sums_.Clear();
    shifts_.resize(matrices_);
    maxima_.assign(matrices_ * sums_.stride, -std::numeric_limits<float>::infinity());
    sum_turns_.Reset();
    RunPhases({MaximaPhase()}, options_);
    sum_turns_.Reset();
    gradient_turns_.Reset();
    RunPhases({SumPhase(), NormalisePhase(), GradientPhase(), AddRowsPhase()}, options_);
    WriteLoss(problem_, divergences_, outputs_);
  }

 private:
  // ---- Tiles ----

  Tile TileOf(const TileTask& task, float* values) const {
    return {values, plan_.tile, grid_.RowsOf(task.row_block), grid_.ColumnsOf(task.column_block)};
  }

  void Dots(int matrix, const TileTask& task, const Tile& tile, const ThreadBuffers& buffers) const {
    dots_(MatrixOf(problem_, matrix), problem_.row_offset + grid_.First(task.row_block), grid_.First(task.column_block),
          tile, buffers.operands);
  }

  // Every logit is shifted by the first row's similarity with itself, which is about the largest in a matrix of unit
  // rows. It is computed like all others: if all rows are equal, the shifted logits are exactly 0.
  void FindShifts() {
    const ThreadBuffers& buffers = workspace_.thread(0);
    for (int matrix = 0; matrix < matrices_; ++matrix) {
      dots_(MatrixOf(problem_, matrix), 0, 0, {buffers.teacher, plan_.tile, 1, 1}, buffers.operands);
      shifts_.push_back(buffers.teacher[0]);
    }
  }

  Shift ShiftOf(int matrix, const TileTask& task) const {
    Shift shift{1.0f / *problem_.temperature, shifts_[matrix], nullptr, nullptr};
    if (general_) {
      const float* maxima = maxima_.data() + matrix * sums_.stride;
      shift.rows = maxima + grid_.First(task.row_block);
      if (grid_.square()) shift.columns = maxima + grid_.First(task.column_block);
    }
    return shift;
  }

  // ---- Ordered accumulation ----

  int Blocks() const { return grid_.row_blocks() + (grid_.square() ? 0 : grid_.column_blocks()); }
  // The gradient's slot of a column block: in the square form row blocks and column blocks are the same.
  int ColumnSlot(int block) const { return grid_.square() ? block : grid_.row_blocks() + block; }
  int SumSlot(int matrix, int block) const { return matrix * grid_.row_blocks() + block; }

  // ---- Pass 1 ----

  Phase MaximaPhase() {
    return {plan_.tiles, [this](int64_t item, int thread) { FindMaxima(grid_.tasks()[item], thread); }};
  }

  void FindMaxima(const TileTask& task, int thread) {
    const ThreadBuffers& buffers = workspace_.thread(thread);
    const TileSums maxima(buffers.sums, plan_.tile);
    const Tile tile = TileOf(task, buffers.teacher);
    for (int matrix = 0; matrix < matrices_; ++matrix) {
      std::fill_n(buffers.sums, TileSums::Floats(plan_.tile), -std::numeric_limits<float>::infinity());
      Dots(matrix, task, tile, buffers);
      kernels_.maxima(tile, maxima.row_z, grid_.HasMirrorImage(task) ? maxima.column_z : nullptr);
      const auto merge = [&](int block, int count, const float* from) {
        float* into = maxima_.data() + matrix * sums_.stride + grid_.First(block);
        for (int i = 0; i < count; ++i) into[i] = into[i] >= from[i] || std::isnan(into[i]) ? into[i] : from[i];
      };
      sum_turns_.InTurn(SumSlot(matrix, task.row_block), task.row_turn,
                        [&] { merge(task.row_block, tile.rows, maxima.row_z); });
      if (!grid_.HasMirrorImage(task)) continue;
      sum_turns_.InTurn(SumSlot(matrix, task.column_block), task.column_turn,
                        [&] { merge(task.column_block, tile.columns, maxima.column_z); });
    }
  }

  Phase SumPhase() {
    return {kept_ * matrices_ + plan_.tiles - kept_, [this](int64_t item, int thread) {
              if (item < kept_ * matrices_) {
                SumKept(order_[item / kept_], item % kept_, thread);
              } else {
                SumAtOnce(grid_.tasks()[kept_ + item - kept_ * matrices_], thread);
              }
            }};
  }

  // The sums wait in the workspace until pass 1 ends, so they need no turn.
  void SumKept(int matrix, int64_t index, int thread) {
    const TileTask& task = grid_.tasks()[index];
    const Tile tile = TileOf(task, workspace_.Kept(index, matrix));
    Dots(matrix, task, tile, workspace_.thread(thread));
    if (matrix != 0) WaitUntil([&] { return logits_ready_[index].load(std::memory_order_acquire); });
    Sum(matrix, task, tile, workspace_.Kept(index, 0), workspace_.KeptSums(index, matrix));
    if (matrix == 0) logits_ready_[index].store(true, std::memory_order_release);
  }

  void SumAtOnce(const TileTask& task, int thread) {
    const ThreadBuffers& buffers = workspace_.thread(thread);
    const TileSums sums(buffers.sums, plan_.tile);
    for (int matrix = 0; matrix < matrices_; ++matrix) {
      const Tile tile = TileOf(task, matrix == 0 ? buffers.student : buffers.teacher);
      Dots(matrix, task, tile, buffers);
      Sum(matrix, task, tile, buffers.student, sums);
      sum_turns_.InTurn(SumSlot(matrix, task.row_block), task.row_turn, [&] { AddRows(matrix, task, sums); });
      if (!grid_.HasMirrorImage(task)) continue;
      sum_turns_.InTurn(SumSlot(matrix, task.column_block), task.column_turn, [&] { AddColumns(matrix, task, sums); });
    }
  }

  // Turns dot products into their sums over rows and columns; `logits` are the student's.
  void Sum(int matrix, const TileTask& task, const Tile& tile, const float* logits, const TileSums& sums) {
    const bool columns = grid_.HasMirrorImage(task);
    float* column_z = columns ? sums.column_z : nullptr;
    if (matrix == 0) {
      kernels_.student_sums(tile, ShiftOf(matrix, task), sums.row_z, column_z);
    } else {
      kernels_.teacher_sums(tile, ShiftOf(matrix, task), logits, sums.row_z, sums.row_a, column_z,
                            columns ? sums.column_a : nullptr);
    }
  }

  void AddRows(int matrix, const TileTask& task, const TileSums& sums) {
    sums_.Add(matrix, grid_.First(task.row_block), grid_.RowsOf(task.row_block), sums.row_z, sums.row_a);
  }

  void AddColumns(int matrix, const TileTask& task, const TileSums& sums) {
    sums_.Add(matrix, grid_.First(task.column_block), grid_.ColumnsOf(task.column_block), sums.column_z, sums.column_a);
  }

  Phase NormalisePhase() {
    return {grid_.row_blocks(), [this](int64_t block, int) {
              AddKeptSums(block);
              Normalise(block);
            }};
  }

  void AddKeptSums(int block) {
    for (int64_t index = 0; index < kept_; ++index) {
      const TileTask& task = grid_.tasks()[index];
      const bool as_column = task.column_block == block && grid_.HasMirrorImage(task);
      for (int matrix = 0; matrix < matrices_; ++matrix) {
        if (task.row_block == block) AddRows(matrix, task, workspace_.KeptSums(index, matrix));
        if (as_column) AddColumns(matrix, task, workspace_.KeptSums(index, matrix));
      }
    }
  }

  void Normalise(int block) {
    const LogitShifts shifts{shifts_.data(), general_ ? maxima_.data() : nullptr};
    const int64_t first = grid_.First(block);
    const bool in_range = s2sd::Normalise(problem_, shifts, first, first + grid_.RowsOf(block), sums_,
                                          &divergences_[block * problem_.num_teachers]);
    if (!in_range) out_of_range_.store(true);
  }

  // ---- Pass 2 ----

  Phase GradientPhase() {
    return {outputs_.gradient ? plan_.tiles : 0, [this](int64_t item, int thread) {
              if (general_ || !out_of_range_.load()) AddGradient(item, workspace_.thread(thread));
            }};
  }

  void AddGradient(int64_t index, const ThreadBuffers& buffers) {
    const TileTask& task = grid_.tasks()[index];
    const Tile weights = TileOf(task, buffers.weights);
    Weigh(index, task, weights, buffers);
    const int64_t row = grid_.First(task.row_block), column = grid_.First(task.column_block);
    const int64_t dim = problem_.student.dim;
    float* row_gradient = grid_.square() ? outputs_.gradient : row_gradient_.data();
    AddProduct(weights, false, column, row_gradient + row * dim, task.row_block, task.row_turn, buffers);
    if (grid_.OnDiagonal(task)) return;
    AddProduct(weights, true, problem_.row_offset + row, outputs_.gradient + column * dim,
               ColumnSlot(task.column_block), task.column_turn, buffers);
  }

  // A tile's weights G_ij, plus G_ji in the square form.
  void Weigh(int64_t index, const TileTask& task, const Tile& weights, const ThreadBuffers& buffers) {
    const float* factors = sums_.factors.data();
    Factors of_teacher{factors + grid_.First(task.row_block),
                       grid_.square() ? factors + grid_.First(task.column_block) : nullptr, sums_.stride};
    if (index < kept_) {
      kernels_.weigh_kept(TileOf(task, workspace_.Kept(index, 0)), workspace_.matrix_stride(), problem_.num_teachers,
                          of_teacher, weights.values);
      return;
    }
    const Tile student = TileOf(task, buffers.student), teacher = TileOf(task, buffers.teacher);
    Dots(0, task, student, buffers);
    for (int matrix = 1; matrix < matrices_; ++matrix) {
      Dots(matrix, task, teacher, buffers);
      kernels_.weigh_dots(student, teacher, ShiftOf(0, task), ShiftOf(matrix, task), of_teacher, matrix > 1,
                          weights.values);
      of_teacher.rows += 2 * sums_.stride;
      if (grid_.square()) of_teacher.columns += 2 * sums_.stride;
    }
  }

  // gradient = (or +=, after the first turn) weights (or transposed weights) * the student's rows from `student_row`
  // on. The first columns are multiplied before the tile's turn comes.
  void AddProduct(const Tile& weights, bool transpose, int64_t student_row, float* gradient, int slot, int turn,
                  const ThreadBuffers& buffers) {
    const int64_t dim = problem_.student.dim;
    const int count = transpose ? weights.columns : weights.rows;
    int stride = gradient_products_(weights, transpose, student_row, 0, buffers.packed_student, buffers.product);
    gradient_turns_.InTurn(slot, turn, [&] {
      for (int64_t begin = 0; begin < dim; begin += kGradientWidth) {
        const int64_t width = std::min(kGradientWidth, dim - begin);
        if (begin > 0) {
          stride = gradient_products_(weights, transpose, student_row, begin, buffers.packed_student, buffers.product);
        }
        for (int i = 0; i < count; ++i) {
          const float* from = buffers.product + int64_t{i} * stride;
          float* to = gradient + i * dim + begin;
          if (turn == 0) {
            std::memcpy(to, from, width * sizeof(float));
          } else {
            for (int64_t c = 0; c < width; ++c) to[c] += from[c];
          }
        }
      }
    });
  }

  // In the rectangular form, adds the rows' gradient to the gradient of the same columns.
  Phase AddRowsPhase() {
    return {outputs_.gradient && !grid_.square() ? 1 : 0, [this](int64_t, int) {
              float* to = outputs_.gradient + problem_.row_offset * problem_.student.dim;
              for (size_t i = 0; i < row_gradient_.size(); ++i) to[i] += row_gradient_[i];
            }};
  }

  const Problem& problem_;
  const CpuOptions& options_;
  const Outputs& outputs_;
  const SimdKernels& kernels_;
  const CpuPlan plan_;
  const TileGrid grid_;
  const DotProducts dots_;
  const GradientProducts gradient_products_;
  const int matrices_;      // the student's and the teachers'
  std::vector<int> order_;  // of the matrices, in pass 1
  int64_t kept_;            // tiles
  Turns sum_turns_;         // one per matrix and block
  Turns gradient_turns_;    // one per block
  RowSums sums_;
  Workspace workspace_;
  const std::unique_ptr<std::atomic<bool>[]> logits_ready_;  // one per kept tile
  std::vector<float> shifts_;                                // one per matrix
  std::vector<float> maxima_;        // every row's largest dot product: (matrices, rows); in the general case only
  std::vector<double> divergences_;  // (row blocks, teachers)
  std::vector<float> row_gradient_;  // the rows' gradient in the rectangular form
  std::atomic<bool> out_of_range_{false};
  bool general_ = false;  // rows are shifted by their own maxima
};

}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_TILED_H_
