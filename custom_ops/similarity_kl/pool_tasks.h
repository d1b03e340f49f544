// Runs the CPU kernel's tasks on a thread pool of TensorFlow or XLA.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_POOL_TASKS_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_POOL_TASKS_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>  // NOLINT
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>  // NOLINT
#include <utility>

#include "cpu_kernel.h"

namespace s2sd {

// Runs task(0), ..., task(num_tasks - 1) on the calling thread and on the threads that `schedule` provides.
//
// The caller may itself be a thread of the pool that `schedule` uses, and all the others may be here too. So it never
// waits for a task to begin: it runs every task that nobody has begun, then waits for those that are running. Whatever
// the pool starts later finds no task left and touches only the shared state.
template <typename Schedule>
void RunPoolTasks(int num_tasks, const std::function<void(int)>& task, const Schedule& schedule) {
  struct State {
    std::atomic<int> next{0};
    std::mutex mutex;
    std::condition_variable all_done;
    std::atomic<int> done{0};
  };
  auto state = std::make_shared<State>();
  auto run = [state, num_tasks, &task] {
    int count = 0;
    for (int i; (i = state->next.fetch_add(1)) < num_tasks; ++count) task(i);
    if (count == 0) return;
    if (state->done.fetch_add(count) + count < num_tasks) return;
    std::lock_guard<std::mutex> lock(state->mutex);
    state->all_done.notify_all();
  };
  for (int i = 1; i < num_tasks; ++i) schedule(run);
  run();
  // The others finish at about the same time: sleeping and being woken would take longer than most waits.
  constexpr int kRounds = 20000;
  for (int round = 0; round < kRounds; ++round) {
    if (state->done.load() == num_tasks) return;
  }
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done.load() == num_tasks; });
}

// Options for a kernel whose tasks run on the calling thread and on a pool with `num_threads` threads.
template <typename Schedule>
CpuOptions PooledCpuOptions(int64_t num_threads, Schedule schedule) {
  CpuOptions options;
  options.workspace_bytes = WorkspaceBytes();
  options.num_threads = static_cast<int>(std::max<int64_t>(num_threads, 1));
  options.run_tasks = [schedule = std::move(schedule)](int num_tasks, const std::function<void(int)>& task) {
    RunPoolTasks(num_tasks, task, schedule);
  };
  return options;
}

}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_POOL_TASKS_H_
