// Threads that compute one step together. All run the same task, a sequence of parts whose items they share out.
//
// Nobody waits for a thread that has no item in hand: on a busy machine a thread that was put aside would otherwise hold
// up every part. It skips what was done without it when it comes back.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace minisgl::cpu {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int kSpins = 2000;  // some 20 to 50 microseconds

// Waits within a step, which is short: spins, then lets other programs run.
template <class F>
inline void spin_until(F&& done) {
  for (int i = 0; !done(); ++i) {
    if (i < kSpins)
      relax();
    else
      sched_yield();
  }
}

class Pool {
 public:
  explicit Pool(int size) : size_(size), ranges_(size) {
    for (int i = 1; i < size; ++i) threads_.emplace_back([this, i] { work(i); });
  }

  ~Pool() {
    task_ = nullptr;
    is_open_.store(true);
    round_.fetch_add(1);
    round_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  int size() const { return size_; }

  // Runs task(i) for each thread i that has time, the caller being number 0. All threads call `share` in the same order.
  void run(const std::function<void(int)>& task) {
    task_ = &task;
    current_.store(0);
    done_.store(0);
    for (auto& range : ranges_) range.taken.store(0);
    part_ = 0;
    thread_ = 0;
    is_open_.store(true);
    round_.fetch_add(1);
    round_.notify_all();
    task(0);
    is_open_.store(false);
    spin_until([&] { return active_.load() == 0; });
  }

  // Shares out items 0 … count - 1 of one part. Each thread has a range of neighbours, from which it takes `grain` at a
  // time, and helps the others when it is through. After it, all items are done. What is no more than one grain is left to
  // the caller of `run`.
  template <class F>
  void share(int64_t count, int64_t grain, F&& f) {
    uint32_t part = ++part_;
    if (size_ == 1) {
      for (int64_t i = 0; i < count; ++i) f(i);
      return;
    }
    if (count <= grain && thread_ != 0) return;
    spin_until([&] { return current_.load(std::memory_order_acquire) + 1 >= part; });
    int64_t mine = 0;
    for (int turn = 0; turn < size_ && current_.load(std::memory_order_acquire) < part; ++turn)
      mine += take(part, (thread_ + turn) % size_, count, grain, f);
    if (mine > 0 && done_.fetch_add(mine) + mine == count) {
      done_.store(0);
      current_.store(part, std::memory_order_release);
    }
    if (count == 0 && thread_ == 0) current_.store(part);
    if (thread_ == 0) spin_until([&] { return current_.load(std::memory_order_acquire) >= part; });
  }

 private:
  // How many items of a thread's range are taken, below the part that this is about.
  struct alignas(64) Range {
    std::atomic<uint64_t> taken{0};
  };

  // Does what is left of a thread's range, and returns how many items these were.
  template <class F>
  int64_t take(uint32_t part, int owner, int64_t count, int64_t grain, F&& f) {
    int64_t first = count * owner / size_, size = count * (owner + 1) / size_ - first;
    int64_t mine = 0;
    auto& taken = ranges_[owner].taken;
    uint64_t seen = taken.load(std::memory_order_acquire);
    while (uint32_t(seen >> 32) <= part) {
      int64_t begin = uint32_t(seen >> 32) == part ? uint32_t(seen) : 0, end = std::min(begin + grain, size);
      if (begin >= size) break;
      if (!taken.compare_exchange_weak(seen, (uint64_t(part) << 32) | uint64_t(end))) continue;
      for (int64_t i = begin; i < end; ++i) f(first + i);
      mine += end - begin;
      seen = taken.load(std::memory_order_acquire);
    }
    return mine;
  }

  void work(int index) {
    uint32_t seen = 0;
    for (;;) {
      for (int i = 0; i < kSpins && round_.load() == seen; ++i) relax();
      while (round_.load() == seen) round_.wait(seen);
      seen = round_.load();
      active_.fetch_add(1);
      if (is_open_.load()) {
        if (task_ == nullptr) return;
        part_ = 0;
        thread_ = index;
        (*task_)(index);
      }
      active_.fetch_sub(1);
    }
  }

  static inline thread_local uint32_t part_ = 0;
  static inline thread_local int thread_ = 0;

  int size_;
  const std::function<void(int)>* task_ = nullptr;
  std::vector<std::thread> threads_;
  std::atomic<uint32_t> round_{0};
  std::atomic<bool> is_open_{false};
  std::atomic<int> active_{0};
  std::vector<Range> ranges_;
  alignas(64) std::atomic<uint32_t> current_{0};  // the last part that is done; the first is 1
  alignas(64) std::atomic<int64_t> done_{0};      // items of the part after it
};

}  // namespace minisgl::cpu
