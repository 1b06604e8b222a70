"""What a model needs before anything of it is loaded: from config.json and file headers alone.

    KV bytes = sum over layers of
        n_kv_heads * (k_dim + v_dim) * bytes per value * min(tokens up to the next 256, window)

KV heads, not attention heads; a sliding layer stops at its window; a layer that shares another's
KV stores nothing. What prefill and decode hold beside that is found by tracing them (`workspace`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import mlx.core as mx

from mlxkv import device
from mlxkv.cache import STEP, CacheSpec
from mlxkv.errors import ModelNotFound, UsageError
from mlxkv.generate import default_chunk
from mlxkv.kv_format import KV_TYPES, KVFormat, first_kv_type
from mlxkv.layers import CausalLM
from mlxkv.loader import Layout, lay_out
from mlxkv.memory import is_allocation_failure
from mlxkv.names import HubRef, locate
from mlxkv.page_links import Kinds
from mlxkv.settings import Given, Settings, effective
from mlxkv.workspace import Held, decode_step, hollow, prefill_step

_log = logging.getLogger(__name__)

LONGEST_TRACED = 8192
"""Tokens of packed KV up to which steps are traced; beyond, what they hold is extrapolated."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers that store the same KV.

    Args:
        spec: of one of them.
        n_layers: how many there are.
        row_bytes: what one token takes in one of them.
        n_rows: tokens that each has room for at the plan's context.
        nbytes: of all of them together, for all sequences.
    """

    spec: CacheSpec
    n_layers: int
    row_bytes: int
    n_rows: int
    nbytes: int

    @property
    def name(self) -> str:
        """`full`, or `window 512`."""
        return "full" if self.spec.window is None else f"window {self.spec.window:,}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes that a model, its live caches and its computations take.

    Args:
        weights_bytes: all weights, in the dtype they are computed in.
        kv_bytes: the caches of all sequences at `context` tokens.
        kv_bytes_per_token: what one more token takes in one sequence while no window is full.
        workspace_bytes: what prefill or decode hold beside both at the most.
        cache_bytes: freed buffers that MLX's allocator may keep beside it; given back where there
            is need, so not in the total.
        pages_bytes: what prefix pages take in RAM beside it; they make room for everything else.
        peak_bytes: what MLX's peak memory will read after one sequence of `context` tokens.
        context: tokens a sequence.
        sequences: how many of them.
        chunk: tokens of a prompt that are computed at a time.
        kv_type: format of the KV.
        limit_bytes: what the machine, or the caller, allows.
        max_context: the longest context that fits for `sequences`, 0 if not even the weights do.
        max_contexts: the same for every KV format.
        layers: the layers that store KV, by kind.
        curves: KV format -> (tokens a sequence, total bytes).
        specs: one per layer.
    """

    weights_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    workspace_bytes: int
    cache_bytes: int
    pages_bytes: int
    peak_bytes: int
    context: int
    sequences: int
    chunk: int
    kv_type: str
    limit_bytes: int
    max_context: int
    max_contexts: Mapping[str, int]
    layers: tuple[LayerKind, ...]
    curves: Mapping[str, tuple[tuple[int, int], ...]]
    specs: tuple[CacheSpec | None, ...]

    @property
    def total_bytes(self) -> int:
        """Weights, KV and workspace: what has to find room."""
        return self.weights_bytes + self.kv_bytes + self.workspace_bytes

    @property
    def fits(self) -> bool:
        """Whether the total stays under the limit."""
        return self.total_bytes <= self.limit_bytes

    @property
    def formula(self) -> str:
        """How the KV bytes come about, with the numbers in it."""
        kinds = [
            f"{kind.n_layers} x {kind.spec.n_kv_heads} x {kind.row_bytes} B x {kind.n_rows:,}"
            for kind in self.layers
        ]
        return f"{self.sequences} x ({' + '.join(kinds) or '0'}) = {self.kv_bytes:,} B"


