// Threads that help with a piece of work if they have the time, and the steps of a work that several do together.
//
// OpenMP's regions end when every thread has taken part; where other processes want the cores too, that is a wait for
// the operating system's turn. Here nobody is waited for who has not begun: whoever comes takes what is left. (Where a
// work's steps are many, and torch's own regions before and after it, torch's threads do: `go_through`.)
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "common.h"

namespace slimpajama {

// Tells the core that this thread only waits; now and then lets others have it: the awaited one may be among them.
class Patience {
 public:
  void wait() {
    if (++count_ % SPINS == 0) return std::this_thread::yield();
#if HAS_X86
    _mm_pause();
#endif
  }

 private:
  static constexpr int64_t SPINS = 500;
  int64_t count_ = 0;
};

class Crew {
 public:
  // The process's own; its threads sleep between the pieces of work, and end with the process.
  static Crew& get();

  // Calls work(0) here and work(1), work(2), ... to work(threads - 1) on those helpers that come before that has
  // returned; returns when all of them have. `work` must not throw.
  void run(int64_t threads, const std::function<void(int64_t)>& work);

 private:
  void help();

  std::mutex mutex_;  // one piece of work at a time
  int64_t helpers_ = 0;
  const std::function<void(int64_t)>* work_ = nullptr;
  int64_t wanted_ = 0;
  std::atomic<int64_t> places_{0}, finished_{0};  // for helpers of this work; zero when nobody may begin any more
  std::atomic<uint32_t> calls_{0};
};

// Steps that follow each other, each cut into parts that anybody may do; a step begins when the one before it is done.
class Steps {
 public:
  Steps(int64_t count, int64_t threads) : threads_(threads), counters_(count * (threads + 1)) {}

  int64_t threads() const { return threads_; }
  void begin_anew() {
    for (Counter& counter : counters_) counter.value.store(0, std::memory_order_relaxed);
  }
  // How many of a thread's own parts of a step are taken, and how many of all are done.
  std::atomic<int64_t>& taken(int64_t step, int64_t owner) { return counters_[step * (threads_ + 1) + owner].value; }
  std::atomic<int64_t>& done(int64_t step) { return taken(step, threads_); }

 private:
  struct alignas(64) Counter {  // a line for each, for each is mostly one thread's
    std::atomic<int64_t> value{0};
  };

  int64_t threads_;
  std::vector<Counter> counters_;
};

// One thread's way through the steps. Without steps it is alone and does everything.
class Member {
 public:
  Member() = default;
  Member(Steps& steps, int64_t rank) : steps_(&steps), rank_(rank) {}

  // Has work(begin, end) called for all of [0, count), in that many parts or fewer, by whoever is there, and returns
  // when it is done. Every thread has parts of its own, side by side, and helps the others when they are done.
  template <typename Work>
  void share(int64_t count, int64_t most_parts, const Work& work) {
    if (!steps_) return work(0, count);
    const int64_t step = next_++, threads = steps_->threads(), parts = std::min(most_parts, count);
    for (int64_t i = 0; i < threads; ++i) {
      const int64_t owner = (rank_ + i) % threads, last = parts * (owner + 1) / threads;
      auto& taken = steps_->taken(step, owner);
      for (int64_t part = parts * owner / threads + taken++; part < last; part = parts * owner / threads + taken++) {
        work(count * part / parts, count * (part + 1) / parts);
        steps_->done(step).fetch_add(1, std::memory_order_release);
      }
    }
    for (Patience patience; steps_->done(step).load(std::memory_order_acquire) < parts;) patience.wait();
  }

  // In a few parts for each thread: threads are not always equally fast.
  template <typename Work>
  void share(int64_t count, const Work& work) { share(count, steps_ ? 4 * steps_->threads() : 1, work); }

 private:
  Steps* steps_ = nullptr;
  int64_t rank_ = 0, next_ = 0;
};

// Has work(member) called by every one of torch's threads, who go through `steps` steps together. `work` must not throw:
// the others would wait for it.
template <typename Work>
void go_through(int64_t steps, const Work& work) {
  const int64_t threads = at::get_num_threads();
  if (threads == 1) return work(Member());
  Steps all(steps, threads);
  at::parallel_for(0, threads, 1, [&](int64_t rank, int64_t) noexcept { work(Member(all, rank)); });
}

}  // namespace slimpajama
