"""Panics of libraries in Rust, which write a trace of their own on standard error."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import IO

_STDERR = 2
_HEAD = rb"\n?^thread '[^\n]*' (?:\(\d+\) )?panicked at [^\n]*\n"
_NOTE = rb"note: run with `RUST_BACKTRACE[^\n]*\n"
"""Behind the message of a process's first panic alone."""
_one_at_a_time = threading.Lock()


@contextmanager
def without_traces() -> Iterator[None]:
    """Leave out the traces of panics that are written on standard error meanwhile.

    The caller tells what was raised. All else that any thread writes there comes when this ends.
    With RUST_BACKTRACE set, everything is written as it comes.
    """
    with _one_at_a_time, ExitStack() as stack:
        if not os.environ.get("RUST_BACKTRACE"):
            with suppress(OSError):  # standard error is closed, or no folder takes a file
                held = stack.enter_context(tempfile.TemporaryFile())
                stack.enter_context(_held_in(held))
        yield


@contextmanager
def _held_in(held: IO[bytes]) -> Iterator[None]:
    real = os.dup(_STDERR)
    _flush()
    os.dup2(held.fileno(), _STDERR)
    message = ""
    try:
        yield
    except BaseException as error:
        message = str(error)
        raise
    finally:
        _flush()
        os.dup2(real, _STDERR)
        os.close(real)
        held.seek(0)
        with suppress(OSError):
            _write(_trace_of(message).sub(b"", held.read()))


def _trace_of(message: str) -> re.Pattern[bytes]:
    """What a panic writes: its message, else all up to the note, else one line."""
    known = re.escape(message.encode(errors="replace"))
    end = rb"(?:%b\n(?:%b)?|.*?^%b|[^\n]*\n?)" % (known, _NOTE, _NOTE)
    return re.compile(_HEAD + end, re.MULTILINE | re.DOTALL)


def _flush() -> None:
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()


def _write(text: bytes) -> None:
    while text:
        text = text[os.write(_STDERR, text) :]
