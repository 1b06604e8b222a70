"""The engines of the reuse benchmark behind one call, each with its own way to keep KV.

Every engine takes the whole prompt as text and streams a greedy answer. Time to first token is
taken here, for all of them alike: from before the text is handed over (so tokenizing counts) to the
first token out. For the server that is the first text that arrives, with HTTP in between, as its
users see it.

Which tokens were computed is what the engine itself tells; of mlxkv, the one whose benchmark this
is, what went into the model is counted beside it, and a difference is an error.
"""

from __future__ import annotations

import contextlib
import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MLXKV = "mlxkv"
PROMPT_CACHE = "mlx-lm"
LRU = "mlx-lm-lru"
SERVER = "mlx-lm-server"
SAVED = "mlx-lm-saved"
NAMES = (MLXKV, PROMPT_CACHE, SERVER, LRU, SAVED)

WARM_UP = "warm-up"
"""The conversation that is sent before anything is measured; nothing saved is read for it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer and what it took.

    Args:
        text: the answer.
        sequence: token ids of prompt and answer.
        prompt_tokens: of the prompt.
        computed_tokens: those of the prompt that were not kept.
        first_token_s: from the call to the first token.
        total_s: from the call until the engine is ready for the next one.
        ssd_tokens: restored from disk.
    """

    text: str
    sequence: tuple[int, ...]
    prompt_tokens: int
    computed_tokens: int
    first_token_s: float
    total_s: float
    ssd_tokens: int = 0


class Engine(ABC):
    """One engine in one process.

    Args:
        model: the model's directory.
        state: a folder for what is to outlast the process.
    """

    window: int | None = None
    """Length of the shortest sliding window, where the engine shows it."""

    def __init__(self, model: Path, state: Path):
        self.model_dir, self.state = model, state

    @abstractmethod
    def answer(self, prompt: str, conversation: str, max_tokens: int) -> Answer:
        """Answer a prompt greedily; which conversation it belongs to is told to all."""

    def prepare(self, fork: str) -> None:  # noqa: B027
        """Told that prompts will begin with `fork`: nothing, for an engine that finds out."""

    def blas(self) -> str:
        """The BLAS that serves it."""
        return blas_of(os.getpid())

    def close(self) -> None:  # noqa: B027
        """Write what is to outlast the process, and end."""


def blas_of(pid: int) -> str:
    """The OpenBLAS that a process has mapped (Linux), else what is known: the system's own."""
    with contextlib.suppress(OSError):
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
        return "OpenBLAS" if "libopenblas" in maps else "reference"
    return "the system's"


class Mlxkv(Engine):
    """mlxkv as `mlxkv.load` gives it, pages in RAM and on SSD."""

    def __init__(self, model: Path, state: Path):
        super().__init__(model, state)
        import mlxkv

        self._llm = mlxkv.load(model)
        windows = [s.window for s in self._llm.model.cache_specs() if s and s.window]
        self.window = min(windows, default=None)
        self._fed = 0
        self._count_tokens()

    def _count_tokens(self) -> None:
        """Count what goes into the model, whatever the statistics say."""
        forward = self._llm.model.last_logits

        def counted(tokens: Any, *args: Any, **options: Any) -> Any:
            self._fed += tokens.shape[1]
            return forward(tokens, *args, **options)

        object.__setattr__(self._llm.model, "last_logits", counted)

    def answer(self, prompt: str, conversation: str, max_tokens: int) -> Answer:
        self._fed = 0
        start, first_s, computed, text, tokens, stats = time.perf_counter(), 0.0, 0, "", [], None
        for chunk in self._llm.stream(prompt, max_tokens=max_tokens):
            if not first_s:
                first_s, computed = time.perf_counter() - start, self._fed
            text, stats = text + chunk.text, chunk.stats
            tokens += [] if chunk.token is None else [chunk.token]
        total_s = time.perf_counter() - start
        assert stats is not None
        if stats.computed_tokens != computed:
            raise SystemExit(f"mlxkv says {stats.computed_tokens} computed, fed were {computed}")
        return Answer(
            text,
            (*self._llm.encode(prompt), *tokens),
            stats.prompt_tokens,
            computed,
            first_s,
            total_s,
            stats.restored_ssd_tokens,
        )

    def close(self) -> None:
        self._llm.close()
