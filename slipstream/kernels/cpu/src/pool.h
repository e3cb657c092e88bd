// Who computes? A fixed set of threads that run one body together, and meet at barriers inside it.
//
// A waiting worker first spins (the next op of a step comes within microseconds), then yields its core, then
// sleeps: an idle engine costs nothing, and a busy neighbour is not starved. One body runs at a time; callers
// from several threads take turns. A forked child starts workers of its own.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif

namespace slipstream {

inline void relax_core() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins, then yields, until `is_ready()`. For waits whose end another running thread brings.
template <class Predicate>
inline void wait_awake(Predicate&& is_ready) {
  for (int turn = 0; !is_ready(); ++turn) {
    if (turn < 4096) {
      relax_core();
    } else {
      std::this_thread::yield();
    }
  }
}

class Pool {
 public:
  explicit Pool(int size) { start(size); }
  ~Pool() { stop(); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return size_; }

  // Waits for a running body to end first.
  void resize(int size) {
    std::lock_guard<std::mutex> turn(turn_);
    if (size == size_) return;
    stop();
    start(size);
  }

  // Calls body(thread, threads) on every thread, the caller being thread 0, and returns when all have.
  template <class Body>
  void run(Body&& body) {
    std::lock_guard<std::mutex> turn(turn_);
    if (size_ == 1) {
      body(0, 1);
      return;
    }
    using Plain = std::remove_reference_t<Body>;
    call_ = [](void* raw, int thread, int threads) { (*static_cast<Plain*>(raw))(thread, threads); };
    body_ = const_cast<void*>(static_cast<const void*>(&body));
    num_done_.store(0, std::memory_order_relaxed);
    wake_workers();
    body(0, size_);
    wait_awake([this] { return num_done_.load(std::memory_order_acquire) == size_ - 1; });
  }

  // Every thread of a running body waits here for all the others.
  void barrier() {
    if (size_ == 1) return;
    const uint64_t size = static_cast<uint64_t>(size_);
    const uint64_t mine = num_arrived_.fetch_add(1, std::memory_order_acq_rel);
    const uint64_t all = (mine / size + 1) * size;
    wait_awake([this, all] { return num_arrived_.load(std::memory_order_acquire) >= all; });
  }

 private:
  static constexpr int kSpins = 20000;   // about 100 us to 1 ms, by how long a pause takes
  static constexpr int kYields = 2000;   // about 1 ms on an idle machine

  void start(int size) {
    size_ = size;
    is_stopping_.store(false, std::memory_order_relaxed);
    num_arrived_.store(0, std::memory_order_relaxed);
    const uint64_t job = job_.load(std::memory_order_relaxed);
    for (int thread = 1; thread < size; ++thread) {
      workers_.emplace_back([this, thread, job] { work(thread, job); });
    }
  }

  void stop() {
    is_stopping_.store(true, std::memory_order_relaxed);
    wake_workers();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  void work(int thread, uint64_t seen) {
    for (;; ++seen) {
      wait_for_job(seen);
      if (is_stopping_.load(std::memory_order_relaxed)) return;
      call_(body_, thread, size_);
      num_done_.fetch_add(1, std::memory_order_release);
    }
  }

  void wait_for_job(uint64_t seen) {
    const auto is_there = [this, seen] { return job_.load(std::memory_order_seq_cst) != seen; };
    for (int turn = 0; turn < kSpins + kYields; ++turn) {
      if (is_there()) return;
      if (turn < kSpins) {
        relax_core();
      } else {
        std::this_thread::yield();
      }
    }
    std::unique_lock<std::mutex> lock(sleep_);
    num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
    alarm_.wait(lock, is_there);
    num_sleeping_.fetch_sub(1, std::memory_order_seq_cst);
  }

  void wake_workers() {
    // A sleeper counts itself before it looks at the job for the last time, so one of the two sees the other.
    job_.fetch_add(1, std::memory_order_seq_cst);
    if (num_sleeping_.load(std::memory_order_seq_cst) == 0) return;
    std::lock_guard<std::mutex> lock(sleep_);
    alarm_.notify_all();
  }

  int size_ = 1;
  std::vector<std::thread> workers_;
  std::mutex turn_;
  std::mutex sleep_;
  std::condition_variable alarm_;
  void (*call_)(void*, int, int) = nullptr;
  void* body_ = nullptr;
  std::atomic<bool> is_stopping_{false};
  alignas(64) std::atomic<uint64_t> job_{0};
  alignas(64) std::atomic<int> num_sleeping_{0};
  alignas(64) std::atomic<int> num_done_{0};
  alignas(64) std::atomic<uint64_t> num_arrived_{0};
};

namespace pool_detail {
// Never destroyed: at exit workers may still be waiting on it.
inline std::atomic<Pool*> instance{nullptr};

inline void forget_in_child() {
  // The parent's workers do not exist here, and its locks may be held by nobody.
  Pool* old = instance.load(std::memory_order_relaxed);
  if (old != nullptr) instance.store(new Pool(1), std::memory_order_relaxed);
}
}  // namespace pool_detail

// The process's pool; of one thread until it is resized. A forked child's has one thread until it resizes it.
inline Pool& pool() {
  Pool* found = pool_detail::instance.load(std::memory_order_acquire);
  if (found != nullptr) return *found;
  static std::mutex first;
  std::lock_guard<std::mutex> lock(first);
  found = pool_detail::instance.load(std::memory_order_acquire);
  if (found == nullptr) {
    found = new Pool(1);
    pool_detail::instance.store(found, std::memory_order_release);
#ifndef _WIN32
    pthread_atfork(nullptr, nullptr, pool_detail::forget_in_child);
#endif
  }
  return *found;
}

}  // namespace slipstream
