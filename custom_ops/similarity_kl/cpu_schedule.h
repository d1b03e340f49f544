// Scheduling: the tiles of the similarity matrices, the order in which they add to shared sums, and the phases of a
// computation.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_SCHEDULE_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_SCHEDULE_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <thread>
#include <vector>

#include "cpu_kernel.h"

namespace s2sd {

inline int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t RoundUp(int64_t a, int64_t b) { return DivideUp(a, b) * b; }

inline bool IsSquare(const Problem& problem) { return problem.rows == problem.columns; }

// A tile, and its turns to add to the sums of its row block and of its column block.
struct TileTask {
  int row_block, column_block;
  int row_turn, column_turn;
};

// Divides the similarity matrices into tiles. In the square form a tile above the diagonal also stands for its mirror
// image, and row blocks and column blocks are the same.
class TileGrid {
 public:
  TileGrid(const Problem& problem, int tile)
      : square_(IsSquare(problem)),
        tile_(tile),
        rows_(problem.rows),
        columns_(problem.columns),
        row_blocks_(DivideUp(problem.rows, tile)),
        column_blocks_(DivideUp(problem.columns, tile)) {
    // Along the rows, so that the threads share one block's rows in the last-level cache. The diagonal comes last: its
    // tiles are half the work and even out the load at the end.
    tasks_.reserve(Count(problem, tile));
    std::vector<int> turns(square_ ? column_blocks_ : row_blocks_ + column_blocks_, 0);
    const int first_column = square_ ? 0 : row_blocks_;
    for (int row = 0; row < row_blocks_; ++row) {
      for (int column = square_ ? row + 1 : 0; column < column_blocks_; ++column) {
        const int row_turn = turns[row]++;
        tasks_.push_back({row, column, row_turn, turns[first_column + column]++});
      }
    }
    for (int block = 0; square_ && block < row_blocks_; ++block) tasks_.push_back({block, block, turns[block]++, -1});
  }

  static int64_t Count(const Problem& problem, int tile) {
    const int64_t columns = DivideUp(problem.columns, tile), rows = DivideUp(problem.rows, tile);
    return IsSquare(problem) ? columns * (columns + 1) / 2 : rows * columns;
  }

  const std::vector<TileTask>& tasks() const { return tasks_; }
  bool square() const { return square_; }
  int row_blocks() const { return row_blocks_; }
  int column_blocks() const { return column_blocks_; }

  int64_t First(int block) const { return int64_t{block} * tile_; }
  int RowsOf(int block) const { return std::min<int64_t>(tile_, rows_ - First(block)); }
  int ColumnsOf(int block) const { return std::min<int64_t>(tile_, columns_ - First(block)); }
  bool OnDiagonal(const TileTask& task) const { return square_ && task.row_block == task.column_block; }
  // Whether the tile also stands for its mirror image.
  bool HasMirrorImage(const TileTask& task) const { return square_ && task.row_block != task.column_block; }

 private:
  bool square_;
  int64_t tile_, rows_, columns_;
  int row_blocks_, column_blocks_;
  std::vector<TileTask> tasks_;
};

// Waits for a condition that another thread is about to make true.
template <class Condition>
void WaitUntil(const Condition& condition) {
  for (int round = 0; !condition(); ++round) {
    if (round >= 64) {
      std::this_thread::yield();
    } else {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }
}

// Ordered accumulation: threads add to a sum in the order of the turns, whichever comes first, so that the rounding is
// always the same.
class Turns {
 public:
  explicit Turns(int sums) : next_(new std::atomic<int>[sums]), sums_(sums) { Reset(); }

  void Reset() {
    for (int sum = 0; sum < sums_; ++sum) next_[sum].store(0, std::memory_order_relaxed);
  }

  // Passes over one turn that nobody takes.
  void Skip(int sum) { next_[sum].fetch_add(1, std::memory_order_relaxed); }

  template <class Add>
  void InTurn(int sum, int turn, const Add& add) {
    WaitUntil([&] { return next_[sum].load(std::memory_order_acquire) >= turn; });
    add();
    next_[sum].store(turn + 1, std::memory_order_release);
  }

 private:
  std::unique_ptr<std::atomic<int>[]> next_;
  int sums_;
};

// Part of a computation: independent items, to be done when all items of the earlier phases are done.
struct Phase {
  int64_t items;
  std::function<void(int64_t item, int thread)> run;
};

// Every thread takes item after item, in order. No thread waits for an item that has not been started, so neither the
// order nor the overlap of the tasks matters, and one thread can do it all.
inline void RunPhases(const std::vector<Phase>& phases, const CpuOptions& options) {
  std::vector<int64_t> ends;
  ends.reserve(phases.size());
  for (const Phase& phase : phases) ends.push_back((ends.empty() ? 0 : ends.back()) + phase.items);
  std::atomic<int64_t> next{0}, done{0};
  const auto task = [&](int thread) noexcept {
    size_t phase = 0;
    for (int64_t item; (item = next.fetch_add(1)) < ends.back(); done.fetch_add(1, std::memory_order_acq_rel)) {
      while (item >= ends[phase]) ++phase;
      const int64_t begin = phase == 0 ? 0 : ends[phase - 1];
      WaitUntil([&] { return done.load(std::memory_order_acquire) >= begin; });
      phases[phase].run(item - begin, thread);
    }
  };
  if (options.run_tasks && options.num_threads > 1 && ends.back() > 1) {
    options.run_tasks(options.num_threads, task);
  } else {
    task(0);
  }
}

}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_SCHEDULE_H_
