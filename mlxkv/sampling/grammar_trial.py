"""Compile a grammar where it may fail: the program of a process that `grammar_compiler` starts.

    python -P grammar_trial.py < '{"source": ..., "n_vocab": ..., "stack_bytes": ...}'

It ends with 0 when llguidance has compiled the grammar or refused it: then the same can be done in
the server's process, on a stack that is larger. Anything else ends it otherwise, by a signal for
instance. The vocabulary is one of bytes, with names for the tokens that a grammar may call by
their numbers: what a grammar costs depends little on the model's own. Nothing of mlxkv is imported,
so that it starts in 0.1 s.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import threading
from typing import Any

NO_LIBRARY = 3
"""Exit code without llguidance."""


class _Bytes:
    """A vocabulary of bytes, filled up with special tokens."""

    bos_token_id = None

    def __init__(self, n_vocab: int):
        self.eos_token_id = 256
        self.tokens = [bytes([i]) for i in range(256)]
        self.tokens += [b"\xff<%d>" % i for i in range(256, max(n_vocab, 257))]
        self.special_token_ids = list(range(256, len(self.tokens)))

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    with contextlib.suppress(ValueError, OSError):  # the system has no such limit
        resource.setrlimit(kind, (most, hard) if hard < 0 else (min(most, hard), hard))


def main(request: dict[str, Any]) -> None:
    """Compile a grammar on a stack of a given size, within limits of time and memory."""
    try:
        from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
    except ImportError:
        raise SystemExit(NO_LIBRARY) from None
    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes(request["n_vocab"])))
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, request["cpu_s"])
    _limit(resource.RLIMIT_AS, request["memory_bytes"])
    threading.stack_size(request["stack_bytes"])
    done: list[Any] = []
    thread = threading.Thread(
        target=lambda: done.append(LLMatcher(tokenizer, request["source"], log_level=0))
    )
    thread.start()
    thread.join()
    if not done:
        raise SystemExit(1)


if __name__ == "__main__":
    main(json.load(sys.stdin))
