// Work for several threads, which end before the call does: no pool that a fork would lose.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace diffprune::cpu {

// work(task) for each task from 0 to tasks - 1, on this thread and at most threads - 1 others.
template <class Work>
void in_threads(int threads, int64_t tasks, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto loop = [&] {
    for (int64_t task; (task = next++) < tasks;) work(task);
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < std::min<int64_t>(threads, tasks); ++i) others.emplace_back(loop);
  } catch (const std::system_error&) {  // no more threads to be had: those that there are do the work
  }
  loop();
  for (auto& thread : others) thread.join();
}

}  // namespace diffprune::cpu
