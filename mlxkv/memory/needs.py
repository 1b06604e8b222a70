"""Bytes that a model needs for a sequence: weights, KV, and the largest step."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mlxkv.base import device
from mlxkv.kv.types import STEP, CacheSpec, KVFormat, is_quantized
from mlxkv.memory.types import Held, is_allocation_failure
from mlxkv.nn.model import CausalLM
from mlxkv.prefix.layout import Kinds, n_states

_log = logging.getLogger(__name__)


ROOMY = 2**30, 64
"""Bytes, and multiples of the KV after it, that are enough for any chunk of a page or less, so that
nothing is traced; only for models without a `StepBound`. Scores grow with the KV."""
AMPLE = 1.5
"""Safety factor when the trace of a larger step, its KV included, stands in for this step (1.21
measured, where attention has windows)."""
WIDER = 1.05
"""Safety factor when the trace of a larger step stands in for a smaller one (1% measured, where the
caches grow by two steps at once)."""
MIN_CHUNK = 16
"""Tokens below which a chunk of a prompt is not halved any more."""
LONGEST_TRACED = 8192
"""Tokens of quantized KV up to which steps are traced; beyond, what they hold is extrapolated."""


def pages_bytes(limit_bytes: int, weights_bytes: int) -> int:
    """RAM for prefix pages: a quarter of the limit without the weights.

    The rest is for live caches and activations.
    """
    return max(0, limit_bytes - weights_bytes) // 4


def page_arrays() -> int | None:
    """Arrays that all prefix pages of the process may hold: a quarter of the device's limit.

    Pages of a few tokens reach it before their share of bytes.
    """
    limit = device.max_arrays()
    return None if limit is None else limit // 4


def kv_bytes(specs: Sequence[CacheSpec | None], n_tokens: int, kv: KVFormat) -> int:
    """Bytes that the live caches of one sequence allocate at `n_tokens`."""
    return sum(spec.nbytes(n_tokens, own) for spec, own in kv.layers(specs))


def row_bytes(specs: Sequence[CacheSpec | None], kv: KVFormat) -> int:
    """Bytes of one token in all layers while no window is full."""
    return sum(spec.token_bytes(own) for spec, own in kv.layers(specs))


@dataclass
class Needs:
    """Bytes that a model's sequences need beside its weights, in one KV type.

    The model is loaded or hollow; `chunk` is the prompt tokens that are computed at a time.
    """

    model: CausalLM
    kv_type: str
    chunk: int
    _steps: dict[tuple[int, int, bool], Held] = field(default_factory=dict)

    @cached_property
    def specs(self) -> list[CacheSpec | None]:
        """One per layer."""
        return self.model.cache_specs()

    @cached_property
    def guessing(self) -> list[CacheSpec]:
        """Of what the model guesses tokens with (`CausalLM.predictor`)."""
        predictor = self.model.predictor()
        return [] if predictor is None else [predictor.spec]

    @cached_property
    def kv(self) -> KVFormat:
        return KVFormat(self.kv_type, self.model.compute_dtype.size)

    @cached_property
    def is_quantized(self) -> bool:
        """Whether the KV of any layer is."""
        return is_quantized(self.kv_type)

    def kv_bytes(self, n_tokens: int) -> int:
        """Of one sequence."""
        guessing = kv_bytes(self.guessing, n_tokens, self.kv.default)
        return kv_bytes(self.specs, n_tokens, self.kv) + guessing

    def pages_bytes(self, n_tokens: int) -> int:
        """Of one sequence's prefix pages: rows of all layers, window or not, and states."""
        if (kinds := Kinds.of(self.specs)) is None:
            return 0
        of_row = row_bytes(self.specs, self.kv)
        if not kinds.states:
            return of_row * n_tokens
        # Where the prompt ends, its unfinished page stays beside the whole one.
        return of_row * (n_tokens + n_tokens % STEP) + self._state_bytes * n_states(n_tokens)

    @cached_property
    def _state_bytes(self) -> int:
        """Of all layers that keep one."""
        return kv_bytes([x for x in self.specs if x is not None and x.opaque], 1, self.kv.default)

    def step(self, n_held: int, n_new: int, *, last: bool) -> Held:
        """Bytes that one step holds, KV included; only the KV where MLX cannot trace the model."""
        if self.is_quantized and n_held > LONGEST_TRACED and n_new <= self.chunk:
            # The graph of attention over quantized KV grows with the tokens held.
            after = self.kv_bytes(n_held + n_new)
            marks = self._growth_marks if n_new == 1 else self._chunk_marks
            return Held(self.kv_bytes(n_held), after + _on_line(marks, n_held + n_new))
        return self._traced(n_held, n_new, last)

    def larger_steps(self, n_held: int, n_new: int) -> Iterator[int]:
        """Upper bounds of this step's peak: those of steps with at least as many tokens.

        First the smallest that was traced before, then that of the next powers of two, so that few
        steps are traced. `tests/memory/test_larger_steps.py` checks the bounds.
        """
        # All caches grow at a multiple of STEP.
        known = [
            held.peak
            for (n_behind, n, last), held in self._steps.items()
            if n_behind >= n_held and n >= larger_chunk(n_new) and last and n_behind % STEP == 0
        ]
        if known:
            yield min(known)
        n_behind = max(STEP, _power_of_two(n_held)) if n_held else 0
        if not self.is_quantized or n_behind <= LONGEST_TRACED:
            yield self._traced(n_behind, larger_chunk(n_new), True).peak

    def _traced(self, n_held: int, n_new: int, last: bool) -> Held:
        key = n_held, n_new, last
        if key not in self._steps:
            from mlxkv.memory.trace import decode_step, prefill_step  # short answers need none

            try:
                if n_new == 1 and n_held:
                    held = decode_step(self.model, self.kv_type, n_held)
                else:
                    held = prefill_step(self.model, self.kv_type, n_held, n_new, last=last)
            except (ValueError, RuntimeError) as error:
                _log.warning("the workspace is not known: %s", error)
                held = Held(self.kv_bytes(n_held), self.kv_bytes(n_held + n_new))
                if is_allocation_failure(error):
                    return held  # a later trace may succeed
            else:
                before, after = (
                    kv_bytes(self.guessing, n, self.kv.default) for n in (n_held, n_held + n_new)
                )
                held = Held(held.before + before, held.peak + after)
            self._steps[key] = held
        return self._steps[key]

    def _steps_to(self, n_tokens: int) -> list[tuple[int, Held]]:
        """(tokens held before, step) of the candidates for the largest step of such a prompt."""
        chunk = min(self.chunk, n_tokens)
        start = (n_tokens - 1) // chunk * chunk  # of the last chunk, which needs logits
        steps = [(start, self.step(start, n_tokens - start, last=True))]
        grows = (n_tokens - 1) // STEP * STEP  # where the caches grow for the last time
        for held in sorted({0, grows // chunk * chunk, start - chunk} & set(range(start))):
            steps.append((held, self.step(held, chunk, last=False)))
        for held in sorted({grows, n_tokens - 1} - {0}):
            steps.append((held, self.step(held, 1, last=True)))
        return steps

    def held(self, n_tokens: int) -> Held:
        """The step of a sequence of `n_tokens` that holds the most."""
        return max((held for _, held in self._steps_to(n_tokens)), key=lambda held: held.peak)

    def peak(self, n_tokens: int, pages_limit: int) -> int:
        """Bytes of KV, computation and prefix pages of one sequence."""

        def pages(n: int) -> int:
            return min(self.pages_bytes(n), pages_limit)

        during = max(held.peak + pages(n_held) for n_held, held in self._steps_to(n_tokens))
        return max(during, self.kv_bytes(n_tokens) + pages(n_tokens))

    def total(self, n_tokens: int, sequences: int) -> int:
        """KV and workspace at `n_tokens` a sequence; the workspace is interpolated."""
        chunk = _on_line(self._chunk_marks, n_tokens)
        workspace = max(chunk, _on_line(self._growth_marks, n_tokens))
        return self.kv_bytes(n_tokens) * sequences + workspace

    @cached_property
    def _chunk_marks(self) -> list[tuple[int, int]]:
        """(tokens, workspace) of the last chunk of a prompt; prompts of one chunk come first."""
        n_steps = self._unit // STEP
        first = [STEP << i for i in range((n_steps - 1).bit_length())] + [self._unit]
        marks = []
        for n in (*first, *self._contexts(2 * self._unit)):
            n_new = min(n, self.chunk)
            held = self._traced(n - n_new, n_new, last=True)
            marks.append((n, held.peak - self.kv_bytes(n)))
        return marks

    @cached_property
    def _growth_marks(self) -> list[tuple[int, int]]:
        """(tokens, workspace) of single tokens that grow all caches; the first copies none."""
        marks = []
        for n in (0, *self._contexts(2 * STEP)):
            held = self._traced(n, 1, last=True)
            marks.append((n + 1, held.peak - self.kv_bytes(n + 1)))
        return marks

    @property
    def _unit(self) -> int:
        """Tokens of a chunk, rounded up to a step of the caches."""
        return STEP * -(-self.chunk // STEP)

    def _contexts(self, short: int) -> tuple[int, int, int]:
        """A short context, and two beyond the chunk and every window, at which caches grow."""
        window = max((spec.window or 0 for spec in self.specs if spec is not None), default=0)
        unit = self._unit
        long = unit * -(-max(2048, short + 1, window + 2 * unit) // unit)
        # Quantized KV: the graph grows with the tokens held, so the next is close.
        longer = long + max(2048, unit) if self.is_quantized else 2 * long
        return short, long, longer

    def longest(self, room_bytes: int, sequences: int) -> int:
        """The longest context whose KV and workspace fit."""
        return _largest(lambda n: self.total(n, sequences) <= room_bytes)

    def least(self, n_tokens: int) -> int:
        """KV and the workspace of single tokens: the least that a sequence needs."""
        return self.kv_bytes(n_tokens) + _on_line(self._growth_marks, n_tokens)

    def most_tokens(self, room_bytes: int) -> int:
        """The longest sequence whose `least` fits."""
        return _largest(lambda n: self.least(n) <= room_bytes)


def larger_chunk(n_new: int) -> int:
    """One of few chunk lengths that needs at least as much memory as `n_new` tokens.

    One token beyond a power of two grows the caches twice: mlx-lm's definitions compute the last
    token by itself (`foreign.Model.last_logits`).
    """
    n = max(MIN_CHUNK, _power_of_two(n_new))
    return n + 1 if n > STEP else n


def halves(n: int) -> tuple[int, ...]:
    """Chunks smaller than `n`, down to `MIN_CHUNK`."""
    sizes = []
    while n > MIN_CHUNK:
        n = max(MIN_CHUNK, n // 2)
        sizes.append(n)
    return tuple(sizes)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number up to 2**30 that fits, as all below it do; 0 for none."""
    return bisect_left(range(1, 2**30 + 1), True, key=lambda n: not fits(n))


def _on_line(marks: Sequence[tuple[int, int]], x: int) -> int:
    """Interpolate at x between points in order of x: level before the first, else linear."""
    at = max(1, sum(n < x for n, _ in marks[:-1]))
    (low, at_low), (high, at_high) = marks[at - 1 : at + 1]
    return max(0, at_low + (at_high - at_low) * (max(x, low) - low) // (high - low))
