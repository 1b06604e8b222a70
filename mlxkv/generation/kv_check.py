"""Compare saved KV with what the loaded model computes from its tokens.

A sample has the first page, which nothing precedes, the last one, which attends to all others, and
some between them at random; each is computed behind the saved KV of the pages before it. Layers
with a window keep KV near the end only: there the sample has the first page and the tokens behind
the oldest that can be resumed at. Layers that keep a state have it at the end alone: the whole
prompt is computed, as for a full check.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxkv.cache import make_caches
from mlxkv.generation.prefill import prefill
from mlxkv.kv.layout import Cache
from mlxkv.kv.storage import dense_both, storage_of
from mlxkv.kv.types import STEP, KVFormat, layer_types
from mlxkv.nn.model import CausalLM
from mlxkv.prefix.layout import WINDOW, Kinds, Link, chain_of, token_ids
from mlxkv.prefix.on_disk.disk import PageDisk
from mlxkv.prefix.on_disk.part import Part, load_parts
from mlxkv.saved_kv.manifest import NamedKV

SAMPLED_PAGES = 4
TOLERANCE = {"float32": 1e-2, "float16": 0.1, "bfloat16": 0.3}
"""Largest difference of a token's keys or values in one layer, as a part of their norm, by compute
dtype. The order of sums explains 1e-3, 2e-2 and 0.1; the KV of another token differs by about 1.
"""
FORMAT_TOLERANCE = {"native": 0.0, "q8": 0.05, "k8v4": 0.4, "q4": 0.4}
"""What quantized KV adds to that."""

KeysValues = tuple[mx.array, mx.array]


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens that were computed again.

    Args:
        start: the first.
        stop: the one behind the last.
        difference: the largest of a token's keys or values in a layer, as a part of their norm;
            None where none of their KV is on disk any more.
    """

    start: int
    stop: int
    difference: float | None


@dataclass(frozen=True, slots=True)
class KVReport:
    """The outcome of a check.

    Args:
        name: of the saved KV.
        n_tokens: of its prompt.
        tolerance: the largest difference allowed.
        spans: that were compared.
    """

    name: str
    n_tokens: int
    tolerance: float
    spans: tuple[Span, ...]

    @property
    def n_checked(self) -> int:
        """Tokens that were computed again and compared."""
        return sum(span.stop - span.start for span in self.spans if span.difference is not None)

    @property
    def false_span(self) -> Span | None:
        """The first tokens whose KV is not what the model computes."""
        for span in self.spans:
            if span.difference is not None and not span.difference <= self.tolerance:
                return span
        return None

    @property
    def passed(self) -> bool:
        """Whether something was compared, and nothing differs."""
        return self.false_span is None and self.n_checked > 0


