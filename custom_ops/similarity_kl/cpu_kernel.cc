// See cpu_kernel.h. The similarity matrices are cut into tiles; every matrix's part of a tile is made, used and dropped
// before the next tile, so that no matrix of columns x columns ever exists.
//
// Pass 1 adds up the rows' normalisers Z and the sums A of exponential * difference of logits; pass 2, which needs all
// of a row's and a column's normalisers, weighs the same exponentials, kept from pass 1 or computed again, and
// multiplies them with the student's rows. In the square form every tile above the diagonal stands for its mirror image
// as well.
//
// Tiles add to the rows of their row block and of their column block. For a result that does not depend on which thread
// was faster, every block is added to in a fixed order: a tile knows its turn at its two blocks, and waits for it. The
// tiles are taken in the order of their turns, so that whoever waits, waits for a tile that another thread has begun.

#include "cpu_kernel.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "cpu_simd.h"
#include "validate.h"

namespace s2sd {
namespace {

constexpr int64_t kDepthWords = 192;  // of a packed block: 48 of its rows fill three quarters of a 48 KiB L1 cache
constexpr int kTileSizes[] = {384, 336, 288, 240, 192, 144, 96, 48, 32};
constexpr int kTilesPerThread = 8;                    // at least, for an even load, where the batch is large enough
constexpr int64_t kScratchBytes = int64_t{40} << 20;  // of all threads together
constexpr int64_t kGradientWidth = 192;               // columns of the student that pass 2 multiplies at once

// Normalisers within these bounds come from exponentials that neither left the range of float32 nor lost their largest.
constexpr double kSmallestZ = 1e-13, kLargestZ = 1e30;

int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return DivideUp(a, b) * b; }

// Memory that is aligned for vectors, and in huge pages where it is large.
class Arena {
 public:
  explicit Arena(int64_t bytes) : bytes_(RoundUp(bytes, kAlignment)) {
#if defined(__linux__)
    constexpr int64_t kHugePage = int64_t{2} << 20;
    if (bytes_ >= 2 * kHugePage) {
      bytes_ = RoundUp(bytes_, kHugePage);
      mapped_ = mmap(nullptr, bytes_ + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (mapped_ == MAP_FAILED) throw std::bad_alloc();
      data_ = reinterpret_cast<char*>(RoundUp(reinterpret_cast<int64_t>(mapped_), kHugePage));
      madvise(data_, bytes_, MADV_HUGEPAGE);
      mapped_bytes_ = bytes_ + kHugePage;
      return;
    }
#endif
    data_ = static_cast<char*>(std::aligned_alloc(kAlignment, bytes_));
    if (!data_) throw std::bad_alloc();
  }
  ~Arena() {
#if defined(__linux__)
    if (mapped_) {
      munmap(mapped_, mapped_bytes_);
      return;
    }
#endif
    std::free(data_);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  int64_t bytes() const { return bytes_; }
  float* Floats(int64_t first) const { return reinterpret_cast<float*>(data_) + first; }

  static constexpr int64_t kAlignment = 64;

 private:
  int64_t bytes_;
  char* data_ = nullptr;
  void* mapped_ = nullptr;
  int64_t mapped_bytes_ = 0;
};

// Takes the memory that the last computation left, where it is large enough: to have the system clear 256 MiB of pages
// takes a third of the time that a computation of 4,096 rows does. One computation's memory is kept, not more.
class ArenaLoan {
 public:
  explicit ArenaLoan(int64_t bytes) {
    {
      std::lock_guard<std::mutex> lock(Mutex());
      arena_ = std::move(Left());
    }
    if (arena_ && arena_->bytes() < bytes) arena_.reset();
    if (!arena_) arena_.reset(new Arena(bytes));
  }
  ~ArenaLoan() {
    std::lock_guard<std::mutex> lock(Mutex());
    if (!Left() || Left()->bytes() < arena_->bytes()) std::swap(Left(), arena_);
  }

  const Arena* operator->() const { return arena_.get(); }

 private:
  static std::mutex& Mutex() {
    static std::mutex* mutex = new std::mutex;
    return *mutex;
  }
  static std::unique_ptr<Arena>& Left() {
    static std::unique_ptr<Arena>* left = new std::unique_ptr<Arena>;
    return *left;
  }

  std::unique_ptr<Arena> arena_;
};

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

int64_t ScalarBytes(Scalar scalar) { return scalar == Scalar::kFloat32 ? 4 : 2; }

void Pause(int round) {
  if (round < 64) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  } else {
    std::this_thread::yield();
  }
}

template <class Number>
void WaitFor(const std::atomic<Number>& value, Number at_least) {
  for (int round = 0; value.load(std::memory_order_acquire) < at_least; ++round) Pause(round);
}

// A tile, and when it is its turn at the sums of its two blocks.
struct Game {
  int row_block, column_block;
  int row_turn, column_turn;
};

// The tiles in the order in which they are taken: along the rows, so that the threads share one block's rows in the
// last cache; in the square form the diagonal last, whose tiles are half the work and even out the load at the end.
std::vector<Game> Games(int row_blocks, int column_blocks, bool square) {
  std::vector<Game> games;
  std::vector<int> row_turns(row_blocks, 0), own_column_turns(column_blocks, 0);
  std::vector<int>& column_turns = square ? row_turns : own_column_turns;
  for (int row = 0; row < row_blocks; ++row) {
    for (int column = square ? row + 1 : 0; column < column_blocks; ++column) {
      const int row_turn = row_turns[row]++;
      games.push_back({row, column, row_turn, column_turns[column]++});
    }
  }
  for (int block = 0; square && block < row_blocks; ++block) games.push_back({block, block, row_turns[block]++, -1});
  return games;
}

bool IsSquare(const Problem& problem) { return problem.rows == problem.columns; }

int64_t TileCount(const Problem& problem, int tile) {
  const int64_t columns = DivideUp(problem.columns, tile), rows = DivideUp(problem.rows, tile);
  return IsSquare(problem) ? columns * (columns + 1) / 2 : rows * columns;
}

// Floats of one thread's buffers (Scratch below); a multiple of 64 bytes.
int64_t ScratchFloats(int64_t tile, int matrices) {
  return 2 * tile * kDepthWords + 3 * tile * tile + 2 * tile * kGradientWidth + 4 * matrices * tile;
}

class Computation {
 public:
  Computation(const Problem& problem, const CpuOptions& options, const Outputs& outputs)
      : problem_(problem),
        options_(options),
        outputs_(outputs),
        kernels_(KernelsOf(options.simd)),
        plan_(PlanCpu(problem, options.workspace_bytes, options.num_threads, outputs.gradient != nullptr)),
        square_(IsSquare(problem)),
        row_blocks_(DivideUp(problem.rows, plan_.tile)),
        column_blocks_(DivideUp(problem.columns, plan_.tile)),
        padded_rows_(RoundUp(problem.rows, kTileGranularity)),
        padded_columns_(RoundUp(problem.columns, kTileGranularity)),
        matrices_(problem.num_teachers + 1),
        packed_whole_(PackedFloats() * int64_t{sizeof(float)} <= options.packed_bytes),
        temperature_(*problem.temperature),
        games_(Games(row_blocks_, column_blocks_, square_)),
        row_turn_(new std::atomic<int>[row_blocks_]),
        column_turn_(new std::atomic<int>[column_blocks_]),
        z_(matrices_ * padded_rows_),
        a_(problem.num_teachers * padded_rows_),
        factors_(2 * problem.num_teachers * padded_rows_),
        shifts_(matrices_),
        student_log_(padded_rows_),
        block_kl_(row_blocks_ * problem.num_teachers),
        arena_(plan_.kept_bytes +
               ((packed_whole_ ? PackedFloats() : 0) + options.num_threads * ScratchFloats(plan_.tile, matrices_)) *
                   sizeof(float)) {
    float* floats = arena_->Floats(plan_.kept_bytes / sizeof(float));
    for (int thread = 0; thread < options.num_threads; ++thread) {
      scratch_.emplace_back(floats, plan_.tile, matrices_);
      floats += ScratchFloats(plan_.tile, matrices_);
    }
    for (int matrix = 0; packed_whole_ && matrix < matrices_; ++matrix) {
      packed_.push_back(floats);
      floats += WordsOf(MatrixOf(matrix)) * (padded_columns_ + (square_ ? 0 : padded_rows_));
    }
    if (outputs.gradient && !square_) row_gradient_.resize(problem.rows * problem.student.dim);
  }

