"""Crops of wide and of high pictures, which Gemma 3 can be shown beside the whole."""

from __future__ import annotations

import math
from dataclasses import dataclass

BEFORE = "Here is the original image "
BETWEEN = " and here are some crops to help you see better "
"""What Gemma 3 was trained to read around them."""


@dataclass(frozen=True)
class PanAndScan:
    """When a picture is cut, and into how many parts.

    Args:
        smallest: pixels of a crop's side, at least.
        most: crops of a picture.
        ratio: of the longer side to the shorter, from which on a picture is cut.
    """

    smallest: int = 256
    most: int = 4
    ratio: float = 1.2

    def boxes(self, width: int, height: int) -> list[tuple[int, int, int, int]]:
        """Left, top, right and bottom of each crop; none for a picture that stays whole."""
        long, short = max(width, height), min(width, height)
        if long / short < self.ratio:
            return []
        n = min(math.floor(long / self.smallest), math.floor(long / short + 0.5))
        n = min(self.most, max(2, n))
        step = math.ceil(long / n)
        if min(step, short) < self.smallest:
            return []
        ends = [(at, min(at + step, long)) for at in range(0, n * step, step)]
        if width >= height:
            return [(start, 0, stop, height) for start, stop in ends]
        return [(0, start, width, stop) for start, stop in ends]
