// A thread that computes masks beside Python. Jobs are done in order, one for each step; a job's rows wait for the tokens
// that the step before samples. What a mask and its state are is said by `core.Masks`.
#pragma once

#include <minisgl/masks/matcher.h>
#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <thread>

namespace minisgl {

enum State : int32_t { kPending = 0, kReady = 1, kNotReady = 2 };  // of a mask: `core.MASK_READY`, …
constexpr int32_t kIdPending = -3;                                 // a token that is not sampled yet
constexpr double kLongestWait = 30.0;                              // seconds, for the step before
constexpr std::chrono::milliseconds kLook{20};                     // between looks for what was not told

// What workers wait for: jobs, and the tokens that these need. A device says nothing when it has written some, a host does.
struct Tokens {
  std::mutex lock;
  std::condition_variable changed;
  std::atomic<bool> are_told = false;

  void tell() {
    {
      std::lock_guard guard(lock);
      are_told = true;
    }
    changed.notify_all();
  }

  int32_t at(const int32_t* ref) { return __atomic_load_n(ref, __ATOMIC_ACQUIRE); }

  // Until the token may be there.
  void wait(const int32_t* ref) {
    if (!are_told) {
      const timespec pause{0, 10'000};
      nanosleep(&pause, nullptr);
      return;
    }
    std::unique_lock guard(lock);
    if (at(ref) == kIdPending) changed.wait_for(guard, kLook);
  }
};

inline Tokens& tokens = *new Tokens;  // for ever: threads of workers that nobody has closed wait there

using Handle = std::shared_ptr<Matcher>;  // a job holds its matchers

// A record of `kernel/masks.py`.
struct Row {
  const Handle* matcher;
  const int32_t* ref;  // where the device writes the last token, or null: the host knows it
  int64_t length;      // tokens of the output before the one that is to be sampled
  int64_t known;       // the last of them that the host knows
  int64_t place;       // of the mask
};

struct Job {
  std::vector<Row> rows;
  std::vector<Handle> matchers;
  uint32_t* words = nullptr;
  int32_t* states = nullptr;
  size_t num_words = 0;
};

class Worker {
 public:
  std::atomic<int64_t> num_dear = 0;  // masks that took more than `dear` seconds of a core
  std::atomic<double> cost = 0;       // seconds of a core that the last job took

  explicit Worker(double dear) : dear(dear), thread([this] { run(); }) { tokens.are_told = false; }  // until somebody tells some

  ~Worker() {
    {
      std::lock_guard guard(tokens.lock);
      is_closing = true;
    }
    tokens.changed.notify_all();
    thread.join();
  }

  // Where tokens are told, a worker that will soon hear of the job's is not woken for the job itself.
  void submit(Job job) {
    bool is_waiting;
    {
      std::lock_guard guard(tokens.lock);
      last = job;
      jobs.push_back(std::move(job));
      is_waiting = is_asleep || begins();
    }
    if (is_waiting) tokens.changed.notify_all();
  }

  // The last job's rows, each with one token more, which is behind `ids`.
  void go_on(const int32_t* ids, uint32_t* words, int32_t* states) {
    Job job = last;
    job.words = words, job.states = states;
    for (Row& row : job.rows) row.ref = ids + row.place, row.length++, row.known = -1;
    submit(std::move(job));
  }

 private:
  void run() {
    pthread_setname_np(pthread_self(), "minisgl-masks");
    prctl(PR_SET_TIMERSLACK, 1000UL);  // ns: else a short sleep takes much longer
    std::unique_lock guard(tokens.lock);
    while (true) {
      tokens.changed.wait_for(guard, kLook, [this] { return begins(); });
      if (jobs.empty() && is_closing) return;
      if (jobs.empty()) {
        is_asleep = true;
        tokens.changed.wait(guard, [this] { return is_closing || !jobs.empty(); });
        is_asleep = false;
        continue;
      }
      const Job job = std::move(jobs.front());
      jobs.pop_front();
      guard.unlock();
      step_back();
      compute(job);
      guard.lock();
    }
  }

  // The thread that tells of tokens is the one that computes the next step: it goes on, and a core that has nothing to do, or
  // will have, takes this one.
  void step_back() {
    const sched_param none{};
    if (tokens.are_told && !is_behind) is_behind = sched_setscheduler(0, SCHED_BATCH, &none) == 0;
  }

  // Whether there is something to do, and it can be done at once. The lock is held.
  bool begins() const {
    auto is_there = [](const Row& row) { return row.ref == nullptr || tokens.at(row.ref) != kIdPending; };
    if (is_closing || jobs.empty()) return is_closing;
    return !tokens.are_told || std::all_of(jobs.front().rows.begin(), jobs.front().rows.end(), is_there);
  }

  void compute(const Job& job) {
    std::vector<int64_t> last;  // of all rows first: they come together, and their place will be used again
    for (const Row& row : job.rows) last.push_back(row.ref == nullptr ? row.known : token_at(row.ref));
    double spent = 0;
    for (size_t i = 0; i < job.rows.size(); i++) {
      const int64_t place = job.rows[i].place;
      uint32_t* words = job.words + place * job.num_words;
      const bool is_there = serve(job.rows[i], last[i], *job.matchers[i], words, job.num_words * 4);
      __atomic_store_n(job.states + place, is_there ? kReady : kNotReady, __ATOMIC_RELEASE);
      const double taken = job.matchers[i]->cost;
      num_dear += taken > dear;
      spent += taken;
    }
    cost = spent;
  }

  bool serve(const Row& row, int64_t last, Matcher& matcher, uint32_t* words, size_t num_bytes) {
    if (row.ref != nullptr && last < 0) return false;  // it was not sampled
    const int64_t before = row.ref == nullptr ? -1 : row.known;
    std::lock_guard guard(matcher.lock);
    const uint32_t ids[2] = {uint32_t(before), uint32_t(last)};
    const int64_t num = row.length - matcher.num_tokens;
    if (matcher.num_tokens < 0 || num < 0 || num > 2 || (num > 0 && last < 0) || (num > 1 && before < 0)) return false;
    return matcher.advance(row.length, ids, 2, words, num_bytes);
  }

  int64_t token_at(const int32_t* ref) {
    const double start = seconds(CLOCK_MONOTONIC);
    while (true) {
      const int32_t token = tokens.at(ref);
      if (token != kIdPending) return token;
      if (is_closing) return kIdPending;
      if (seconds(CLOCK_MONOTONIC) - start > kLongestWait) return kIdPending;
      tokens.wait(ref);
    }
  }

  const double dear;
  std::deque<Job> jobs;
  Job last;                // that was submitted
  bool is_asleep = false;  // until there is a job
  bool is_behind = false;  // it does not interrupt who wakes it
  std::atomic<bool> is_closing = false;
  std::thread thread;  // last: it uses the others
};

}  // namespace minisgl
