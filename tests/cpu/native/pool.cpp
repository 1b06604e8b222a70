// The pool under delays, callers at a time, changes of size, signals and forks. Compiled with
// MLXKV_STRESS, which delays threads where they can overtake each other. Exits with 1 where a piece
// ran not once, or a job ended before its pieces.
#include "pool.h"

#include <signal.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

std::atomic<int> n_signals{0};

bool run_jobs(int n_jobs, unsigned seed) {
  std::vector<int> times;
  for (int job = 0; job < n_jobs; ++job) {
    const int n = rand_r(&seed) % 40;
    times.assign(size_t(n), 0);
    Pool::get().run(n, [&](int i) { ++times[size_t(i)]; });
    for (int i = 0; i < n; ++i)
      if (times[size_t(i)] != 1) {
        std::fprintf(stderr, "job %d: piece %d of %d ran %d times\n", job, i, n, times[size_t(i)]);
        return false;
      }
    if (job % 64 == 0) Pool::get().resize(1 + int(rand_r(&seed) % 4));
    // Long enough for threads to fall asleep.
    if (job % 256 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  return true;
}

bool with_callers(int n_callers, int n_jobs) {
  std::vector<char> fine(size_t(n_callers), 0);
  std::vector<std::thread> callers;
  for (int c = 0; c < n_callers; ++c)
    callers.emplace_back([&, c] { fine[size_t(c)] = run_jobs(n_jobs, unsigned(c) * 977 + 1); });
  for (auto& caller : callers) caller.join();
  for (char each : fine)
    if (!each) return false;
  return true;
}

// A child has no threads of its parent, and starts its own.
bool in_children(int n, int n_jobs) {
  for (int i = 0; i < n; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(60);
      _exit(run_jobs(n_jobs, unsigned(i)) ? 0 : 1);
    }
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) < 0 || status != 0) {
      std::fprintf(stderr, "child %d ended with %d\n", i, status);
      return false;
    }
    if (!run_jobs(n_jobs, unsigned(i))) return false;
  }
  return true;
}

void interrupt_often() {
  struct sigaction action {};
  action.sa_handler = [](int) { n_signals.fetch_add(1, std::memory_order_relaxed); };
  sigaction(SIGALRM, &action, nullptr);
  itimerval every{{0, 500}, {0, 500}};
  setitimer(ITIMER_REAL, &every, nullptr);
}

}  // namespace

int main(int argc, char** argv) {
  const int n_jobs = argc > 1 ? std::atoi(argv[1]) : 2000;
  const bool forks = argc > 2;
  Pool::get().resize(4);
  if (!with_callers(1, n_jobs) || !with_callers(4, n_jobs / 4)) return 1;
  if (forks && !in_children(4, n_jobs / 16)) return 1;
  interrupt_often();
  if (!with_callers(2, n_jobs / 4)) return 1;
  std::printf("%d signals\n", n_signals.load());
  return 0;
}
