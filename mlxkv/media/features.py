"""Samples to what the encoders take: the arithmetic of transformers' feature extractors.

Those of Gemma 3n and Gemma 4 differ: 3n has frames of 32 ms with pre-emphasis, 1,024 bins and a
floor under the mels; 4 has frames of 20 ms behind half a frame of silence, 512 bins and a constant
added to the mels. Both differ from the usual log-mel spectrogram.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import TYPE_CHECKING, Protocol

from mlxkv.media.pixels import Processed
from mlxkv.media.sound import RATE

if TYPE_CHECKING:
    import numpy as np

LONGEST = 30 * RATE
"""Samples of a window: what the encoders were trained on."""

_MULTIPLE = 128
"""The reference fills a recording with silence to a multiple of this many samples."""


class AudioProcessor(Protocol):
    """The preprocessing of one model."""

    @property
    def shortest(self) -> int:
        """Samples below which there is not one token."""
        ...

    def n_tokens(self, n_samples: int) -> int:
        """Tokens of a window of `shortest` to `LONGEST` samples."""
        ...

    def __call__(self, samples: np.ndarray) -> Processed:
        """Process a window: float32 `[n]` at `RATE`."""
        ...


@dataclass(frozen=True)
class Mel:
    """A log-mel spectrogram.

    Args:
        n_mels: mels of a frame.
        frame: samples of a frame; the reference takes one more.
        hop: samples from a frame to the next.
        overdrive: whether the spectrum has twice the least number of bins.
        lowest, highest: frequencies of the mels' ends, Hz.
        preemphasis: share of the sample before that is taken off each.
        htk: whether a frame's first sample is scaled, rather than the one before the frame read.
        floor: added to the mels, or their least value.
        scale: of the samples.
        mean, std: of each mel, for normalisation; empty for none.
    """

    n_mels: int
    frame: int
    hop: int
    overdrive: bool
    lowest: float
    highest: float
    preemphasis: float
    htk: bool
    floor: float
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def spectrogram(self, samples: np.ndarray, window: np.ndarray, adds_floor: bool) -> np.ndarray:
        """float32 `[frames, n_mels]` of float32 samples.

        Args:
            samples: `[n]`.
            window: of a frame, float32.
            adds_floor: whether `floor` is added, rather than the least value.
        """
        import numpy as np

        n_frames = (len(samples) - self.frame - 1) // self.hop + 1
        if self.scale != 1:
            samples = samples * self.scale
        taken = np.lib.stride_tricks.sliding_window_view(samples, self.frame + 1)
        frames = self._emphasised(taken[:: self.hop][:n_frames])
        n_bins = 2 ** math.ceil(math.log2(self.frame)) * (1 + self.overdrive)
        spectrum = np.abs(np.fft.rfft(frames * window, n=n_bins, axis=-1))
        mels = spectrum @ _filters(n_bins, self.n_mels, self.lowest, self.highest)
        mels = np.log(mels + self.floor if adds_floor else np.maximum(mels, self.floor))
        if self.mean:
            mels -= np.array(self.mean)
        if self.std:
            mels /= np.array(self.std)
        return mels.astype(np.float32)

    def _emphasised(self, frames: np.ndarray) -> np.ndarray:
        """`[n, frame + 1]` to `[n, frame]`."""
        import numpy as np

        if not self.preemphasis:
            return frames[:, :-1]
        if not self.htk:
            return frames[:, 1:] - self.preemphasis * frames[:, :-1]
        first = frames[:, :1] * (1 - self.preemphasis)
        rest = frames[:, 1:-1] - self.preemphasis * frames[:, :-2]
        return np.concatenate([first, rest], axis=-1)


@dataclass(frozen=True)
class Mel3n:
    """Gemma 3n: every window has the same number of tokens; the model fills up what is missing.

    A window is filled with silence to a multiple of 128 samples, and its frames are those that fit.
    """

    mel: Mel
    tokens: int

    @property
    def shortest(self) -> int:
        """Samples whose frame is whole once silence is added."""
        return self.mel.frame // _MULTIPLE * _MULTIPLE + 1

    def n_tokens(self, n_samples: int) -> int:
        return self.tokens

    def __call__(self, samples: np.ndarray) -> Processed:
        import numpy as np

        filled = np.pad(samples, (0, -len(samples) % _MULTIPLE))
        mel = self.mel.spectrogram(filled, _window(self.mel.frame, "f4"), adds_floor=False)
        return Processed({"mel": mel}, self.tokens, _digest(samples, self.mel, self.tokens))


@dataclass(frozen=True)
class Mel4:
    """Gemma 4: a token for four frames.

    Half a frame of silence stands before the sound, and only frames within the sound are kept. The
    reference has up to one more, which its mask takes out again.
    """

    mel: Mel

    @property
    def shortest(self) -> int:
        """Samples of the first frame's second half, and the one more."""
        return self.mel.frame - self.mel.frame // 2 + 1

    def n_frames(self, n_samples: int) -> int:
        """Frames of a window."""
        return (n_samples - self.shortest) // self.mel.hop + 1

    def n_tokens(self, n_samples: int) -> int:
        frames = self.n_frames(n_samples)
        return math.ceil(math.ceil(frames / 2) / 2)

    def __call__(self, samples: np.ndarray) -> Processed:
        import numpy as np

        n_tokens = self.n_tokens(len(samples))
        filled = np.pad(samples, (self.mel.frame // 2, 0))
        mel = self.mel.spectrogram(filled, _window(self.mel.frame, "f8"), adds_floor=True)
        return Processed({"mel": mel}, n_tokens, _digest(samples, self.mel, n_tokens))


@dataclass(frozen=True)
class RawSamples:
    """Gemma 4 unified: samples as they are, so many a token.

    Args:
        per_token: samples of a token.
    """

    per_token: int

    @property
    def shortest(self) -> int:
        """One sample: silence fills up the rest of its token."""
        return 1

    def n_tokens(self, n_samples: int) -> int:
        return math.ceil(n_samples / self.per_token)

    def __call__(self, samples: np.ndarray) -> Processed:
        import numpy as np

        filled = np.pad(samples, (0, -len(samples) % self.per_token))
        rows = filled.reshape(-1, self.per_token)
        return Processed({"samples": rows}, len(rows), _digest(samples, self, len(rows)))


@cache
def _window(n: int, dtype: str) -> np.ndarray:
    """Hann's, periodic: float32 `[n]`, computed in a dtype."""
    import numpy as np

    at = np.arange(n, dtype=dtype)
    return (0.5 * (1 - np.cos(2 * np.pi * at / n))).astype(np.float32)


@cache
def _filters(n_bins: int, n_mels: int, lowest: float, highest: float) -> np.ndarray:
    """Triangles that meet on HTK's mel scale: `[n_bins / 2 + 1, n_mels]`."""
    import numpy as np

    first, last = (2595.0 * math.log10(1.0 + hertz / 700.0) for hertz in (lowest, highest))
    edges = 700.0 * (10.0 ** (np.linspace(first, last, n_mels + 2) / 2595.0) - 1.0)
    bins = np.arange(n_bins // 2 + 1) * (RATE / n_bins)
    beyond = edges - bins[:, None]
    widths = np.diff(edges)
    falling, rising = -beyond[:, :-2] / widths[:-1], beyond[:, 2:] / widths[1:]
    return np.maximum(0, np.minimum(falling, rising))


def _digest(samples: np.ndarray, settings: object, n_tokens: int) -> bytes:
    hashed = sha256(repr((len(samples), settings, n_tokens)).encode())
    hashed.update(samples.tobytes())
    return hashed.digest()
