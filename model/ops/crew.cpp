#include "crew.h"

namespace slimpajama {

Crew& Crew::get() {
  static auto* crew = new Crew;  // never destroyed: its threads use it until the process ends
  return *crew;
}

void Crew::run(int64_t threads, const std::function<void(int64_t)>& work) {
  if (threads <= 1) return work(0);
  const std::lock_guard lock(mutex_);
  for (; helpers_ < threads - 1; ++helpers_) std::thread([this] { help(); }).detach();
  work_ = &work;
  wanted_ = threads - 1;
  finished_.store(0, std::memory_order_relaxed);
  places_.store(wanted_, std::memory_order_release);
  ++calls_;
  calls_.notify_all();
  work(0);
  const int64_t begun = wanted_ - places_.exchange(0, std::memory_order_acq_rel);
  for (Patience patience; finished_.load(std::memory_order_acquire) < begun;) patience.wait();
}

void Crew::help() {
  for (uint32_t heard = 0;; heard = calls_) {
    int64_t places = places_.load(std::memory_order_acquire);
    while (places > 0 && !places_.compare_exchange_weak(places, places - 1, std::memory_order_acq_rel)) continue;
    if (places > 0) {
      (*work_)(wanted_ - places + 1);
      finished_.fetch_add(1, std::memory_order_release);
    }
    calls_.wait(heard);
  }
}

}  // namespace slimpajama
