// Memory in pages of 2 MiB, where Linux has them: reading weights through pages of 4 KiB waits for
// their addresses more than for their values.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

struct Range {
  uintptr_t start, stop;
};

// Asks for huge pages where these ranges lie, behind the caller's back: what is read meanwhile stays
// readable, and a range that is given back is no error.
void ask_for_huge_pages(std::vector<Range> ranges);