  void Run() {
    RunPhases({&Computation::Prepare, &Computation::SumTile, &Computation::NormaliseBlock, &Computation::GradientTile,
               &Computation::AddRows});
    if (out_of_range_.load()) {
      general_ = true;
      std::fill(z_.begin(), z_.end(), 0);
      std::fill(a_.begin(), a_.end(), 0);
      maxima_.assign(matrices_ * padded_rows_, -std::numeric_limits<float>::infinity());
      RunPhases({&Computation::MaximaTile, &Computation::SumTile, &Computation::NormaliseBlock,
                 &Computation::GradientTile, &Computation::AddRows});
    }
    WriteLoss();
  }

 private:
  using Phase = void (Computation::*)(int64_t item, int thread);

  // The buffers of one thread.
  struct Scratch {
    Scratch(float* floats, int64_t tile, int matrices) : tile(tile) {
      packed_rows = floats;
      packed_columns = packed_rows + tile * kDepthWords;
      logits = packed_columns + tile * kDepthWords;
      dots = logits + tile * tile;
      weights = dots + tile * tile;
      packed_student = weights + tile * tile;
      product = packed_student + tile * kGradientWidth;
      sums = product + tile * kGradientWidth;
      sums_end = sums + 4 * matrices * tile;
    }

    float* RowZ(int matrix) const { return sums + 4 * matrix * tile; }
    float* RowA(int matrix) const { return RowZ(matrix) + tile; }
    float* ColumnZ(int matrix) const { return RowZ(matrix) + 2 * tile; }
    float* ColumnA(int matrix) const { return RowZ(matrix) + 3 * tile; }

