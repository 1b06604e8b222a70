"""Recordings to samples: 16 kHz, mono, float32.

The format is recognised by content and given to FFmpeg by name: some of its other readers open
files and addresses that a file names. Sound is counted while it is decoded, since a header can say
anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from mlxkv.errors import MediaError, lacks_memory
from mlxkv.media.limits import MAX_CHANNELS, MAX_SECONDS, MAX_SOUND_BYTES, SAMPLE_RATES
from mlxkv.media.sound_formats import READABLE, check_wav, format_of
from mlxkv.media.source import PathLike, name_of, opened

if TYPE_CHECKING:
    import numpy as np
    from av.audio.frame import AudioFrame
    from av.container import InputContainer
    from av.filter import Graph

    SoundSource: TypeAlias = PathLike | bytes | tuple[np.ndarray, int]
else:
    SoundSource: TypeAlias = object

RATE = 16_000
"""Samples a second of all models here."""

LOUDEST = 8.0
"""Of a sample: files of floats may go past 1, but not without end."""

_RESAMPLED = f"{RATE}:filter_size=64:cutoff=0.98"
"""FFmpeg's resampler with a filter twice as long: its own loses 3% at 7 kHz, this one 0.04%."""

_DAMAGED_PACKETS = 0.05
"""Share of packets that may fail to decode: old MP3 files hold notes between their frames."""

_TIMED = ("flac", "mov", "matroska", "aiff", "caf")
"""Formats whose header says how long they are; others guess it from the file's size."""


def decoded(source: SoundSource, name: str = "") -> np.ndarray:
    """The samples of a recording, of all its channels' mean, at `RATE`: float32 `[n]`.

    Args:
        source: path, bytes of a file, or (samples `[n]` or `[n, channels]`, samples a second) of
            floats from -1 to 1 or of int16.
        name: for messages.

    Raises:
        MediaError: it is no sound, is damaged or empty, or is longer than allowed.
    """
    name = name_of(source, name, "the recording")
    if isinstance(source, tuple):
        return _bounded(_from_array(source, name), name)
    if not isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        raise MediaError(
            f"{name}: sound is a path, bytes or (samples, rate); got {type(source).__name__}"
        )
    with opened(source, name, MAX_SOUND_BYTES) as file:
        return _bounded(_from_file(file, name), name)


def windows(
    samples: np.ndarray, longest: int = 30 * RATE, shortest: int = 1, name: str = ""
) -> list[np.ndarray]:
    """Samples in pieces of at most `longest`; a last one below `shortest` is filled with silence.

    Raises:
        MediaError: all of it is shorter than `shortest`.
    """
    import numpy as np

    if len(samples) < shortest:
        raise MediaError(
            f"{name or 'the recording'}: {len(samples) / RATE:.3f} s of sound, and at least "
            f"{shortest / RATE:.3f} s are needed"
        )
    pieces = [samples[at : at + longest] for at in range(0, len(samples), longest)]
    missing = max(0, shortest - len(pieces[-1]))
    return [*pieces[:-1], np.pad(pieces[-1], (0, missing))]


def _bounded(blocks: Iterator[np.ndarray], name: str) -> np.ndarray:
    """All blocks as one array, while they are few enough."""
    import numpy as np

    content = bytearray()  # grows in place: a list would need the memory twice
    for block in blocks:
        content += block.astype(np.float32, copy=False).tobytes()
        if len(content) > 4 * RATE * MAX_SECONDS:
            raise MediaError(f"{name}: more than the {MAX_SECONDS:,} s of sound allowed")
    if not content:
        raise MediaError(f"{name}: there is no sound in it")
    samples = np.frombuffer(content, np.float32)
    if not np.isfinite(samples.sum()) or np.abs(samples).max() > LOUDEST:
        samples = np.clip(np.nan_to_num(samples), -LOUDEST, LOUDEST)
    return samples


def _from_array(source: tuple[np.ndarray, int], name: str) -> Iterator[np.ndarray]:
    import numpy as np
    from av.audio.frame import AudioFrame

    samples, rate = _checked(source, name)
    if rate == RATE or not len(samples):
        yield samples
        return
    graph = _graph("fltp", rate, "mono", 1)
    samples = samples.astype(np.float32)
    for at in range(0, len(samples), 1 << 16):
        part = np.ascontiguousarray(samples[None, at : at + (1 << 16)])
        frame = AudioFrame.from_ndarray(part, format="fltp", layout="mono")
        frame.sample_rate = rate
        yield from _pushed(graph, frame)
    yield from _pushed(graph, None)


def _checked(source: tuple[np.ndarray, int], name: str) -> tuple[np.ndarray, int]:
    """Floats `[n]`, and the rate."""
    import numpy as np

    samples, rate = source if len(source) == 2 else (None, 0)
    if not isinstance(samples, np.ndarray) or samples.ndim not in (1, 2):
        raise MediaError(f"{name}: sound is (samples [n] or [n, channels], samples a second)")
    if samples.dtype != np.int16 and samples.dtype.kind != "f":
        raise MediaError(f"{name}: samples must be floats or int16; got {samples.dtype}")
    rate = int(rate) if isinstance(rate, int | np.integer) else rate
    _check_shape(rate, 1 if samples.ndim == 1 else samples.shape[1], name)
    if samples.dtype == np.int16:
        samples = samples / np.float32(1 << 15)
    return samples if samples.ndim == 1 else samples.mean(axis=1), rate


