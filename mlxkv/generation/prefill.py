"""Prefill on one sequence's caches, as functions; `session` calls them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Protocol

import mlx.core as mx

from mlxkv.base.device import default_chunk
from mlxkv.base.stepwise import finished
from mlxkv.errors import UsageError
from mlxkv.generation.media import MediaRows
from mlxkv.generation.prompt_logprobs import PromptLogprobs
from mlxkv.kv.layout import Cache
from mlxkv.nn.model import CausalLM


class Listener(Protocol):
    """Hears a prompt's hidden states.

    Attributes:
        caches: what it keeps of them: counted with the sequence's own, and quantized and emptied
            with them.
        hears_all: whether it needs those of all tokens; else of each chunk's last.
    """

    caches: list[Cache]
    hears_all: bool

    def hear(self, start: int, tokens: mx.array, hidden: mx.array) -> list[mx.array]:
        """A chunk of the prompt is computed.

        Args:
            start: position of its first token.
            tokens: `[1, L]`.
            hidden: their final hidden states, `[1, L, E]`; `[1, 1, E]` may be the last one's alone.

        Returns:
            What to evaluate with the chunk.
        """
        ...


class Tap(Protocol):
    """Hears the residual stream of a prompt at a border between layers.

    Attributes:
        at: the layer whose input it is.
    """

    at: int

    def hear(self, start: int, rows: mx.array) -> None:
        """A chunk is computed: rows `[1, L, E]` at the positions from `start` on."""
        ...


def hears_all(listener: Listener | None) -> bool:
    """Whether every hidden state of a prompt is computed."""
    return listener is not None and listener.hears_all


def prefill(
    model: CausalLM,
    tokens: Sequence[int],
    caches: Sequence[Cache],
    *,
    chunk: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> mx.array:
    """Run a prompt through the model, chunk by chunk.

    Args:
        model: the model.
        tokens: at least one; they continue what the caches hold.
        caches: of one sequence.
        chunk: tokens at a time; None for the device's default.
        on_progress: called with (done, all) after each chunk but the last.

    Returns:
        Lazy logits `[1, V]` after the last token.

    Raises:
        UsageError: no tokens, or a chunk below 1.
    """
    chunk = default_chunk() if chunk is None else chunk
    if not len(tokens) or chunk < 1:
        raise UsageError(
            "the prompt is empty" if chunk >= 1 else f"chunk must be >= 1; got {chunk}"
        )
    steps = prefilling(model, tokens, caches, lambda n, _: min(n, chunk))
    return finished(steps, None if on_progress is None else lambda at: on_progress(*at))


def prefilling(
    model: CausalLM,
    tokens: Sequence[int],
    caches: Sequence[Cache],
    take: Callable[[int, int], int],
    computed: Callable[[int], None] | None = None,
    scorer: PromptLogprobs | None = None,
    start: int = 0,
    media: MediaRows | None = None,
    listener: Listener | None = None,
    tap: Callable[[], Tap | None] = lambda: None,
) -> Generator[tuple[int, int], None, mx.array]:
    """`prefill`, a chunk each time that the next is asked for.

    Args:
        model: the model.
        tokens: of the vocabulary.
        caches: of one sequence.
        take: of (tokens left, tokens in all), how many to compute at once.
        computed: called with the tokens done after each chunk but the last.
        scorer: takes log-probabilities of the tokens.
        start: position of the first token in the prompt.
        media: among the tokens.
        listener: hears hidden states, but of chunks that are scored.
        tap: asked before each chunk what hears the residual stream, if anything does; chunks that
            are scored are not heard.

    Yields:
        (done, all) after each chunk but the last, and after each medium that was encoded.
    """
    array = mx.array(list(tokens), dtype=mx.int32)[None]
    done, n = 0, len(tokens)
    while True:
        n_new = take(n - done, n)
        new = array[:, done : done + n_new]
        placed, heard = [], []
        if media is not None:
            for _ in media.encoding(start + done, n_new):
                yield done, n
            placed = media.placed(start + done, n_new)
        if scorer is not None and scorer.wants(start + done, n_new):
            logits = scorer.score(model, new, caches, start + done, placed)
        elif (hears := tap()) is not None:
            stream = model.below(model.embed(new, placed), caches, hears.at)
            hears.hear(start + done, stream)
            hidden = model.above(stream, caches, hears.at)
            heard = [] if listener is None else listener.hear(start + done, new, hidden)
            heard, logits = [*heard, stream], model.logits(hidden[:, -1:])[:, 0]
        elif listener is not None:
            hidden = model.hidden_states(new, caches, placed, last_only=not listener.hears_all)
            heard = listener.hear(start + done, new, hidden)
            logits = model.logits(hidden[:, -1:])[:, 0]
        elif placed:
            logits = model.last_logits(new, caches, placed)
        else:
            logits = model.last_logits(new, caches)
        del placed
        done += n_new
        if done == n:
            return logits
        # The head is never computed: nothing evaluates these logits.
        del logits
        mx.eval([cache.state for cache in caches], heard)
        mx.clear_cache()
        if computed is not None:
            computed(done)
        yield done, n