    int64_t tile;
    float *packed_rows, *packed_columns, *logits, *dots, *weights, *packed_student, *product, *sums, *sums_end;
  };

  int64_t ItemsOf(Phase phase) const {
    if (phase == &Computation::Prepare) return matrices_ * (packed_whole_ ? column_blocks_ : 1);
    if (phase == &Computation::NormaliseBlock) return row_blocks_;
    if (phase == &Computation::AddRows) return outputs_.gradient && !square_ ? 1 : 0;
    if (phase == &Computation::GradientTile && !outputs_.gradient) return 0;
    return games_.size();
  }

  // Every thread takes item after item; an item waits until all of the phase before it are done. Nobody waits for an
  // item that no thread has begun, so the order and the overlap of the tasks do not matter.
  void RunPhases(const std::vector<Phase>& phases) {
    std::vector<int64_t> ends;
    for (Phase phase : phases) ends.push_back((ends.empty() ? 0 : ends.back()) + ItemsOf(phase));
    ResetTurns();
    std::atomic<int64_t> next{0}, done{0};
    const auto task = [&](int thread) noexcept {
      size_t phase = 0;
      for (int64_t item; (item = next.fetch_add(1)) < ends.back(); done.fetch_add(1, std::memory_order_acq_rel)) {
        while (item >= ends[phase]) ++phase;
        const int64_t begin = phase == 0 ? 0 : ends[phase - 1];
        WaitFor(done, begin);
        (this->*phases[phase])(item - begin, thread);
      }
    };
    if (options_.run_tasks && options_.num_threads > 1 && ends.back() > 1) {
      options_.run_tasks(options_.num_threads, task);
    } else {
      task(0);
    }
  }

  void ResetTurns() {
    for (int block = 0; block < row_blocks_; ++block) row_turn_[block].store(0);
    for (int block = 0; block < column_blocks_; ++block) column_turn_[block].store(0);
  }

  // ---- Tiles ----

  int RowsOf(int block) const { return std::min<int64_t>(plan_.tile, problem_.rows - int64_t{block} * plan_.tile); }
  int ColumnsOf(int block) const {
    return std::min<int64_t>(plan_.tile, problem_.columns - int64_t{block} * plan_.tile);
  }
  const Matrix& MatrixOf(int matrix) const { return matrix == 0 ? problem_.student : problem_.teachers[matrix - 1]; }

  Tile TileOf(const Game& game, float* values) const {
    return {values, plan_.tile, RowsOf(game.row_block), ColumnsOf(game.column_block)};
  }

