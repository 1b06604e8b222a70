"""Bring the layers above a border up to what pages have of the layers below it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Protocol

import mlx.core as mx

from mlxkv.kv.layout import Cache
from mlxkv.nn.model import CausalLM
from mlxkv.prefix.border import Lift
from mlxkv.prefix.border_capture import BorderCutter

Steps = Generator[tuple[int, int], None, mx.array]
"""`prefill.prefilling`."""


class Lifted(Protocol):
    """A sequence whose prompt is brought up, `session.Session`."""

    model: CausalLM
    caches: list[Cache]

    @property
    def gives_pages(self) -> bool: ...


def lifting(
    sequence: Lifted,
    cutter: BorderCutter,
    lift: Lift,
    tokens: Sequence[int],
    start: int,
    take: Callable[[int, int], int],
) -> Generator[tuple[int, int], None, None]:
    """Fill the caches below a border, and compute the layers above from the residual stream.

    It may end early: where a page could not be read any more, the KV had to be quantized, or the
    caches were looked at and taken back. They may hold different numbers of tokens then.

    Args:
        sequence: its caches hold `start` tokens.
        cutter: of its pages.
        lift: what is known of the prompt.
        tokens: the prompt.
        start: tokens that all caches hold.
        take: of (position, tokens left), how many to compute at once; may raise.

    Yields:
        (done, all) after each chunk, of the tokens behind `start`.
    """
    border, caches = cutter.border, sequence.caches
    if border.lower.load(lift.below, caches, len(tokens) - lift.stop) is None:
        for cache in caches:  # in any state
            cache.reset()
        return
    border.stream.touch(lift.stream.links)
    at, below, above = start, caches[: border.at], caches[border.at :]
    while at < lift.stop:
        n_new = take(at, lift.stop - at)
        if not sequence.gives_pages or {x.offset for x in below} != {lift.stop}:
            return
        rows = border.stream.rows(lift.stream.links, at, at + n_new)
        if rows is None or {x.offset for x in above} != {at}:
            return
        sequence.model.above(rows, caches, border.at)
        mx.eval([cache.state for cache in above])
        del rows
        mx.clear_cache()
        at += n_new
        cutter.advance_above(tokens, at)
        yield at - start, len(tokens) - start


def behind(n_done: int, steps: Steps) -> Steps:
    """A prefill whose figures count tokens that were computed before it."""
    if not n_done:
        return (yield from steps)
    try:
        while True:
            done, n = next(steps)
            yield done + n_done, n + n_done
    except StopIteration as end:
        return end.value
