// Threads that go through a sequence of steps together, and the barrier between two steps.
//
// A member that waits spins for some microseconds and then lets others have its core: on a crowded machine the thread
// that it waits for may be among them.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "common.h"

namespace slimpajama {

class Barrier {
 public:
  explicit Barrier(int64_t size) : size_(size) {}

  void wait() {
    const int64_t turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int64_t count = 0; turn_.load(std::memory_order_acquire) == turn; ++count)
      if (count < SPINS) pause();
      else std::this_thread::yield();
  }

 private:
  static constexpr int64_t SPINS = 2000;

  static void pause() {
#if HAS_X86
    _mm_pause();
#endif
  }

  const int64_t size_;
  std::atomic<int64_t> arrived_{0}, turn_{0};
};

struct Team {
  int64_t rank = 0, size = 1;
  Barrier* barrier = nullptr;  // none for a team of one

  void wait() const {
    if (barrier) barrier->wait();
  }

  // Calls work(begin, end) with this member's part of [0, count).
  template <typename Work>
  void share(int64_t count, const Work& work) const {
    const int64_t begin = count * rank / size, end = count * (rank + 1) / size;
    if (begin < end) work(begin, end);
  }
};

}  // namespace slimpajama
