// Threads that take the pieces of one job. Who asks takes pieces as well, so a thread that the
// system puts aside holds up no more than its own piece.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

class Pool {
 public:
  using Piece = void (*)(void*, int);

  // The process's one pool; its threads outlive `main`.
  static Pool& get();

  // Call f(i) for each i in [0, n), on several threads, and wait for all.
  template <class F>
  void run(int n, F&& f) {
    using Function = std::remove_reference_t<F>;
    auto call = [](void* context, int i) { (*static_cast<Function*>(context))(i); };
    if (n < 2 || size() < 2 || !busy_.try_lock()) {  // another stream's job is running: alone
      for (int i = 0; i < n; ++i) f(i);
      return;
    }
    std::lock_guard<std::mutex> lock(busy_, std::adopt_lock);
    run_job(n, call, const_cast<void*>(static_cast<const void*>(&f)));
  }

  int size() const { return size_.load(std::memory_order_relaxed); }
  // Threads that jobs are divided over; those that were started stay.
  void resize(int n) { size_.store(n < 1 ? 1 : n > MOST ? MOST : n); }

 private:
  static constexpr int MOST = 16;
  // Looks at the next job's number before a thread sleeps: some 40 us.
  static constexpr int SPINS = 2000;

  Pool();
  void run_job(int n, Piece piece, void* context);
  void start();
  void work(int index);
  void take(uint32_t job);
  static void* main_of(void*);

  std::mutex busy_;
  std::atomic<int> size_{1};
  int started_ = 1;
  int64_t process_ = 0;

  // A job's number and its next piece, in one word: a thread that comes late cannot take a piece
  // of the job after its own.
  std::atomic<uint64_t> ticket_{0};
  std::atomic<uint32_t> job_{0}, n_pieces_{0};
  std::atomic<int> done_{0}, sleepers_{0};
  std::atomic<void*> context_{nullptr};
  std::atomic<Piece> piece_{nullptr};
};
