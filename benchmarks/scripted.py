"""Answers that are known beforehand, of a model that computes every step of them as usual."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx

from mlxkv.engine import prompt
from mlxkv.sampling.params import SamplingParams
from mlxkv.sampling.sampler import Sampler


class ScriptedSampler(Sampler):
    """Chooses the tokens of a script, whatever the logits are.

    Args:
        params: of the request.
        n_vocab: width of the logits.
        script: the tokens; the last one is repeated, as a step may be in flight behind it.
    """

    def __init__(
        self,
        params: SamplingParams,
        n_vocab: int,
        suppressed: Collection[int],
        script: Sequence[int],
    ):
        super().__init__(params, n_vocab, suppressed)
        self._script = list(script)
        self._places: list[int] = []

    def _rule(self) -> Hashable:
        return id(self)  # never chosen for in one call with another row

    def _numbers(self, ahead: int | None = None) -> list[float]:
        """No random numbers: notes the place that is chosen for next."""
        at = self.n_chosen - 1 if ahead is None else self.n_chosen + ahead
        self._places.append(min(at, len(self._script) - 1))
        return []

    def _choose(
        self,
        logits: mx.array,
        recent: mx.array | None,
        answer: mx.array | None,
        u: Sequence[Sequence[float]],
    ) -> mx.array:
        places, self._places = self._places, []
        # Zero times a logit: the step is computed before its token is known.
        ids = mx.array([self._script[at] for at in places])
        return ids + (logits[:, 0] * 0).astype(mx.int32)


@contextmanager
def scripted(scripts: deque[list[int]]) -> Iterator[None]:
    """Give these answers, one after another, to the requests of this process."""
    own = prompt.Sampler

    def sampler(params: SamplingParams, n_vocab: int, suppressed: Collection[int]) -> Sampler:
        return ScriptedSampler(params, n_vocab, suppressed, scripts.popleft())

    prompt.Sampler = sampler  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        prompt.Sampler = own
