"""Recording from a Mac's microphone, with the extra `mic`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mlxkv.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

RATE = 16_000
MAX_S = 60 * 60


def check() -> None:
    """Raise UsageError where nothing can be recorded."""
    if sys.platform != "darwin":
        raise UsageError("the microphone works on macOS only: record to a file, and give that")
    try:
        import sounddevice  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError("the microphone needs sounddevice: pip install 'mlxkv[mic]'") from None
    except OSError as error:
        raise UsageError(f"the system's sound cannot be opened ({error})") from None
    if not sys.stdin.isatty():
        raise UsageError("a recording ends when Enter is pressed: it needs a terminal")


def record() -> tuple[np.ndarray, int]:
    """Record until Enter or Ctrl-C; mono samples, and how many a second has.

    Raises:
        UsageError: nothing can be recorded, or nothing but silence was.
    """
    check()
    import numpy as np
    import sounddevice  # pyright: ignore[reportMissingImports]

    blocks: list[np.ndarray] = []

    def keep(block: np.ndarray, n: int, time: object, status: object) -> None:
        if n * len(blocks) < MAX_S * RATE:
            blocks.append(block[:, 0].copy())

    print("recording: Enter ends it", file=sys.stderr, flush=True)
    try:
        with sounddevice.InputStream(RATE, channels=1, dtype="float32", callback=keep):
            try:
                sys.stdin.readline()
            except KeyboardInterrupt:
                print(file=sys.stderr)
    except sounddevice.PortAudioError as error:
        raise UsageError(f"the microphone cannot be opened ({error})") from None
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if not samples.any():
        raise UsageError(
            "the microphone gave nothing but silence: allow this terminal to use it, in System "
            "Settings > Privacy & Security > Microphone"
        )
    return samples, RATE


def wav(samples: np.ndarray, rate: int) -> bytes:
    """Mono samples as a WAV file of 16 bits."""
    import io
    import wave

    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()