def pages_bytes(limit_bytes: int, weights_bytes: int) -> int:
    """What prefix pages may take in RAM: a quarter of what the limit leaves beside the weights.

    The rest is for live caches and activations, which pages must never crowd out.
    """
    return max(0, limit_bytes - weights_bytes) // 4


def page_arrays() -> int | None:
    """How many arrays all prefix pages of the process may hold: a quarter of what there may be.

    Where pages are small, tips of a few tokens, their number is reached before their bytes are.
    """
    limit = device.max_arrays()
    return None if limit is None else limit // 4


def kv_bytes(specs: Sequence[CacheSpec | None], n_tokens: int, kv: KVFormat) -> int:
    """Bytes that the live caches of one sequence allocate at `n_tokens`."""
    return sum(spec.nbytes(n_tokens, kv) for spec in specs if spec is not None)


def row_bytes(specs: Sequence[CacheSpec | None], kv: KVFormat) -> int:
    """Bytes that one token takes in all layers of one sequence while no window is full."""
    return sum(
        spec.n_kv_heads * (kv.row_bytes(spec.k_dim) + kv.row_bytes(spec.v_dim))
        for spec in specs
        if spec is not None
    )


def plan(
    model: str | Path,
    context: int | None = None,
    sequences: int = 1,
    kv_type: str | None = None,
    memory: str | int | None = None,
    dtype: mx.Dtype | str = "auto",
    chunk: int | None = None,
) -> Plan:
    """Plan a model: a directory, a name that `mlxkv list` shows, or a Hugging Face repository.

    Of a repository that is not here only config.json and the headers of its weights are fetched,
    and nothing is kept. Nothing is loaded.

    What is None comes from where `load` has it from.

    Args:
        model: path or name.
        context: tokens a sequence, past the model's own as well: this is arithmetic.
        sequences: sequences at a time.
        kv_type: one of `KV_TYPES`.
        memory: limit ("16GiB", bytes).
        dtype: what is computed in, as for `load`.
        chunk: tokens of a prompt at a time; None for the device's default.

    Raises:
        UsageError: an argument out of its range.
        ModelNotFound, CheckpointError, DownloadError: as for `load`.
    """
    if sequences < 1 or (context is not None and context < 1) or (chunk is not None and chunk < 1):
        raise UsageError("--context, --sequences and chunk must be at least 1")
    layout, settings = _layout(model, dtype, Given(kv_type=kv_type, memory=memory))
    weights_bytes = layout.nbytes
    return plan_model(
        hollow(layout),
        weights_bytes=weights_bytes,
        context=context or settings.context.value,
        sequences=sequences,
        kv_type=first_kv_type(settings.kv_type.value),
        limit=settings.memory.value,
        chunk=chunk,
    )


def _layout(model: str | Path, dtype: mx.Dtype | str, given: Given) -> tuple[Layout, Settings]:
    """What a model loads as: from its directory, or from headers, without weights to read."""
    from mlxkv.hub_headers import headers_of
    from mlxkv.store import resolve

    try:
        path = resolve(str(model), fetch=False)
    except ModelNotFound:
        ref = None if isinstance(model, Path) else locate(model)
        if not isinstance(ref, HubRef) or ref.wanted is not None:
            raise
    else:
        return lay_out(path, dtype), effective(path, given)
    with headers_of(ref.repo_id) as folder:
        return lay_out(folder, dtype, headers_only=True), effective(folder, given)


