#include "huge_pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <system_error>
#include <thread>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif

namespace {

constexpr uintptr_t HUGE_BYTES = 2 << 20;
// Between arrays of which each is a mapping of its own: what malloc puts in front, and rounding.
constexpr uintptr_t GAP_BYTES = 64 << 10;
// The copying takes as long as a short prompt, which is computed meanwhile and would wait for it.
constexpr std::chrono::milliseconds DELAY{500};

// Ranges in order, those with small gaps between them as one.
std::vector<Range> joined(std::vector<Range> ranges) {
  std::sort(ranges.begin(), ranges.end(), [](auto& a, auto& b) { return a.start < b.start; });
  std::vector<Range> found;
  for (auto& range : ranges) {
    if (!found.empty() && range.start <= found.back().stop + GAP_BYTES)
      found.back().stop = std::max(found.back().stop, range.stop);
    else
      found.push_back(range);
  }
  return found;
}

void ask(const std::vector<Range>& ranges) {
  for (auto& range : ranges) {
    const uintptr_t start = (range.start + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES;
    const uintptr_t stop = range.stop / HUGE_BYTES * HUGE_BYTES;
    if (start >= stop) continue;
    // Without huge pages in this system there is nothing more to ask for.
    if (madvise(reinterpret_cast<void*>(start), stop - start, MADV_HUGEPAGE)) continue;
    for (uintptr_t at = start; at < stop; at += HUGE_BYTES)
      madvise(reinterpret_cast<void*>(at), HUGE_BYTES, MADV_COLLAPSE);
  }
}

}  // namespace

void ask_for_huge_pages(std::vector<Range> ranges) {
  try {
    std::thread([ranges = joined(std::move(ranges))] {
      std::this_thread::sleep_for(DELAY);
      ask(ranges);
    }).detach();
  } catch (const std::system_error&) {  // a limit on threads: pages stay as they are
  }
}
