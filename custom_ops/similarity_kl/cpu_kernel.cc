// See cpu_kernel.h. The similarity matrices are cut into tiles, and no matrix of columns x columns ever exists.
//
// Pass 1 adds up the rows' normalisers Z and the sums A of exponential * difference of logits; pass 2, which needs all
// of a row's and a column's normalisers, weighs the same exponentials, kept from pass 1 or computed again, and
// multiplies them with the student's rows. In the square form every tile above the diagonal stands for its mirror image
// as well.
//
// In pass 1 the kept tiles are done matrix by matrix: the threads share one matrix's rows in the caches, and there is
// work for all of them where the tiles are few. A tile that is not kept is done at once, for all matrices.

#include "cpu_kernel.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "cpu_buffers.h"
#include "cpu_dots.h"
#include "cpu_schedule.h"
#include "cpu_simd.h"

namespace s2sd {
namespace {

constexpr int kTileSizes[] = {192, 144, 96, 48, 32};
constexpr int64_t kUnpackedColumns = 192;  // up to so many, packing a row costs more than it saves
constexpr int kLargestUnpackedTile = 48;
constexpr int kItemsPerThread = 8;                    // at least, for an even load, where the batch is large enough
constexpr int64_t kThreadBytes = int64_t{40} << 20;   // of all threads' buffers together

// Normalisers within these bounds come from exponentials that neither left the range of float32 nor lost their largest.
constexpr double kSmallestZ = 1e-13, kLargestZ = 1e30;

const SimdKernels& KernelsOf(Simd simd) {
  switch (simd) {
#if defined(__x86_64__)
    case Simd::kAvx512Bf16:
      return kAvx512Bf16Kernels;
    case Simd::kAvx512:
      return kAvx512Kernels;
    case Simd::kAvx2:
      return kAvx2Kernels;
#endif
    default:
      return kPortableKernels;
  }
}

class Computation {
 public:
  Computation(const Problem& problem, const CpuOptions& options, const Outputs& outputs)
      : problem_(problem),
        options_(options),
        outputs_(outputs),
        kernels_(KernelsOf(options.simd)),
        plan_(PlanCpu(problem, options.workspace_bytes, options.num_threads, outputs.gradient != nullptr)),
        grid_(problem, plan_.tile),
        dots_(problem, kernels_, plan_.packs),
        matrices_(problem.num_teachers + 1),
        kept_(plan_.kept),
        sum_turns_(matrices_ * grid_.row_blocks()),
        gradient_turns_(Blocks()),
        sums_(problem.rows, problem.num_teachers),
        workspace_(plan_, matrices_, options.num_threads),
        logits_ready_(new std::atomic<bool>[kept_]),
        block_kl_(grid_.row_blocks() * problem.num_teachers) {
    // The dearest first, so that the last items to end are short.
    order_.resize(matrices_);
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin() + 1, order_.end(), [&](int a, int b) { return MatrixOf(a).dim > MatrixOf(b).dim; });
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
    if (out_of_range_.load()) {
      general_ = true;
      kept_ = 0;
      sums_.Clear();
      maxima_.assign(matrices_ * sums_.stride, -std::numeric_limits<float>::infinity());
      sum_turns_.Reset();
      RunPhases({MaximaPhase()}, options_);
      sum_turns_.Reset();
      gradient_turns_.Reset();
      RunPhases({SumPhase(), NormalisePhase(), GradientPhase(), AddRowsPhase()}, options_);
    }
    WriteLoss();
  }

 private:
  // ---- Tiles ----

  const Matrix& MatrixOf(int matrix) const { return matrix == 0 ? problem_.student : problem_.teachers[matrix - 1]; }

  Tile TileOf(const TileTask& task, float* values) const {
    return {values, plan_.tile, grid_.RowsOf(task.row_block), grid_.ColumnsOf(task.column_block)};
  }

  void Dots(int matrix, const TileTask& task, const Tile& tile, const ThreadBuffers& buffers) const {
    dots_(MatrixOf(matrix), problem_.row_offset + grid_.First(task.row_block), grid_.First(task.column_block), tile,
          buffers.operands);
  }

  // Every logit less the first row's with itself, which is about the largest of a matrix of unit rows. It is computed
  // as all are: where all rows are equal, the shifted logits are 0, and nothing is lost to rounding.
  void FindShifts() {
    const ThreadBuffers& buffers = workspace_.thread(0);
    for (int matrix = 0; matrix < matrices_; ++matrix) {
      dots_(MatrixOf(matrix), 0, 0, {buffers.teacher, plan_.tile, 1, 1}, buffers.operands);
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
  // Of the gradient: in the square form rows and columns are the same blocks.
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

  // The sums wait in the workspace until pass 1 ends: they need no turn.
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
      sum_turns_.InTurn(SumSlot(matrix, task.row_block), task.row_turn,
                        [&] { AddRows(matrix, task, sums); });
      if (!grid_.HasMirrorImage(task)) continue;
      sum_turns_.InTurn(SumSlot(matrix, task.column_block), task.column_turn,
                        [&] { AddColumns(matrix, task, sums); });
    }
  }