def plan_model(
    model: CausalLM,
    *,
    weights_bytes: int,
    context: int,
    sequences: int,
    kv_type: str,
    limit: int,
    chunk: int | None = None,
) -> Plan:
    """The arithmetic of `plan`, on a model that is loaded or hollow."""
    needs = {
        name: Needs(model, name, chunk or default_chunk())
        for name in dict.fromkeys((kv_type, *KV_TYPES))
    }
    own = needs[kv_type]
    held = own.held(context)
    kv_total = own.kv_bytes(context) * sequences
    workspace = max(0, held.peak - own.kv_bytes(context))
    room = limit - weights_bytes
    longest = {name: need.longest(room, sequences) for name, need in needs.items()}
    return Plan(
        weights_bytes=weights_bytes,
        kv_bytes=kv_total,
        kv_bytes_per_token=row_bytes(own.specs, own.kv),
        workspace_bytes=workspace,
        cache_bytes=min(workspace, device.allocator_keeps()),
        pages_bytes=min(own.pages_bytes(context), pages_bytes(limit, weights_bytes)),
        peak_bytes=weights_bytes + own.peak(context, pages_bytes(limit, weights_bytes)),
        context=context,
        sequences=sequences,
        chunk=own.chunk,
        kv_type=kv_type,
        limit_bytes=limit,
        max_context=longest[kv_type],
        max_contexts={name: longest[name] for name in KV_TYPES},
        layers=_layer_kinds(own.specs, own.kv, context, sequences),
        curves={
            name: tuple(
                (n, weights_bytes + needs[name].total(n, sequences)) for n in _marks(context)
            )
            for name in KV_TYPES
        },
        specs=tuple(own.specs),
    )


