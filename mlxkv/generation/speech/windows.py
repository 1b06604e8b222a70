"""Where a recording may be cut, for models that hear 30 seconds at once.

A window ends in a pause if there is one: a fifth of a second that is quiet beside the rest. Without
a pause the next window begins two seconds earlier, and `seams` joins the two texts, so that a word
which is cut in one of them is whole in the other. What is silent is in no window: a model makes
words up for silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

LONGEST_S = 30.0
"""Of a window: what Gemma 3n and 4 hear at once."""
SUBTITLE_S = 10.0
"""Of a window whose text is shown with its time."""
OVERLAP_S = 2.0
PAUSE_S = 0.2
"""Shorter quiet is inside words: before a `t` or a `k`, for one."""

_FRAME_S = 0.02
_SILENT = 1e-6
"""Energy beside the loudest frame's: 60 dB below it."""
_LEAST_RANGE = 10.0
"""Loud beside quiet frames, as energies. Below it (steady noise, music) nothing is a pause."""
_MARGIN_S = 0.3
"""Of silence that is kept around sound."""


@dataclass(frozen=True, slots=True)
class Window:
    """Samples `begin` to `end` of a recording.

    Args:
        overlaps: it begins before the end of the window before it.
    """

    begin: int
    end: int
    overlaps: bool = False


def windows(samples: np.ndarray, rate: int, longest_s: float = LONGEST_S) -> list[Window]:
    """The windows of a recording, in order; none if all of it is silent.

    Args:
        samples: mono, `[n]`.
        rate: samples in a second.
        longest_s: of a window; above twice the overlap.
    """
    return list(_Cuts(samples, rate, longest_s).windows())


class _Cuts:
    """Windows in frames of 20 ms, by their energy."""

    def __init__(self, samples: np.ndarray, rate: int, longest_s: float):
        self.n_samples, self.size = len(samples), max(round(rate * _FRAME_S), 1)
        n = -(-len(samples) // self.size)
        whole = len(samples) // self.size
        rows = samples[: whole * self.size].reshape(whole, self.size)
        self.energy = np.einsum("ij,ij->i", rows, rows, dtype=np.float64) / self.size
        if n > whole:
            rest = samples[whole * self.size :].astype(np.float64)
            self.energy = np.append(self.energy, np.mean(rest * rest))
        self.longest = max(int(longest_s * rate / self.size), 1)
        loudest = float(self.energy.max(initial=0.0))
        self.sounding = np.flatnonzero(self.energy > loudest * _SILENT)

    def windows(self) -> Iterator[Window]:
        margin, overlap = round(_MARGIN_S / _FRAME_S), round(OVERLAP_S / _FRAME_S)
        at, overlaps = 0, False
        while (sounding := self.sounding[self.sounding >= at]).size:
            begin = max(int(sounding[0]) - margin, at)
            last = int(self.sounding[-1]) + 1
            if min(last + margin, len(self.energy)) - begin <= self.longest:
                yield self._window(begin, min(last + margin, len(self.energy)), overlaps)
                return
            end, is_pause = self._cut(begin)
            inside = sounding[sounding < end]
            stop = min(int(inside[-1]) + 1 + margin, end)
            yield self._window(begin, stop, overlaps and begin == at)
            at, overlaps = (end, False) if is_pause else (end - overlap, True)

    def _window(self, begin: int, end: int, overlaps: bool) -> Window:
        return Window(begin * self.size, min(end * self.size, self.n_samples), overlaps)

    def _cut(self, begin: int) -> tuple[int, bool]:
        """Where a window that begins there ends, and whether that is in a pause.

        The longest pause of its last half, else the quietest place of its last two seconds.
        """
        energy = self.energy[begin : begin + self.longest]
        half, pause = self.longest // 2, round(PAUSE_S / _FRAME_S)
        high = float(np.quantile(energy, 0.9))
        stretches = np.lib.stride_tricks.sliding_window_view(energy[half:], pause)
        low = max(float(stretches.max(axis=1).min()), high * _SILENT)  # of the quietest stretch
        if high >= low * _LEAST_RANGE:
            quiet = energy <= low * (high / low) ** 0.25
            first, length = _longest_run(quiet[half:])
            return begin + half + first + length // 2, True
        near = max(half, self.longest - round(OVERLAP_S / _FRAME_S))
        smooth = np.convolve(energy[near:], np.ones(pause), "same")
        return begin + near + int(smooth.argmin()) + 1, False


def _longest_run(flags: np.ndarray) -> tuple[int, int]:
    """First index and length of the longest run of True; the last of several."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    if not edges.size:
        return 0, 0
    begins, lengths = edges[::2], edges[1::2] - edges[::2]
    i = len(lengths) - 1 - int(lengths[::-1].argmax())
    return int(begins[i]), int(lengths[i])