  const void* RowsAt(const Matrix& matrix, int64_t row) const {
    return static_cast<const char*>(matrix.data) + row * matrix.dim * ScalarBytes(problem_.scalar);
  }

  bool OnDiagonal(const Game& game) const { return square_ && game.row_block == game.column_block; }

  // Calls `add_rows` when it is the game's turn, in the given pass over all games, at its row block, and `add_columns`
  // when it is its turn at its column block.
  template <class Rows, class Columns>
  void InTurn(const Game& game, int pass, const Rows& add_rows, const Columns& add_columns) {
    AtRows(game, pass, add_rows);
    if (!OnDiagonal(game)) AtColumns(game, pass, add_columns);
  }

  template <class Add>
  void AtRows(const Game& game, int pass, const Add& add) {
    WaitFor(row_turn_[game.row_block], pass * column_blocks_ + game.row_turn);
    add();
    row_turn_[game.row_block].fetch_add(1, std::memory_order_release);
  }

  template <class Add>
  void AtColumns(const Game& game, int pass, const Add& add) {
    // In the square form, rows and columns share the turns of their block.
    std::atomic<int>& turn = (square_ ? row_turn_ : column_turn_)[game.column_block];
    WaitFor(turn, pass * row_blocks_ + game.column_turn);
    add();
    turn.fetch_add(1, std::memory_order_release);
  }

  // ---- Packed operands ----

  bool Pairs() const { return kernels_.bfloat16 && problem_.scalar == Scalar::kBfloat16; }
  int64_t WordsOf(const Matrix& matrix) const { return Pairs() ? DivideUp(matrix.dim, 2) : matrix.dim; }

  int64_t PackedFloats() const {
    int64_t words = 0;
    for (int matrix = 0; matrix < matrices_; ++matrix) words += WordsOf(MatrixOf(matrix));
    return words * (padded_columns_ + (square_ ? 0 : padded_rows_));
  }

  void Prepare(int64_t item, int thread) {
    const int matrix = item % matrices_, block = item / matrices_;
    if (packed_whole_) {
      if (block < row_blocks_) PackBlock(matrix, true, block);
      if (!square_) PackBlock(matrix, false, block);
    }
    if (block == 0) shifts_[matrix] = FirstDot(matrix, scratch_[thread]);
  }

  void PackBlock(int matrix, bool rows, int block) {
    const Matrix& of = MatrixOf(matrix);
    const int64_t first = int64_t{block} * plan_.tile + (rows ? problem_.row_offset : 0);
    kernels_.pack(problem_.scalar, RowsAt(of, first), of.dim, rows ? RowsOf(block) : ColumnsOf(block), 0, WordsOf(of),
                  Packed(matrix, rows, block));
  }

  // The dot product of the first row with itself, which every other row's is about. It is made as all are made: where
  // all rows are equal, every logit less this shift is 0, and nothing is lost to rounding.
  float FirstDot(int matrix, const Scratch& scratch) const {
    Dots(matrix, {0, 0, 0, 0}, {scratch.dots, plan_.tile, 1, 1}, scratch, true);
    return scratch.dots[0];
  }

  // A block of rows or of columns; in the square form they are the same.
  float* Packed(int matrix, bool rows, int block) const {
    return packed_[matrix] +
           ((rows && !square_ ? padded_columns_ : 0) + int64_t{block} * plan_.tile) * WordsOf(MatrixOf(matrix));
  }

  // The dot products of one matrix's rows and columns.
  void Dots(int matrix, const Game& game, const Tile& tile, const Scratch& scratch, bool first_row = false) const {
    const Matrix& of = MatrixOf(matrix);
    const int64_t words = WordsOf(of);
    const bool diagonal = first_row || OnDiagonal(game);
    const void* rows = RowsAt(of, problem_.row_offset + int64_t{game.row_block} * plan_.tile);
    const void* columns = RowsAt(of, int64_t{game.column_block} * plan_.tile);
    for (int64_t first = 0; first < words; first += kDepthWords) {
      const int64_t depth = std::min(kDepthWords, words - first);
      if (packed_whole_) {
        kernels_.products(
            Packed(matrix, true, game.row_block) + first * kernels_.width,
            Packed(matrix, diagonal, diagonal ? game.row_block : game.column_block) + first * kernels_.width,
            words * kernels_.width, depth, Pairs(), first > 0, diagonal, tile);
        continue;
      }
      kernels_.pack(problem_.scalar, rows, of.dim, tile.rows, first, depth, scratch.packed_rows);
      if (!diagonal) {
        kernels_.pack(problem_.scalar, columns, of.dim, tile.columns, first, depth, scratch.packed_columns);
      }
      kernels_.products(scratch.packed_rows, diagonal ? scratch.packed_rows : scratch.packed_columns,
                        depth * kernels_.width, depth, Pairs(), first > 0, diagonal, tile);
    }
    if (diagonal) kernels_.mirror(tile);
  }