def _check_shape(rate: object, channels: int, name: str) -> None:
    least, most = SAMPLE_RATES
    if not isinstance(rate, int) or not least <= rate <= most:
        raise MediaError(f"{name}: {rate!r} samples a second; {least:,} to {most:,} are read")
    if not 1 <= channels <= MAX_CHANNELS:
        raise MediaError(f"{name}: {channels} channels, and at most {MAX_CHANNELS} are read")


def _from_file(file: IO[bytes], name: str) -> Iterator[np.ndarray]:
    import av

    head = file.read(1 << 16)
    form = format_of(head)
    if form is None:
        raise MediaError(f"{name}: not sound that can be read ({READABLE})")
    if form == "wav":
        check_wav(file, name)
    file.seek(0)
    # Before 19, a title that is not UTF-8 is an error unless asked otherwise.
    is_old = int(av.__version__.partition(".")[0]) < 19
    lenient: dict[str, Any] = {"metadata_errors": "ignore"} if is_old else {}
    try:
        with av.open(file, "r", form, **lenient) as container:
            yield from _resampled(container, form, name)
    except MediaError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise
        raise MediaError(f"{name}: the recording is damaged") from error


def _resampled(container: InputContainer, form: str, name: str) -> Iterator[np.ndarray]:
    """A recording's mono samples, block by block."""
    if not container.streams.audio:
        raise MediaError(f"{name}: there is no sound in it")
    stream = container.streams.audio[0]
    n_samples = 0
    for block in _mono(_frames(container, name), name):
        n_samples += len(block)
        yield block
    # The whole file's may be shorter: a recording may be cut by a list of what to play of it.
    said = (stream.duration or 0) * (stream.time_base or 0), (container.duration or 0) / 1e6
    seconds = min(map(float, said))
    if form in _TIMED and n_samples / RATE < 0.98 * seconds - 0.2:
        raise MediaError(
            f"{name}: its header says {seconds:,.1f} s, and {n_samples / RATE:,.1f} s could be "
            "decoded: the recording is damaged"
        )


def _mono(frames: Iterator[AudioFrame], name: str) -> Iterator[np.ndarray]:
    graph, shape = None, None
    for frame in frames:
        _check_shape(frame.sample_rate, frame.layout.nb_channels, name)
        new = (frame.format.name, frame.sample_rate, frame.layout.name, frame.layout.nb_channels)
        if new != shape:  # the first, or another from here on: AAC may change its rate
            yield from _pushed(graph, None)
            graph, shape = _graph(*new), new
        yield from _pushed(graph, frame)
    yield from _pushed(graph, None)


def _frames(container: InputContainer, name: str) -> Iterator[AudioFrame]:
    """Decoded frames of the first sound, past packets that are none, while they are few."""
    from av.error import FFmpegError

    n_packets = n_damaged = 0
    for packet in container.demux(container.streams.audio[0]):
        n_packets += 1
        try:
            frames = packet.decode()
        except FFmpegError as error:
            if lacks_memory(error):
                raise
            n_damaged += 1
            continue
        yield from frames  # pyright: ignore[reportReturnType]
    if n_damaged > max(2, _DAMAGED_PACKETS * n_packets):
        raise MediaError(
            f"{name}: {n_damaged:,} of {n_packets:,} packets are damaged: it cannot be decoded"
        )


def _graph(form: str, rate: int, layout: str, channels: int) -> Graph:
    """FFmpeg's filters from a shape of frames to mono at `RATE`: the mean of all channels."""
    from fractions import Fraction

    from av.filter import Graph

    graph = Graph()
    last = graph.add_abuffer(
        format=form, sample_rate=rate, layout=layout, time_base=Fraction(1, rate)
    )
    mean = "+".join(f"{1 / channels!r}*c{channel}" for channel in range(channels))
    for filter_name, arguments in (
        ("aformat", "sample_fmts=fltp"),
        *([("pan", f"mono|c0={mean}")] if channels > 1 else []),
        ("aresample", _RESAMPLED),
        ("aformat", "sample_fmts=fltp"),
        ("abuffersink", None),
    ):
        this = graph.add(filter_name, arguments)
        last.link_to(this)
        last = this
    graph.configure()
    return graph


def _pushed(graph: Graph | None, frame: AudioFrame | None) -> Iterator[np.ndarray]:
    """What a graph gives for a frame more; for None, the rest."""
    from av.error import BlockingIOError, EOFError

    if graph is None:
        return
    if frame is not None:
        frame.pts = None  # gaps in time stamps are no silence that was recorded
    graph.push(frame)
    with suppress(BlockingIOError, EOFError):
        while True:
            yield graph.pull().to_ndarray()[0]  # pyright: ignore[reportAttributeAccessIssue]