def _marks(context: int, n_marks: int = 32) -> list[int]:
    """Contexts to draw a curve by."""
    return sorted({max(1, context * i // n_marks) for i in range(1, n_marks + 1)})


def _layer_kinds(
    specs: Sequence[CacheSpec | None], kv: KVFormat, context: int, sequences: int
) -> tuple[LayerKind, ...]:
    counts = Counter(spec for spec in specs if spec is not None and not spec.opaque)
    return tuple(
        LayerKind(
            spec,
            n,
            kv.row_bytes(spec.k_dim) + kv.row_bytes(spec.v_dim),
            spec.n_rows(context),
            n * spec.nbytes(context, kv) * sequences,
        )
        for spec, n in counts.items()
    )


@dataclass
class Needs:
    """What a model's sequences need beside its weights, in one KV format.

    Args:
        model: loaded or hollow.
        kv_type: format of the KV.
        chunk: tokens of a prompt that are computed at a time.
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
    def kv(self) -> KVFormat:
        """The format, with the size of what is computed in."""
        return KVFormat(self.kv_type, self.model.compute_dtype.size)

    def kv_bytes(self, n_tokens: int) -> int:
        """Of one sequence."""
        return kv_bytes(self.specs, n_tokens, self.kv)

    def pages_bytes(self, n_tokens: int) -> int:
        """What the prefix pages of one sequence take: rows of all layers, window or not."""
        return 0 if Kinds.of(self.specs) is None else row_bytes(self.specs, self.kv) * n_tokens

    def step(self, n_held: int, n_new: int, *, last: bool) -> Held:
        """What one step holds, KV included; only the KV where MLX cannot trace the model."""
        if self.kv_type != "native" and n_held > LONGEST_TRACED and n_new <= self.chunk:
            # The graph of attention over packed KV grows with the tokens held.
            after = self.kv_bytes(n_held + n_new)
            marks = self._growth_marks if n_new == 1 else self._chunk_marks
            return Held(self.kv_bytes(n_held), after + _on_line(marks, n_held + n_new))
        return self._traced(n_held, n_new, last)

    def _traced(self, n_held: int, n_new: int, last: bool) -> Held:
        """`step`, traced whatever its length."""
        key = n_held, n_new, last
        if key not in self._steps:
            try:
                if n_new == 1 and n_held:
                    held = decode_step(self.model, self.kv_type, n_held)
                else:
                    held = prefill_step(self.model, self.kv_type, n_held, n_new, last=last)
            except (ValueError, RuntimeError) as error:
                _log.warning("the workspace is not known: %s", error)
                held = Held(self.kv_bytes(n_held), self.kv_bytes(n_held + n_new))
                if is_allocation_failure(error):
                    return held  # another time it may be
            self._steps[key] = held
        return self._steps[key]

    def _steps_to(self, n_tokens: int) -> list[tuple[int, Held]]:
        """Tokens held before, and the steps of a prompt of that length that hold the most."""
        chunk = min(self.chunk, n_tokens)
        start = (n_tokens - 1) // chunk * chunk  # of the last chunk, whose logits are wanted
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
        """Of KV, computation and prefix pages of one sequence."""

        def pages(n: int) -> int:
            return min(self.pages_bytes(n), pages_limit)

        during = max(held.peak + pages(n_held) for n_held, held in self._steps_to(n_tokens))
        return max(during, self.kv_bytes(n_tokens) + pages(n_tokens))

    def total(self, n_tokens: int, sequences: int) -> int:
        """KV and workspace at `n_tokens` a sequence; the workspace between two lengths."""
        return self.kv_bytes(n_tokens) * sequences + self._workspace(n_tokens)

    def _workspace(self, n_tokens: int) -> int:
        """What chunks and the growth of caches take grows in straight lines between the marks."""
        return max(_on_line(self._chunk_marks, n_tokens), _on_line(self._growth_marks, n_tokens))

    @cached_property
    def _chunk_marks(self) -> list[tuple[int, int]]:
        """(tokens, workspace) of the last chunk of a prompt.

        Prompts of one chunk come first: what they take grows with more than their length.
        """
        marks = []
        for n in (*self._first_chunks, *self._contexts(2 * self._unit)):
            n_new = min(n, self.chunk)
            held = self._traced(n - n_new, n_new, last=True)
            marks.append((n, held.peak - self.kv_bytes(n)))
        return marks

    @cached_property
    def _growth_marks(self) -> list[tuple[int, int]]:
        """(tokens, workspace) of single tokens for which all caches grow; the first copies none."""
        marks = []
        for n in (0, *self._contexts(2 * STEP)):
            held = self._traced(n, 1, last=True)
            marks.append((n + 1, held.peak - self.kv_bytes(n + 1)))
        return marks

    @property
    def _unit(self) -> int:
        """A chunk, up to the next step of the caches."""
        return STEP * -(-self.chunk // STEP)

    @property
    def _first_chunks(self) -> list[int]:
        """Lengths of prompts of one chunk."""
        n_steps = self._unit // STEP
        return [STEP << i for i in range((n_steps - 1).bit_length())] + [self._unit]

    def _contexts(self, short: int) -> tuple[int, int, int]:
        """A short context, and two beyond it, the chunk and every window; where caches grow."""
        window = max((spec.window or 0 for spec in self.specs if spec is not None), default=0)
        unit = self._unit
        long = unit * -(-max(2048, short + 1, window + 2 * unit) // unit)
        # Where the graph grows with the tokens held the next is no further away than it must be.
        longer = 2 * long if self.kv_type == "native" else long + max(2048, unit)
        return short, long, longer

    def longest(self, room_bytes: int, sequences: int) -> int:
        """The longest context whose KV and workspace find room."""
        return _largest(lambda n: self.total(n, sequences) <= room_bytes)

    def least(self, n_tokens: int) -> int:
        """KV and the workspace of single tokens: what a sequence needs if all else gives way."""
        return self.kv_bytes(n_tokens) + _on_line(self._growth_marks, n_tokens)

    def most_tokens(self, room_bytes: int) -> int:
        """The longest sequence for which there is room if all else gives way."""
        return _largest(lambda n: self.least(n) <= room_bytes)


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, 0 for none; all below it do."""
    low, high = 0, 2**30
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _on_line(marks: Sequence[tuple[int, int]], x: int) -> int:
    """The height at x of the line through points in order of x; level before the first.

    Behind the last it goes on as between the last two.
    """
    at = max(1, sum(n < x for n, _ in marks[:-1]))
    (low, at_low), (high, at_high) = marks[at - 1 : at + 1]
    return max(0, at_low + (at_high - at_low) * (max(x, low) - low) // (high - low))