  float* Kept(int64_t item, int matrix) const {
    return arena_->Floats((item * matrices_ + matrix) * int64_t{plan_.tile} * plan_.tile);
  }

  bool IsKept(int64_t item) const { return !general_ && item < plan_.kept; }

  Shift ShiftOf(int matrix, const Game& game) const {
    Shift shift{1.0f / temperature_, shifts_[matrix], nullptr, nullptr};
    if (general_) {
      const float* maxima = maxima_.data() + matrix * padded_rows_;
      shift.rows = maxima + int64_t{game.row_block} * plan_.tile;
      if (square_) shift.columns = maxima + int64_t{game.column_block} * plan_.tile;
    }
    return shift;
  }

  bool AddsToColumns(const Game& game) const { return square_ && !OnDiagonal(game); }

  // ---- The phases ----

  void MaximaTile(int64_t item, int thread) {
    const Game& game = games_[item];
    const Scratch& scratch = scratch_[thread];
    const Tile tile = TileOf(game, scratch.dots);
    std::fill(scratch.sums, scratch.sums_end, -std::numeric_limits<float>::infinity());
    for (int matrix = 0; matrix < matrices_; ++matrix) {
      Dots(matrix, game, tile, scratch);
      kernels_.maxima(tile, scratch.RowZ(matrix), AddsToColumns(game) ? scratch.ColumnZ(matrix) : nullptr);
    }
    const auto merge = [&](int block, int count, bool rows) {
      for (int matrix = 0; matrix < matrices_; ++matrix) {
        float* into = maxima_.data() + matrix * padded_rows_ + int64_t{block} * plan_.tile;
        const float* from = rows ? scratch.RowZ(matrix) : scratch.ColumnZ(matrix);
        for (int i = 0; i < count; ++i) into[i] = into[i] >= from[i] || std::isnan(into[i]) ? into[i] : from[i];
      }
    };
    InTurn(
        game, 0, [&] { merge(game.row_block, tile.rows, true); },
        [&] {
          if (square_) merge(game.column_block, tile.columns, false);
        });
  }

  void SumTile(int64_t item, int thread) {
    const Game& game = games_[item];
    const Scratch& scratch = scratch_[thread];
    const bool columns = AddsToColumns(game);
    for (int matrix = 0; matrix < matrices_; ++matrix) {
      const Tile tile = TileOf(game, IsKept(item) ? Kept(item, matrix) : scratch.dots);
      Dots(matrix, game, tile, scratch);
      float* column_z = columns ? scratch.ColumnZ(matrix) : nullptr;
      if (matrix == 0) {
        kernels_.student_sums(tile, ShiftOf(matrix, game), scratch.logits, scratch.RowZ(matrix), column_z);
      } else {
        kernels_.teacher_sums(tile, ShiftOf(matrix, game), scratch.logits, scratch.RowZ(matrix), scratch.RowA(matrix),
                              column_z, columns ? scratch.ColumnA(matrix) : nullptr);
      }
    }
    const auto add = [&](int block, int count, bool rows) {
      const int64_t first = int64_t{block} * plan_.tile;
      for (int matrix = 0; matrix < matrices_; ++matrix) {
        const float* z = rows ? scratch.RowZ(matrix) : scratch.ColumnZ(matrix);
        for (int i = 0; i < count; ++i) z_[matrix * padded_rows_ + first + i] += z[i];
        if (matrix == 0) continue;
        const float* a = rows ? scratch.RowA(matrix) : scratch.ColumnA(matrix);
        for (int i = 0; i < count; ++i) a_[(matrix - 1) * padded_rows_ + first + i] += a[i];
      }
    };
    InTurn(
        game, general_ ? 1 : 0, [&] { add(game.row_block, RowsOf(game.row_block), true); },
        [&] {
          if (square_) add(game.column_block, ColumnsOf(game.column_block), false);
        });
  }

