#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

namespace {

constexpr size_t STACK_BYTES = 1 << 20;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

#ifdef MLXKV_STRESS
// For the test of the pool: a delay at the places where threads can overtake each other.
#include <cstdlib>
void stress() {
  static thread_local unsigned seed = unsigned(uintptr_t(&seed) >> 4);
  int r = rand_r(&seed) % 64;
  if (r == 0) sched_yield();
  for (volatile int i = 0; i < r * 8; i = i + 1) {
  }
}
#else
void stress() {}
#endif

int n_cores() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
}

struct Start {
  Pool* pool;
  int index;
};

}  // namespace

Pool& Pool::get() {
  static Pool* pool = new Pool();
  return *pool;
}

Pool::Pool() { resize(n_cores()); }

void Pool::run_job(int n, Piece piece, void* context) {
  start();
  uint32_t job = uint32_t(ticket_.load() >> 32) + 1;
  // Closed first: a thread late in the job before must find no piece while this one is written.
  ticket_.exchange(uint64_t(job) << 32 | UINT32_MAX);
  stress();
  n_pieces_.store(uint32_t(n), std::memory_order_release);
  context_.store(context, std::memory_order_release);
  piece_.store(piece, std::memory_order_release);
  done_.store(0, std::memory_order_release);
  stress();
  ticket_.store(uint64_t(job) << 32);
  job_.store(job);
  if (sleepers_.load()) job_.notify_all();
  take(job);
  for (int i = 0; done_.load(std::memory_order_acquire) != n; ++i)
    i < SPINS ? relax() : void(sched_yield());
}

void Pool::start() {
  int64_t process = getpid();
  if (process_ != process) {  // the first job, or the first after a fork: threads stay behind
    process_ = process;
    started_ = 1;
    sleepers_.store(0);
  }
  for (; started_ < size(); ++started_) {
    pthread_attr_t attributes;
    pthread_t thread;
    if (pthread_attr_init(&attributes)) return;
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    auto* begin = new Start{this, started_};
    int error = pthread_create(&thread, &attributes, &Pool::main_of, begin);
    pthread_attr_destroy(&attributes);
    if (error) {  // a limit on threads or memory: those that there are do the work
      delete begin;
      size_.store(started_);
      return;
    }
  }
}

void* Pool::main_of(void* argument) {
  auto* begin = static_cast<Start*>(argument);
  Pool* pool = begin->pool;
  int index = begin->index;
  delete begin;
  pool->work(index);
  return nullptr;
}

void Pool::work(int index) {
  uint32_t seen = 0;
  for (;;) {
    for (int i = 0; i < SPINS && job_.load(std::memory_order_acquire) == seen; ++i) relax();
    if (job_.load() == seen) {
      sleepers_.fetch_add(1);
      job_.wait(seen);
      sleepers_.fetch_sub(1);
    }
    seen = job_.load(std::memory_order_acquire);
    if (index < size()) take(seen);
  }
}

void Pool::take(uint32_t job) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  while (uint32_t(ticket >> 32) == job &&
         uint32_t(ticket) < n_pieces_.load(std::memory_order_acquire)) {
    stress();
    auto piece = piece_.load(std::memory_order_acquire);
    auto context = context_.load(std::memory_order_acquire);
    stress();
    if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
    piece(context, int(uint32_t(ticket)));
    done_.fetch_add(1, std::memory_order_acq_rel);
    ticket = ticket_.load(std::memory_order_acquire);
  }
}
