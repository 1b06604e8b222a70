"""Token ids to text, one token at a time.

A tokenizer's decoder works on the whole list of tokens. Here each of its steps is a small stream
that takes one token and returns the text that later tokens cannot change. Invariants:

- what all calls of `add` and the final `finish` return, joined, is `Tokenizer.decode` of all ids;
- returned text is final, and never ends inside a character: bytes that begin a UTF-8
  character are held until it is complete, or until they cannot become one;
- one token costs a constant amount of work.

A decoder with an unknown step is run once, at `finish`.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mlxkv.errors import UsageError


class Stage(Protocol):
    """One step of a decoder."""

    def push(self, piece: str) -> list[str]:
        """Take one piece; return those that are final now."""
        ...

    def flush(self) -> list[str]:
        """Return what was held back: no more pieces will come."""
        ...


class Detokenizer:
    """The text of one sequence of tokens. Made by `Tokenizer.stream`.

    Args:
        token_of: id -> the token's string, None for an id without one or one to be skipped.
        stages: the decoder's steps; None if they cannot stream.
        decode: ids -> text, used if `stages` is None.
        n_ids: ids must be below this.
    """

    def __init__(
        self,
        token_of: Callable[[int], str | None],
        stages: Sequence[Stage] | None,
        decode: Callable[[list[int]], str],
        n_ids: int,
    ):
        self._token_of = token_of
        self._stages = stages
        self._decode = decode
        self._n_ids = n_ids
        self._held_ids: list[int] = []

    @property
    def is_live(self) -> bool:
        """Whether text comes as tokens do, and not all of it from `finish`."""
        return self._stages is not None

    def add(self, token: int) -> str:
        """Take the next id; return the text that is final now, often "".

        Raises:
            UsageError: an id out of range.
        """
        check_ids((token,), self._n_ids)
        if self._stages is None:
            self._held_ids.append(token)
            return ""
        piece = self._token_of(token)
        return "" if piece is None else "".join(_run([piece], self._stages))

    def finish(self) -> str:
        """Return what is still held back. No id can be added afterwards."""
        if self._stages is None:
            text, self._held_ids = self._decode(self._held_ids), []
            return text
        return "".join(
            piece
            for i, stage in enumerate(self._stages)
            for piece in _run(stage.flush(), self._stages[i + 1 :])
        )


def check_ids(ids: Sequence[int], n_ids: int) -> None:
    """Raise UsageError unless every id is in [0, n_ids)."""
    for token in ids:
        if not 0 <= token < n_ids:
            raise UsageError(f"token ids must be from 0 to {n_ids - 1:,}; got {token}")


def make_stages(state: bytes | None) -> list[Stage] | None:
    """The streams of a `tokenizers` decoder.

    Args:
        state: the decoder's JSON, None where a tokenizer has no decoder.

    Returns:
        Fresh stages, or None if a step is not known or stands where it cannot stream.
    """
    if state is None:
        return [_Joined()]
    spec = json.loads(state)
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    stages: list[Stage] = []
    # From a Fuse on, the decoder sees one long token.
    fused = False
    for i, step in enumerate(steps):
        stage = _stage(step, fused, [s["type"] for s in steps[i + 1 :]])
        if stage is None:
            return None
        fused = fused or step["type"] in ("Fuse", "ByteLevel")
        stages.append(stage)
    return stages


def bytes_of(piece: str, state: bytes | None) -> bytes | None:
    """What one token adds to a text before it.

    Args:
        piece: the token's string.
        state: the decoder's JSON, None where a tokenizer has no decoder.

    Returns:
        UTF-8, or the part of a character that the token stands for; None for a decoder with a step
        that is not known here.
    """
    stages = make_stages(state)
    if stages is None:
        return None
    pass_start(stages)
    pieces = [piece]
    for stage in stages:
        if isinstance(stage, _ByteLevel):
            return b"".join(map(stage.bytes_of, pieces))
        if isinstance(stage, _ByteFallback) and (byte := stage.byte_of(piece)) is not None:
            return byte
        pieces = _run(pieces, [stage])
    return "".join(pieces).encode()


def pass_start(stages: Sequence[Stage]) -> None:
    """Take stages past the start of a text, where some drop a blank."""
    _run(["x"], stages)


def has_byte_fallback(state: bytes | None) -> bool:
    """Whether a decoder turns <0xE2>-like tokens into bytes."""
    return state is not None and b'"ByteFallback"' in state


def _stage(step: dict[str, Any], fused: bool, later: list[str]) -> Stage | None:
    match step:
        case {"type": "Fuse"}:
            return _Fuse()
        case {"type": "ByteLevel"} if not fused:
            return _ByteLevel()
        case {"type": "ByteFallback"} if not fused:
            # A run of bytes is one token for the steps after it, unless they come after a Fuse.
            return _ByteFallback(whole_runs=bool(later) and later[0] != "Fuse")
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            # Inside one long token a longer pattern could lie across two pieces.
            return _Replace(old, new) if len(old) == 1 or (old and not fused) else None
        case {"type": "Strip", "content": str(char), "start": int(start), "stop": 0}:
            return _Strip(char, start, once=fused)
        case {"type": "Metaspace", "replacement": str(mark), "prepend_scheme": scheme} if not fused:
            return _Metaspace(mark, drop_first=scheme != "never")
    return None


def _run(pieces: list[str], stages: Sequence[Stage]) -> list[str]:
    for stage in stages:
        pieces = [out for piece in pieces for out in stage.push(piece)]
    return pieces


class _Elementwise:
    """A step that holds nothing back."""

    def flush(self) -> list[str]:
        return []


class _Fuse(_Elementwise):
    def push(self, piece: str) -> list[str]:
        return [piece]


class _Joined(_Elementwise):
    """No decoder: tokens joined by spaces."""

    def __init__(self) -> None:
        self._first = True

    def push(self, piece: str) -> list[str]:
        first, self._first = self._first, False
        return [piece if first else " " + piece]


class _Replace(_Elementwise):
    def __init__(self, old: str, new: str):
        self._old, self._new = old, new

    def push(self, piece: str) -> list[str]:
        return [piece.replace(self._old, self._new)]


class _Strip(_Elementwise):
    """Drops up to n leading characters: of every token, or once of the fused text."""

    def __init__(self, char: str, n: int, once: bool):
        self._char, self._n, self._left, self._once = char, n, n, once

    def push(self, piece: str) -> list[str]:
        left = self._left if self._once else self._n
        cut = 0
        while cut < min(left, len(piece)) and piece[cut] == self._char:
            cut += 1
        if self._once:
            # Only an unbroken run from the very start counts.
            self._left = left - cut if cut == len(piece) else 0
        return [piece[cut:]]


class _Metaspace(_Elementwise):
    """Marks become spaces; those of the first token go, where one was put there by encoding."""

    def __init__(self, mark: str, drop_first: bool):
        self._mark, self._drop = mark, drop_first

    def push(self, piece: str) -> list[str]:
        drop, self._drop = self._drop, False
        return [piece.replace(self._mark, "" if drop else " ")]


class _Utf8:
    """Bytes to text, U+FFFD for what is not UTF-8 (one for each maximal subpart, as in Rust)."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, data: bytes) -> list[str]:
        text = self._decoder.decode(data)
        return [text] if text else []

    def flush(self) -> list[str]:
        text = self._decoder.decode(b"", True)
        self._decoder.reset()
        return [text] if text else []


