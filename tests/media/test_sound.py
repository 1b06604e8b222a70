"""What is read as sound: samples of every usual format, and one line for all others."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mlxkv.errors import MediaError
from mlxkv.media import sound
from mlxkv.media.sound import RATE, decoded, windows
from tests.media.refusals import refusal

SECONDS = 1


def tone(rate: int, hertz: float = 440) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(rate * SECONDS) / rate)).astype(np.float32)


def written(samples: np.ndarray, rate: int, form: str, codec: str) -> bytes:
    """A file of samples `[channels, n]`."""
    file = io.BytesIO()
    layout = "mono" if len(samples) == 1 else "stereo"
    with av.open(file, "w", form) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        assert isinstance(stream, av.AudioStream)
        context = stream.codec_context
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        resampler = av.AudioResampler(context.format.name, layout, rate, context.frame_size or 1024)
        for part in (*resampler.resample(frame), *resampler.resample(None), None):
            for packet in stream.encode(part):
                container.mux(packet)
    return file.getvalue()


def wav(samples: np.ndarray, rate: int = RATE, *, says: int | None = None) -> bytes:
    """A WAV file of int16 samples `[n]` or `[n, channels]`; its header may say another size."""
    content, channels = samples.astype("<i2").tobytes(), samples[0].size
    size = len(content) if says is None else says
    shape = struct.pack("<HHIIHH", 1, channels, rate, rate * channels * 2, channels * 2, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + shape + b"data" + struct.pack("<I", size) + content
    return b"RIFF" + struct.pack("<I", min(len(body), size + 36) & 0xFFFFFFFF) + body


@pytest.mark.parametrize(
    ("form", "codec", "error"),
    [
        ("wav", "pcm_s16le", 1e-3),
        ("wav", "pcm_f32le", 1e-3),
        ("flac", "flac", 1e-3),
        ("aiff", "pcm_s16be", 1e-3),
        ("ipod", "alac", 1e-3),
        ("mp3", "libmp3lame", 0.05),
        ("ogg", "libopus", 0.05),
        ("webm", "libopus", 0.05),
    ],
)
def test_every_format_reads_as_written(form: str, codec: str, error: float) -> None:
    samples = decoded(written(tone(48_000)[None], 48_000, form, codec))
    assert samples.dtype == np.float32 and abs(len(samples) - RATE * SECONDS) < 600
    middle = slice(1000, -1600)
    assert np.abs(samples[: RATE * SECONDS][middle] - tone(RATE)[middle]).max() < error


@pytest.mark.parametrize("form", ["ipod", "adts"])
def test_aac_reads_as_loud_and_as_high_as_written(form: str) -> None:
    samples = decoded(written(tone(48_000)[None], 48_000, form, "aac"))[2000:14000]
    assert abs(np.abs(np.fft.rfft(samples)).argmax() - 330) <= 1  # 440 Hz in 12,000 samples
    assert abs(samples.std() - tone(RATE).std()) < 0.02


def test_samples_at_the_models_rate_are_exact() -> None:
    levels = np.random.default_rng(1).integers(-(2**15), 2**15, 5000)
    assert np.array_equal(decoded(wav(levels)), (levels / 2**15).astype(np.float32))
    both = np.stack([levels, levels * 0], axis=1)
    assert np.array_equal(decoded(wav(both)), (levels / 2**16).astype(np.float32))


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100])
def test_resampling_keeps_what_the_rate_can_hold(rate: int) -> None:
    high = 0.4 * min(rate, RATE)
    samples = decoded((tone(rate, high), rate))
    assert len(samples) == RATE * SECONDS
    assert np.abs(samples - tone(RATE, high))[200:-200].max() < 1e-3
    if rate > 2 * RATE:
        assert np.abs(decoded((tone(rate, 12_000), rate)))[200:-200].max() < 1e-3


def test_arrays_are_read_as_they_are() -> None:
    samples = tone(RATE)
    assert np.array_equal(decoded((samples, RATE)), samples)
    assert np.array_equal(decoded((samples.astype(np.float64), RATE)), samples)
    assert decoded((np.array([-(2**15), 2**14], np.int16), RATE)).tolist() == [-1, 0.5]
    both = np.stack([samples, 0 * samples], axis=1)
    assert np.array_equal(decoded((both, np.int64(RATE))), samples / 2)
    assert decoded((np.array([np.nan, np.inf, 1e30, 0.5]), RATE)).tolist() == [0, 8, 8, 0.5]


def test_a_header_that_does_not_know_the_length_is_believed() -> None:
    levels = np.arange(3000)
    for says in (0, 0x7FFF_FFFF, 0xFFFF_FFFF, 6_044):  # or that counts itself
        assert len(decoded(wav(levels, says=says))) == 3000


def refused(source: object, name: str = "") -> str:
    return refusal(decoded, source, name)


def test_a_wav_that_lies_about_its_length_is_refused() -> None:
    levels = np.arange(3000)
    assert refused(wav(levels, says=1_000_000), "a.wav") == (
        "a.wav: its header says 1,000,000 bytes of sound, and the file has 6,000: it is damaged"
    )
    assert "says 10 bytes" in refused(wav(levels - 3000, says=10))


def test_a_damaged_file_gets_one_line() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, (1, RATE)).astype(np.float32)
    for form, codec in (("flac", "flac"), ("ipod", "aac"), ("aiff", "pcm_s16be")):
        content = written(noise, RATE, form, codec)
        assert "damaged" in refused(content[: len(content) // 2]), form
    content = bytearray(written(noise, RATE, "flac", "flac"))
    content[len(content) // 4 : len(content) * 3 // 4] = bytes(len(content) // 2)
    assert "damaged" in refused(bytes(content))
    assert refused(b"Dear John,", "letter.mp3").startswith("letter.mp3: not sound")
    assert refused(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hosts\n").startswith("the recording: not")
    assert "damaged" in refused(b"RIFF\0\0\0\0WAVE")


def test_an_empty_recording_gets_one_line() -> None:
    assert refused(wav(np.zeros(1), says=0)[:44], "a.wav") == ("a.wav: there is no sound in it")
    assert refused((np.zeros(0, np.float32), RATE)) == "the recording: there is no sound in it"
    with pytest.raises(MediaError, match=r"b: 0\.001 s of sound, and at least 0\.010 s are needed"):
        windows(np.zeros(16, np.float32), shortest=161, name="b")


def test_what_is_no_file_gets_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    assert refused(tmp_path / "pipe.wav") == "pipe.wav: it is a pipe, not a file"
    assert refused(str(tmp_path)) == f"{tmp_path.name}: Is a directory"
    assert refused(7).startswith("the recording: sound is a path, bytes or (samples, rate)")
    for wrong in (np.zeros((4, 4, 4)), np.zeros(4, np.int64), [0.0]):
        assert "samples" in refused((wrong, RATE))
    assert "samples a second" in refused((np.zeros(4),))
    assert "100 channels" in refused((np.zeros((2, 100)), RATE))
    for rate in (0, 1, 10**9, -16_000, 16_000.5, None):
        assert "samples a second" in refused((np.zeros(4), rate))


def test_sound_is_counted_while_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sound, "MAX_SECONDS", 1)
    made: list[int] = []
    push: Callable[..., object] = sound._pushed

    def counted(*arguments: object) -> object:
        made.append(1)
        return push(*arguments)

    monkeypatch.setattr(sound, "_pushed", counted)
    content = wav(np.zeros(RATE * 60))
    assert refused(content, "a.wav") == "a.wav: more than the 1 s of sound allowed"
    assert len(made) * 1024 < RATE * 10
    assert "samples a second" in refused(wav(np.zeros(100), rate=1))
    monkeypatch.setattr(sound, "MAX_SOUND_BYTES", len(content) - 1)
    assert "bytes" in refused(content)


def test_windows_hold_every_sample() -> None:
    samples = np.arange(25, dtype=np.float32)
    pieces = windows(samples, longest=10, shortest=7)
    assert [len(piece) for piece in pieces] == [10, 10, 7]
    assert np.array_equal(np.concatenate(pieces), [*samples, 0, 0])
    assert len(windows(samples, longest=25)) == 1
