// Threads that run one step together: the same function on each, with barriers between its parts.
#pragma once

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

// Waits for a value to change: spins for about `kSpins` pauses, as between the parts of a step, then sleeps.
constexpr int kSpins = 4096;

inline void wait_while(std::atomic<uint32_t>& value, uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    relax();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

class Pool {
 public:
  explicit Pool(int size) : size_(size) {
    for (int i = 1; i < size; ++i) threads_.emplace_back([this, i] { work(i); });
  }

  ~Pool() {
    task_ = nullptr;
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  int size() const { return size_; }

  // Runs task(i) for each thread i, the caller being number 0, and returns when all have ended.
  void run(const std::function<void(int)>& task) {
    task_ = &task;
    next_.store(0, std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    task(0);
    barrier();
  }

  // Every thread of a task calls it equally often. The last to come starts the shared counter again.
  void barrier() {
    if (size_ == 1) {
      next_.store(0, std::memory_order_relaxed);
      return;
    }
    uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      phase_.notify_all();
    } else {
      wait_while(phase_, phase);
    }
  }

  // Shares out items 0 … count - 1 of one part of a task, `grain` at a time, to whichever thread is free. The part ends
  // with a barrier.
  template <class F>
  void share(int64_t count, int64_t grain, F&& f) {
    for (;;) {
      int64_t begin = next_.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) break;
      int64_t end = begin + grain < count ? begin + grain : count;
      for (int64_t i = begin; i < end; ++i) f(i);
    }
    barrier();
  }

 private:
  void work(int index) {
    uint32_t seen = 0;
    for (;;) {
      wait_while(round_, seen);
      seen = round_.load(std::memory_order_acquire);
      if (task_ == nullptr) return;
      (*task_)(index);
      barrier();
    }
  }

  int size_;
  const std::function<void(int)>* task_ = nullptr;
  std::vector<std::thread> threads_;
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> next_{0};
};

}  // namespace minisgl::cpu