  // From dot products to what they add to the sums of their rows and columns; `logits` are the student's.
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
    sums_.Add(matrix, grid_.First(task.column_block), grid_.ColumnsOf(task.column_block), sums.column_z,
              sums.column_a);
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

  // From the sums of a block of rows: their divergences, and the factors of the gradient's exponentials.
  //
  // The weights G of a row add up to 0, teacher by teacher, and what rounding leaves of that sum would go into the
  // gradient with the mean of all rows. So the student's factors follow from the rounded ones of the teachers.
  void Normalise(int block) {
    const int64_t first = grid_.First(block), last = first + grid_.RowsOf(block);
    const double temperature = *problem_.temperature, scale = temperature / problem_.rows;
    // The sum over the rows of log Z, with the shifts that the exponentials were made with. A product of eight has one
    // logarithm, and stays within the range of float64.
    const auto log_z = [&](int matrix) {
      const double* z = sums_.Z(matrix);
      double shifts = 0, logs = 0;
      for (int64_t begin = first; begin < last; begin += 8) {
        double product = 1;
        for (int64_t row = begin; row < std::min(begin + 8, last); ++row) {
          if (!general_ && !(z[row] > kSmallestZ && z[row] < kLargestZ)) out_of_range_.store(true);
          shifts += general_ ? maxima_[matrix * sums_.stride + row] : shifts_[matrix];
          product *= z[row];
        }
        logs += std::log(product);
      }
      return logs + shifts / temperature;
    };
    // The logits of the sums A are shifted in the same way, or not at all.
    const auto shift = [&](int matrix) { return general_ ? 0 : double{shifts_[matrix]} / temperature; };
    const double student_log_z = log_z(0);
    const double* student_z = sums_.Z(0);
    for (int k = 0; k < problem_.num_teachers; ++k) {
      const double* z = sums_.Z(k + 1);
      const double* a = sums_.A(k);
      float* own = sums_.OwnFactors(k);
      float* students = sums_.StudentFactors(k);
      double sum = (last - first) * (shift(k + 1) - shift(0)) - log_z(k + 1) + student_log_z;
      for (int64_t row = first; row < last; ++row) {
        sum += a[row] / z[row];
        own[row] = -scale * problem_.weights[k] / z[row];
        students[row] = -double{own[row]} * z[row] / student_z[row];
      }
      block_kl_[block * problem_.num_teachers + k] = sum;
    }
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

  // The weights G_ij, and G_ji with them in the square form, of a tile.
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

  // gradient = (or +=, after the first turn) weights * the student's rows from `student_row` on, or transposed weights
  // * these. The first columns are multiplied before it is the tile's turn.
  void AddProduct(const Tile& weights, bool transpose, int64_t student_row, float* gradient, int slot, int turn,
                  const ThreadBuffers& buffers) {
    const int64_t dim = problem_.student.dim;
    const int count = transpose ? weights.columns : weights.rows;
    int stride = Multiply(weights, transpose, student_row, 0, buffers);
    gradient_turns_.InTurn(slot, turn, [&] {
      for (int64_t begin = 0; begin < dim; begin += kGradientWidth) {
        const int64_t width = std::min(kGradientWidth, dim - begin);
        if (begin > 0) stride = Multiply(weights, transpose, student_row, begin, buffers);
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

  // buffers.product = weights * some columns of the student's rows; returns the floats of a row.
  int Multiply(const Tile& weights, bool transpose, int64_t student_row, int64_t begin,
               const ThreadBuffers& buffers) const {
    const int64_t dim = problem_.student.dim;
    const int depth = transpose ? weights.rows : weights.columns;
    const int panels = DivideUp(std::min(kGradientWidth, dim - begin), kernels_.width);
    if (problem_.scalar == Scalar::kFloat32 && dim % kernels_.width == 0) {
      const float* student = static_cast<const float*>(problem_.student.data) + student_row * dim + begin;
      kernels_.multiply(weights, transpose, student, kernels_.width, dim, panels, buffers.product);
    } else {
      const int64_t bytes = problem_.scalar == Scalar::kFloat32 ? 4 : 2;
      kernels_.pack_rows(problem_.scalar, static_cast<const char*>(problem_.student.data) + student_row * dim * bytes,
                         dim, depth, begin, panels, buffers.packed_student);
      kernels_.multiply(weights, transpose, buffers.packed_student, int64_t{depth} * kernels_.width, kernels_.width,
                        panels, buffers.product);
    }
    return panels * kernels_.width;
  }

  // The rectangular form's rows are columns too.
  Phase AddRowsPhase() {
    return {outputs_.gradient && !grid_.square() ? 1 : 0, [this](int64_t, int) {
              float* to = outputs_.gradient + problem_.row_offset * problem_.student.dim;
              for (size_t i = 0; i < row_gradient_.size(); ++i) to[i] += row_gradient_[i];
            }};
  }

  void WriteLoss() const {
    const double scale = double{*problem_.temperature} * *problem_.temperature / problem_.rows;
    double total = 0;
    for (int k = 0; k < problem_.num_teachers; ++k) {
      double sum = 0;
      for (size_t at = k; at < block_kl_.size(); at += problem_.num_teachers) sum += block_kl_[at];
      outputs_.per_teacher[k] = scale * sum;
      total += problem_.weights[k] * scale * sum;
    }
    *outputs_.total = total;
  }

  const Problem& problem_;
  const CpuOptions& options_;
  const Outputs& outputs_;
  const SimdKernels& kernels_;
  const CpuPlan plan_;
  const TileGrid grid_;
  const DotProducts dots_;
  const int matrices_;      // the student's, and the teachers'
  std::vector<int> order_;  // of the matrices in pass 1
  int64_t kept_;            // tiles
  Turns sum_turns_;         // of every matrix and block
  Turns gradient_turns_;    // of every block
  RowSums sums_;
  Workspace workspace_;
  const std::unique_ptr<std::atomic<bool>[]> logits_ready_;  // of every kept tile
  std::vector<float> shifts_;        // of every matrix
  std::vector<float> maxima_;        // of every row's dot products: (matrices, rows); in the general case only
  std::vector<double> block_kl_;     // (row blocks, teachers)
  std::vector<float> row_gradient_;  // of the rectangular form's rows
  std::atomic<bool> out_of_range_{false};
  bool general_ = false;  // rows are shifted by their own maxima
};

std::string Check(const Problem& problem) {
  if (problem.columns < 1) return "the batch is empty";
  if (problem.rows < 1 || problem.row_offset < 0 || problem.row_offset + problem.rows > problem.columns) {
    return "rows: expected offset >= 0, count >= 1 and offset + count <= " + std::to_string(problem.columns) +
           ". Received: offset " + std::to_string(problem.row_offset) + ", count " + std::to_string(problem.rows);
  }
  if (problem.num_teachers < 1) return "teachers: expected at least one teacher";
  if (problem.student.dim < 1) return "student: expected at least one column";
  for (int k = 0; k < problem.num_teachers; ++k) {
    if (problem.teachers[k].dim < 1) return "teachers[" + std::to_string(k) + "]: expected at least one column";
  }
  if (!(*problem.temperature > 0) || std::isinf(*problem.temperature)) {
    return "temperature: expected a finite number > 0. Received: " + std::to_string(*problem.temperature);
  }
  return "";
}

}  // namespace

Simd BestSimd() {
#if defined(__x86_64__)
  static const Simd best = [] {
    __builtin_cpu_init();
    // Not every compiler's __builtin_cpu_supports knows f16c.
    unsigned eax, ebx, ecx = 0, edx;
    const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
    if (!avx2) return Simd::kPortable;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!avx512) return Simd::kAvx2;
    return __builtin_cpu_supports("avx512bf16") ? Simd::kAvx512Bf16 : Simd::kAvx512;
  }();
  return best;
#else
  return Simd::kPortable;
#endif
}

const char* SimdName(Simd simd) {
  static const char* const names[] = {"portable", "AVX2", "AVX-512", "AVX-512 BF16"};
  return names[static_cast<int>(simd)];
}

int64_t WorkspaceBytes() {
  const char* text = std::getenv("S2SD_TF_WORKSPACE_MIB");
  if (!text || !*text) return kDefaultWorkspaceBytes;
  char* end;
  const double mib = std::strtod(text, &end);
  return *end || !(mib >= 0) || mib > 1e9 ? kDefaultWorkspaceBytes : static_cast<int64_t>(mib * (1 << 20));
}

CpuPlan PlanCpu(const Problem& problem, int64_t workspace_bytes, int num_threads, bool gradient) {
  const int64_t matrices = problem.num_teachers + 1;
  const bool packs = problem.columns > kUnpackedColumns;
  const auto fits = [&](int tile) {
    const int64_t tiles = TileGrid::Count(problem, tile);
    return tiles * matrices >= int64_t{kItemsPerThread} * num_threads &&
           ThreadBuffers::Floats(tile, packs) * int64_t{sizeof(float)} * num_threads <= kThreadBytes;
  };
  int tile = 0;
  for (int size : kTileSizes) {
    if (!packs && size > kLargestUnpackedTile) continue;
    tile = size;
    if (fits(size)) break;
  }
  const int64_t tiles = TileGrid::Count(problem, tile);
  const int64_t tile_bytes = matrices * tile * tile * sizeof(float);
  const int64_t kept = gradient ? std::min(tiles, workspace_bytes / tile_bytes) : 0;
  return {tile, packs, tiles, kept, kept * tile_bytes};
}

std::string SimilarityKlCpu(const Problem& problem, const CpuOptions& options, const Outputs& outputs) {
  const std::string wrong = Check(problem);
  if (!wrong.empty()) return wrong;
  try {
    Computation(problem, options, outputs).Run();
  } catch (const std::bad_alloc&) {
    return "out of memory";
  }
  return "";
}

}  // namespace s2sd