class KVCheck:
    """Checks the pages of one name.

    Args:
        model: that they belong to.
        named: saved for it.
        disk: its pages, or those of the quarantine.
        kinds: of the model's layers.
    """

    def __init__(self, model: CausalLM, named: NamedKV, disk: PageDisk, kinds: Kinds):
        self._model, self._named, self._disk, self._kinds = model, named, disk, kinds
        self._tokens = token_ids(named.tokens)
        n_whole = named.n_tokens // STEP
        self._links = list(chain_of(named.tokens, n_whole))
        tip = [key for key in named.keys if key.n_tokens < STEP]
        if tip:
            self._links.append(Link(tip[0].parent, tip[0].name, STEP * n_whole, tip[0].n_tokens))
        self._held = {key for key in named.keys if key in disk}

    def run(
        self, *, full: bool = False, on_progress: Callable[[int, int], None] | None = None
    ) -> KVReport:
        """Compute and compare a sample, or the whole prompt.

        Args:
            full: compute the whole prompt.
            on_progress: called with (done, all) tokens.
        """
        n = self._named.n_tokens
        spans = [(0, n)] if full else self._sample()
        n_all, done = sum(stop - start for start, stop in spans), 0
        found: list[Span] = []
        for start, stop in spans:
            found.append(Span(start, stop, self._difference(start, stop)))
            done += stop - start
            if on_progress is not None:
                on_progress(done, n_all)
        names = layer_types(self._named.kv_type).names
        tolerance = TOLERANCE[self._named.dtype] + max(FORMAT_TOLERANCE[name] for name in names)
        return KVReport(self._named.name, n, tolerance, tuple(found))

    def _sample(self) -> list[tuple[int, int]]:
        """The spans of a sample; the whole prompt where only its first page could be computed."""
        first, *others = self._links
        spans = [(link.start, link.stop) for link in others if self._needed(link.start) is not None]
        tail = self._tail()
        if tail is not None and (not spans or spans[-1][1] < self._named.n_tokens):
            spans.append((tail, self._named.n_tokens))
        if others and not spans:
            return [(0, self._named.n_tokens)]
        chosen = random.SystemRandom().sample(spans[:-1], min(SAMPLED_PAGES - 2, len(spans[:-1])))
        return [(first.start, first.stop), *sorted(chosen), *spans[-1:]]

    def _tail(self) -> int | None:
        """The first position from which layers with a window can go on to the end."""
        held = [link.start for link in self._links if link.key(WINDOW) in self._held]
        if self._kinds.states or not held or held[0] == 0:
            return None
        at = held[0] + self._kinds.reach - 1
        fits = at < self._named.n_tokens and self._needed(at) is not None
        return at if fits else None

    def _needed(self, stop: int) -> list[tuple[str, list[Link]]] | None:
        """The parts, with their pages, needed to go on at `stop`; None if one is not there."""
        before = [link for link in self._links if link.start < stop]
        needed = [(part, self._kinds.needed(before, part, stop)) for part in self._kinds.parts]
        keys = {link.key(part) for part, links in needed for link in links}
        return needed if keys <= self._held else None

    def _difference(self, start: int, stop: int) -> float | None:
        caches = make_caches(self._model, self._named.kv_type)
        if start and not self._restore(caches, start):
            return None
        mx.eval(prefill(self._model, self._tokens[start:stop], caches))
        worst: float | None = None
        for ours, theirs in self._pairs(caches, start, stop):
            found = _largest_difference(ours, theirs)
            if worst is None or not found <= worst:  # keeps a NaN
                worst = found
        return worst

    def _restore(self, caches: Sequence[Cache], stop: int) -> bool:
        """Fill caches with the saved KV before `stop`; False where a page cannot be read."""
        for part, links in self._needed(stop) or ():
            read = [self._disk.read(link.key(part)) for link in links]
            parts = [page[1] for page in read if page is not None]
            if len(parts) < len(links):
                return False
            load_parts([caches[i] for i in self._kinds.caches(part)], parts, stop)
        return True

    def _pairs(
        self, caches: Sequence[Cache], start: int, stop: int
    ) -> Iterator[tuple[KeysValues, KeysValues]]:
        """KV that was computed, beside the saved one of the same layer and positions."""
        layers = list(KVFormat(self._named.kv_type).layers(self._model.cache_specs()))
        for part, link, saved in self._saved(start, stop):
            if self._kinds.states and part == WINDOW:
                if link.stop == stop:  # elsewhere the computed state has gone on
                    yield from self._states(caches, saved)
                continue
            for index, piece in zip(self._kinds.caches(part), saved.slices(), strict=True):
                cache, (spec, kv) = caches[index], layers[index]
                first, last = max(start, link.start, cache.first), min(stop, link.stop)
                if first < last:
                    saved_rows = [
                        x[:, :, first - link.start : last - link.start] for x in piece.arrays
                    ]
                    held = last - first, spec.k_dim, spec.v_dim
                    decode = storage_of(kv.name).decode_both
                    ours = dense_both(*decode(cache.read(first, last).arrays, *held))
                    yield ours, dense_both(*decode(saved_rows, *held))

    def _states(
        self, caches: Sequence[Cache], saved: Part
    ) -> Iterator[tuple[KeysValues, KeysValues]]:
        for index, piece in zip(self._kinds.caches(WINDOW), saved.slices(), strict=True):
            tail, state = caches[index].read(saved.start, saved.stop).arrays
            saved_tail, saved_state = piece.arrays
            yield (tail, state), (saved_tail, saved_state)

    def _saved(self, start: int, stop: int) -> Iterator[tuple[str, Link, Part]]:
        """The saved pages of a span, as far as they are there."""
        for link in self._links:
            if link.start >= stop or link.stop <= start:
                continue
            for part in self._kinds.parts:
                key = link.key(part)
                if key in self._held and (page := self._disk.read(key)) is not None:
                    yield part, link, page[1]


def _largest_difference(ours: KeysValues, theirs: KeysValues) -> float:
    """The largest of a token's, as a part of its norm or, for a small one, of the tokens' mean."""
    worst = 0.0
    for x, y in zip(ours, theirs, strict=True):
        if not x.size:
            continue
        x, y = x.astype(mx.float32), y.astype(mx.float32)
        norms = mx.sqrt((x * x).sum((0, 1, 3)))
        differences = mx.sqrt(((x - y) ** 2).sum((0, 1, 3)))
        floor = mx.maximum(mx.maximum(norms, norms.mean()), mx.array(1e-20))
        found = float(np.array((differences / floor).max()))
        worst = found if not found <= worst else worst
    return worst