  // From the sums of a block of rows: their divergences, and the factors of the gradient's exponentials.
  //
  // The weights G of a row add up to 0, teacher by teacher, and what rounding leaves of that sum would go into the
  // gradient with the mean of all rows. So the student's factors follow from the rounded ones of the teachers.
  void NormaliseBlock(int64_t block, int) {
    const int64_t first = block * plan_.tile, last = first + RowsOf(block);
    const double scale = double{temperature_} / problem_.rows;
    const auto log_z = [&](int matrix, int64_t row) {
      const int64_t at = matrix * padded_rows_ + row;
      if (!general_ && !(z_[at] > kSmallestZ && z_[at] < kLargestZ)) out_of_range_.store(true);
      return std::log(z_[at]) + double{general_ ? maxima_[at] : shifts_[matrix]} / temperature_;
    };
    // The logits of the sums A are shifted in the same way, or not at all.
    const auto shift = [&](int matrix) { return general_ ? 0 : double{shifts_[matrix]} / temperature_; };
    double* student_log = student_log_.data() + first;
    for (int64_t row = first; row < last; ++row) student_log[row - first] = log_z(0, row);
    for (int k = 0; k < problem_.num_teachers; ++k) {
      float* own = factors_.data() + 2 * k * padded_rows_;
      float* students = own + padded_rows_;
      double sum = 0;
      for (int64_t row = first; row < last; ++row) {
        const double z = z_[(k + 1) * padded_rows_ + row];
        sum += a_[k * padded_rows_ + row] / z + shift(k + 1) - shift(0) - log_z(k + 1, row) + student_log[row - first];
        own[row] = -scale * problem_.weights[k] / z;
        students[row] = -double{own[row]} * z / z_[row];
      }
      block_kl_[block * problem_.num_teachers + k] = sum;
    }
  }

  void GradientTile(int64_t item, int thread) {
    if (!general_ && out_of_range_.load()) return;
    const Game& game = games_[item];
    const Scratch& scratch = scratch_[thread];
    const float* factors = factors_.data();
    Factors of_teacher{factors + int64_t{game.row_block} * plan_.tile,
                       square_ ? factors + int64_t{game.column_block} * plan_.tile : nullptr, padded_rows_};
    if (IsKept(item)) {
      kernels_.weigh_kept(TileOf(game, Kept(item, 0)), int64_t{plan_.tile} * plan_.tile, problem_.num_teachers,
                          of_teacher, scratch.weights);
    } else {
      const Tile student = TileOf(game, scratch.logits), teacher = TileOf(game, scratch.dots);
      Dots(0, game, student, scratch);
      for (int matrix = 1; matrix < matrices_; ++matrix) {
        Dots(matrix, game, teacher, scratch);
        kernels_.weigh_dots(student, teacher, ShiftOf(0, game), ShiftOf(matrix, game), of_teacher, matrix > 1,
                            scratch.weights);
        of_teacher.rows += 2 * padded_rows_;
        if (square_) of_teacher.columns += 2 * padded_rows_;
      }
    }
    const Tile weights = TileOf(game, scratch.weights);
    const int64_t row = int64_t{game.row_block} * plan_.tile, column = int64_t{game.column_block} * plan_.tile;
    const int64_t dim = problem_.student.dim;
    const int pass = general_ ? 2 : 1;
    AddProduct(weights, false, column, (square_ ? outputs_.gradient : row_gradient_.data()) + row * dim,
               game.row_turn == 0, scratch, [&](const auto& add) { AtRows(game, pass, add); });
    if (OnDiagonal(game)) return;
    AddProduct(weights, true, problem_.row_offset + row, outputs_.gradient + column * dim, game.column_turn == 0,
               scratch, [&](const auto& add) { AtColumns(game, pass, add); });
  }

