"""Prefill and decode on one sequence's caches, as functions: `session` is who calls them.

Invariant: one decode step is in flight: while the caller looks at a token, the next is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import cast

import mlx.core as mx

from mlxkv.base.device import default_chunk
from mlxkv.base.stepwise import finished
from mlxkv.errors import CheckpointError, KVCacheFull, UsageError
from mlxkv.kv.layout import Cache
from mlxkv.kv.types import STEP
from mlxkv.nn.model import CausalLM
from mlxkv.sampling.math import soundness
from mlxkv.sampling.sampler import Sampler


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
) -> Generator[tuple[int, int], None, mx.array]:
    """`prefill`, a chunk each time that the next is asked for.

    Args:
        take: of (tokens left, tokens in all), how many to compute at once.
        computed: called with the tokens done after each chunk but the last.

    Yields:
        (done, all) after each chunk but the last.
    """
    array = mx.array(list(tokens), dtype=mx.int32)[None]
    done, n = 0, len(tokens)
    while True:
        n_new = take(n - done, n)
        logits = model.last_logits(array[:, done : done + n_new], caches)
        done += n_new
        if done == n:
            return logits
        # The head is never computed: nothing evaluates these logits.
        del logits
        mx.eval([cache.state for cache in caches])
        mx.clear_cache()
        if computed is not None:
            computed(done)
        yield done, n


def decode(
    model: CausalLM,
    caches: Sequence[Cache],
    logits: mx.array,
    sampler: Sampler,
    recent: Sequence[int] = (),
    max_tokens: int | None = None,
    before_step: Callable[[], None] | None = None,
) -> Iterator[int]:
    """Tokens one by one, each fed back as soon as it is chosen.

    Args:
        model: the model.
        caches: of one sequence.
        logits: `[1, V]` after the prompt.
        sampler: chooses.
        recent: tokens before, for the repeat penalty.
        max_tokens: how many to yield; None for as many as are asked for. The last one is not fed.
        before_step: called before a token is fed; may change the caches in their list.

    Yields:
        Token ids. When one is yielded it has been fed to the model, but for the first and the last.

    Raises:
        CheckpointError: the logits are not numbers: damaged weights, or an overflow.
        KVCacheFull: what `before_step` raises, after the last token that was computed.
    """
    steps = _Steps(model, caches, sampler, recent, before_step)
    step = steps.choose(logits)
    if max_tokens is None or max_tokens > 0:
        # Nothing in flight yet: on the CPU backend the next step would hold the first token up.
        yield _token_of(step)
    n = 1
    if max_tokens is None or n < max_tokens:
        step = steps.after(step)
    while max_tokens is None or n < max_tokens:
        n += 1
        full = None
        following = step
        try:
            if max_tokens is None or n < max_tokens:
                following = steps.after(step)
        except KVCacheFull as error:
            full = error
        if n % STEP == 0:
            mx.clear_cache()
        yield _token_of(step)
        if full is not None:
            raise full
        step = following


class _Steps:
    """Decode steps as lazy (token `[1]`, soundness of its logits `[1]`)."""

    def __init__(
        self,
        model: CausalLM,
        caches: Sequence[Cache],
        sampler: Sampler,
        recent: Sequence[int],
        before_step: Callable[[], None] | None,
    ):
        self._model, self._caches, self._sampler = model, caches, sampler
        self._ask = before_step
        self._history = (
            mx.array(list(recent), dtype=mx.uint32)[None] if sampler.needs_recent else None
        )

    def choose(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """A token from logits `[1, V]`, its computation under way."""
        step = self._sampler(logits, self._history), soundness(logits)
        mx.async_eval(*step)
        return step

    def after(self, step: tuple[mx.array, mx.array]) -> tuple[mx.array, mx.array]:
        """Feed a token and choose the next."""
        token = step[0]
        if self._ask is not None:
            self._ask()
        if self._history is not None:
            self._history = mx.concatenate([self._history, token[None].astype(mx.uint32)], axis=1)
        return self.choose(self._model.last_logits(token[:, None], self._caches))


def _token_of(step: tuple[mx.array, mx.array]) -> int:
    token, sound = step
    if not math.isfinite(cast(float, sound.item())):
        raise CheckpointError(
            "the model's logits are not numbers: its weights are damaged, or overflow in this "
            "dtype (try --dtype float32)"
        )
    return cast(int, token.item())