class _ByteLevel:
    """GPT-2's alphabet: every character of a token stands for one byte."""

    def __init__(self) -> None:
        self._byte_of = byte_alphabet()
        self._utf8 = _Utf8()

    def push(self, piece: str) -> list[str]:
        return self._utf8.push(self.bytes_of(piece))

    def bytes_of(self, piece: str) -> bytes:
        """What a token stands for."""
        try:
            return bytes([self._byte_of[char] for char in piece])
        except KeyError:
            # An added token with a character outside of the alphabet stands for itself.
            return piece.encode()

    def flush(self) -> list[str]:
        return self._utf8.flush()


class _ByteFallback:
    """<0xE2>-like tokens are bytes, other tokens text.

    `tokenizers` turns a whole run of byte tokens into U+FFFD if any of it is not UTF-8, so that
    no byte of a run could be shown before its end. Here the valid part of a run is kept, and shown
    at once; `Tokenizer.decode` does the same.
    """

    # Rust's number parser takes a plus sign.
    _BYTE = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")

    def __init__(self, whole_runs: bool):
        self._utf8 = _Utf8()
        self._whole_runs = whole_runs
        self._run: list[str] = []

    def push(self, piece: str) -> list[str]:
        byte = self.byte_of(piece)
        if byte is None:
            return [*self.flush(), piece]
        text = self._utf8.push(byte)
        if not self._whole_runs:
            return text
        self._run += text
        return []

    def byte_of(self, piece: str) -> bytes | None:
        """The byte that a token stands for, None for text."""
        byte = self._BYTE.fullmatch(piece)
        return None if byte is None else bytes([int(byte[1], 16)])

    def flush(self) -> list[str]:
        run, self._run = [*self._run, *self._utf8.flush()], []
        return ["".join(run)] if run else []


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2's `bytes_to_unicode`, inverted).

    Printable Latin-1 characters stand for their own code; the other bytes, in order, for the
    characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(0x100 + i): byte for i, byte in enumerate(others)},
    }