  // gradient = (or +=) weights * the student's rows from `student_row` on, or transposed weights * these. `in_turn`
  // calls what it is given when it is this tile's turn; the products before that need no waiting.
  template <class InTurn>
  void AddProduct(const Tile& weights, bool transpose, int64_t student_row, float* gradient, bool first,
                  const Scratch& scratch, const InTurn& in_turn) const {
    const int64_t dim = problem_.student.dim;
    const int depth = transpose ? weights.rows : weights.columns;
    const int count = transpose ? weights.columns : weights.rows;
    const auto multiply = [&](int64_t begin) {
      const int panels = DivideUp(std::min(kGradientWidth, dim - begin), kernels_.width);
      kernels_.pack_rows(problem_.scalar, RowsAt(problem_.student, student_row), dim, depth, begin, panels,
                         scratch.packed_student);
      kernels_.multiply(weights, transpose, scratch.packed_student, panels, scratch.product);
      return panels * kernels_.width;
    };
    int stride = multiply(0);
    in_turn([&] {
      for (int64_t begin = 0; begin < dim; begin += kGradientWidth) {
        const int64_t width = std::min(kGradientWidth, dim - begin);
        if (begin > 0) stride = multiply(begin);
        for (int i = 0; i < count; ++i) {
          const float* from = scratch.product + int64_t{i} * stride;
          float* to = gradient + i * dim + begin;
          if (first) {
            std::memcpy(to, from, width * sizeof(float));
          } else {
            for (int64_t c = 0; c < width; ++c) to[c] += from[c];
          }
        }
      }
    });
  }

  // The rectangular form's rows are columns too.
  void AddRows(int64_t, int) {
    float* to = outputs_.gradient + problem_.row_offset * problem_.student.dim;
    for (size_t i = 0; i < row_gradient_.size(); ++i) to[i] += row_gradient_[i];
  }

  void WriteLoss() const {
    double total = 0;
    for (int k = 0; k < problem_.num_teachers; ++k) {
      double sum = 0;
      for (int block = 0; block < row_blocks_; ++block) sum += block_kl_[block * problem_.num_teachers + k];
      sum *= double{temperature_} * temperature_ / problem_.rows;
      outputs_.per_teacher[k] = sum;
      total += problem_.weights[k] * sum;
    }
    *outputs_.total = total;
  }

  const Problem& problem_;
  const CpuOptions& options_;
  const Outputs& outputs_;
  const SimdKernels& kernels_;
  const CpuPlan plan_;
  const bool square_;
  const int row_blocks_, column_blocks_;
  const int64_t padded_rows_, padded_columns_;
  const int matrices_;       // the student's, and the teachers'
  const bool packed_whole_;  // at the start, not block by block
  const float temperature_;
  const std::vector<Game> games_;
  const std::unique_ptr<std::atomic<int>[]> row_turn_, column_turn_;
  std::vector<double> z_, a_;        // sums of every row: (matrices, rows) and (teachers, rows)
  std::vector<float> factors_;       // see Factors: (teachers, 2, rows)
  std::vector<float> shifts_;        // of every matrix: the dot product of the first row with itself
  std::vector<float> maxima_;        // of every row's dot products: (matrices, rows); in the general case only
  std::vector<double> student_log_;  // logarithms of the student's normalisers
  std::vector<double> block_kl_;     // (row blocks, teachers)
  std::vector<float> row_gradient_;  // of the rectangular form's rows
  const ArenaLoan arena_;            // kept exponentials, the threads' buffers, packed matrices
  std::vector<Scratch> scratch_;     // one a thread
  std::vector<float*> packed_;       // of every matrix its columns, then, in the rectangular form, its rows
  std::atomic<bool> out_of_range_{false};
  bool general_ = false;  // rows are shifted by their own maxima
};

std::string Check(const Problem& problem) { return ValidateForCpu(problem); }

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
  int tile = 0;
  for (int size : kTileSizes) {
    tile = size;
    if (TileCount(problem, size) >= int64_t{kTilesPerThread} * num_threads &&
        ScratchFloats(size, problem.num_teachers + 1) * int64_t{sizeof(float)} * num_threads <= kScratchBytes) {
      break;
    }
  }
  const int64_t tiles = TileCount(problem, tile);
  const int64_t tile_bytes = (problem.num_teachers + 1) * int64_t{tile} * tile * sizeof(float);
  const int64_t kept = gradient ? std::min(tiles, workspace_bytes / tile_bytes) : 0;
  return {tile, tiles, kept, kept * tile_bytes};
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
