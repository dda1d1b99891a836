// Threads that help with a piece of work if they have the time, and the steps of a work that several do together.
//
// OpenMP's regions end when every thread has taken part; where other processes want the cores too, that is a wait for
// the operating system's turn. Here nobody is waited for who has not begun: whoever comes takes what is left.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <thread>

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
  explicit Steps(size_t count) : steps_(count) {}

  struct Step {
    std::atomic<int64_t> taken{0}, done{0};
  };
  Step& operator[](size_t index) { return steps_[index]; }

 private:
  std::vector<Step> steps_;
};

// One thread's way through the steps. Without steps it is alone and does everything.
class Member {
 public:
  Member() = default;
  Member(Steps& steps, int64_t parts) : steps_(&steps), parts_(parts) {}

  // Has work(begin, end) called for all of [0, count), by whoever is there, and returns when it is done.
  template <typename Work>
  void share(int64_t count, const Work& work) {
    if (!steps_) return work(0, count);
    Steps::Step& step = (*steps_)[next_++];
    const int64_t parts = std::min(parts_, count);
    for (int64_t part = step.taken++; part < parts; part = step.taken++) {
      work(count * part / parts, count * (part + 1) / parts);
      step.done.fetch_add(1, std::memory_order_release);
    }
    for (Patience patience; step.done.load(std::memory_order_acquire) < parts;) patience.wait();
  }

 private:
  Steps* steps_ = nullptr;
  int64_t parts_ = 1;
  size_t next_ = 0;
};

}  // namespace slimpajama
