"""The memory that a model needs, from config.json and file headers alone.

    KV bytes = sum over layers of
        n_kv_heads * (k_dim + v_dim) * bytes per value * min(tokens up to the next 256, window)

KV heads, not attention heads; a layer that shares another's KV stores nothing, and one that keeps a
state has the same bytes at any number of tokens. The workspace of prefill and decode is found by
tracing them (`trace`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from mlxkv.base import device
from mlxkv.base.device import default_chunk
from mlxkv.kv.types import KV_TYPES, CacheSpec, KVFormat, RecurrentSpec
from mlxkv.media.types import Medium
from mlxkv.memory.embedding import BatchNeeds
from mlxkv.memory.media import encoder_bytes, shapes_of
from mlxkv.memory.needs import Needs, pages_bytes, row_bytes
from mlxkv.nn.embedder import Embedder
from mlxkv.nn.model import CausalLM


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers that store KV of the same shape in the same format.

    Args:
        spec: of one of them.
        n_layers: their number.
        row_bytes: bytes of one token in one of them.
        n_rows: tokens that each allocates at the plan's context; 0 of those with a state.
        nbytes: of all of them, for all sequences.
        kv_type: their format.
    """

    spec: CacheSpec
    n_layers: int
    row_bytes: int
    n_rows: int
    nbytes: int
    kv_type: str

    @property
    def is_state(self) -> bool:
        """Whether they keep a state of one size, and no rows of tokens."""
        return isinstance(self.spec, RecurrentSpec)

    @property
    def name(self) -> str:
        """`full`, `window 512`, or `state`."""
        if self.is_state:
            return "state"
        return "full" if self.spec.window is None else f"window {self.spec.window:,}"


@dataclass(frozen=True, slots=True)
class PlannedMedium:
    """One picture, or one piece of sound, that a plan counts.

    Args:
        name: of its file.
        kind: see `mlxkv.media.types`.
        n_tokens: of the context.
        workspace_bytes: the most that its encoder holds while it computes the rows.
    """

    name: str
    kind: str
    n_tokens: int
    workspace_bytes: int


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """A batch of texts of an embedding model, the largest one.

    Args:
        n_tokens: of all its texts.
        longest: tokens of one text.
    """

    n_tokens: int
    longest: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes that a model, its live caches and its computations take.

    Args:
        weights_bytes: all weights, in the dtype they are computed in, but those of encoders of
            pictures and sound that the plan has none for: they are loaded when they are needed.
        kv_bytes: the caches of all sequences at `context` tokens.
        kv_bytes_per_token: of one more token in one sequence while no window is full.
        workspace_bytes: the most that prefill or decode hold beside both.
        cache_bytes: freed buffers that MLX's allocator may keep; not in the total, as it frees them
            where memory is short.
        pages_bytes: prefix pages in RAM; not in the total, as they are dropped first.
        peak_bytes: MLX's peak memory after one sequence of `context` tokens.
        context: tokens a sequence.
        sequences: their number.
        chunk: tokens of a prompt that are computed at a time.
        kv_type: format of the KV, by layer or for all.
        limit_bytes: of the machine, or of the caller.
        max_context: the longest context that fits for `sequences`, 0 if not even the weights do.
        max_contexts: the same for every KV format, and for `kv_type`.
        layers: the layers that store KV, by kind.
        curves: KV format -> (tokens a sequence, total bytes).
        specs: one per layer.
        encoders: kind of media -> bytes of its encoder's weights.
        media: the pictures and sound of one sequence.
        rows_bytes: of what encoders made of them.
        draft_bytes: weights and KV of the model that drafts, which has one sequence.
        batch: of an embedding model, which keeps no KV and no pages: its workspace is the batch's,
            its context one text's.
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
    encoders: Mapping[str, int]
    media: tuple[PlannedMedium, ...]
    rows_bytes: int
    draft_bytes: int = 0
    batch: BatchPlan | None = None

    @property
    def total_bytes(self) -> int:
        """Weights, KV, rows of media, a draft model and workspace."""
        beside = self.rows_bytes + self.draft_bytes
        return self.weights_bytes + self.kv_bytes + beside + self.workspace_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.limit_bytes

    @property
    def formula(self) -> str:
        """The sum that makes the KV bytes."""
        kinds = [
            f"{kind.n_layers} x {kind.nbytes // (kind.n_layers * self.sequences):,} B"
            if kind.is_state
            else f"{kind.n_layers} x {kind.spec.n_kv_heads} x {kind.row_bytes} B x {kind.n_rows:,}"
            for kind in self.layers
        ]
        return f"{self.sequences} x ({' + '.join(kinds) or '0'}) = {self.kv_bytes:,} B"


def plan_model(
    model: CausalLM,
    *,
    weights_bytes: int,
    context: int,
    sequences: int,
    kv_type: str,
    limit: int,
    chunk: int | None = None,
    encoders: Mapping[str, int] | None = None,
    media: Sequence[Medium] = (),
    draft_bytes: int = 0,
) -> Plan:
    """Plan a loaded or hollow model.

    Args:
        model: loaded, or as `trace.hollow` makes it.
        weights_bytes: without those of encoders.
        context: tokens a sequence.
        sequences: their number.
        kv_type: format of the KV.
        limit: memory for all.
        chunk: tokens of a prompt that are computed at a time.
        encoders: see `Plan`.
        media: of one sequence.
        draft_bytes: see `Plan`.
    """
    limit_left = limit - draft_bytes
    if isinstance(model, Embedder):
        return _plan_embedder(model, weights_bytes, context, limit, chunk or default_chunk())
    planned = tuple(
        PlannedMedium(m.name, m.kind, m.n_tokens, encoder_bytes(model, m.kind, shapes_of(m)))
        for m in media
    )
    encoders = encoders or {}
    weights_bytes += sum(n for kind, n in encoders.items() if any(m.kind == kind for m in media))
    rows = sum(m.n_tokens for m in media) * model.config.hidden_size * model.compute_dtype.size
    names = tuple(dict.fromkeys((*KV_TYPES, kv_type)))
    needs = {name: Needs(model, name, chunk or default_chunk()) for name in names}
    own = needs[kv_type]
    # A picture whose rows see each other is computed at once, also where it is more than a chunk.
    whole = max((m.n_tokens for m in media if m.kind in model.two_way_kinds), default=0)
    step = own if whole <= own.chunk else Needs(model, kv_type, whole)
    held = step.held(context)
    kv_total = own.kv_bytes(context) * sequences
    of_encoder = max((m.workspace_bytes for m in planned), default=0)
    workspace = max(0, held.peak - own.kv_bytes(context), of_encoder)
    pages = pages_bytes(limit_left, weights_bytes)
    room = limit_left - weights_bytes - rows
    longest = {name: need.longest(room, sequences) for name, need in needs.items()}
    fixed = weights_bytes + rows + draft_bytes
    marks = sorted({max(1, context * i // 32) for i in range(1, 33)})
    return Plan(
        weights_bytes=weights_bytes,
        kv_bytes=kv_total,
        kv_bytes_per_token=row_bytes([*own.specs, *own.guessing], own.kv),
        workspace_bytes=workspace,
        cache_bytes=min(workspace, device.allocator_keeps()),
        pages_bytes=min(own.pages_bytes(context), pages),
        peak_bytes=weights_bytes
        + draft_bytes
        + rows
        + max(step.peak(context, pages), own.kv_bytes(context) + of_encoder),
        context=context,
        sequences=sequences,
        chunk=own.chunk,
        kv_type=kv_type,
        limit_bytes=limit,
        max_context=longest[kv_type],
        max_contexts=longest,
        layers=_layer_kinds([*own.specs, *own.guessing], own.kv, context, sequences),
        curves={
            name: tuple(zip(marks, _curve(needs[name], marks, sequences, fixed), strict=True))
            for name in names
        },
        specs=tuple(own.specs),
        encoders=encoders,
        media=planned,
        rows_bytes=rows,
        draft_bytes=draft_bytes,
    )


def _plan_embedder(
    model: Embedder, weights_bytes: int, context: int, limit: int, chunk: int
) -> Plan:
    """Plan an embedding model, which keeps no KV and no pages.

    Args:
        model: see `plan_model`, and so for the next three.
        weights_bytes: of all weights.
        context: tokens of a text at most, if the model takes as many.
        limit: memory for all.
        chunk: tokens of a batch that is not one text.
    """
    context = min(context, model.config.sentence.max_tokens or context)
    needs, batch = BatchNeeds(model, context), max(chunk, context)
    workspace, room = needs.of(batch), limit - weights_bytes
    fits = needs.largest(room, context) if needs.of(1) <= room else 0
    return Plan(
        weights_bytes=weights_bytes,
        kv_bytes=0,
        kv_bytes_per_token=0,
        workspace_bytes=workspace,
        cache_bytes=min(workspace, device.allocator_keeps()),
        pages_bytes=0,
        peak_bytes=weights_bytes + workspace,
        context=context,
        sequences=1,
        chunk=chunk,
        kv_type="native",
        limit_bytes=limit,
        max_context=fits,
        max_contexts=dict.fromkeys(KV_TYPES, fits),
        layers=(),
        curves={},
        specs=(),
        encoders={},
        media=(),
        rows_bytes=0,
        batch=BatchPlan(batch, context),
    )


def _curve(needs: Needs, marks: Sequence[int], sequences: int, fixed_bytes: int) -> Iterator[int]:
    """Total bytes at numbers of tokens that rise: a longer sequence passes the shorter ones."""
    return accumulate((fixed_bytes + needs.total(n, sequences) for n in marks), max)


def _layer_kinds(
    specs: Sequence[CacheSpec | None], kv: KVFormat, context: int, sequences: int
) -> tuple[LayerKind, ...]:
    native = replace(kv, name="native")  # which states stay in
    counts = Counter(
        (spec, native if isinstance(spec, RecurrentSpec) else own)
        for spec, own in kv.layers(specs)
        if not spec.opaque or isinstance(spec, RecurrentSpec)
    )
    return tuple(
        LayerKind(
            spec,
            n,
            own.row_bytes(spec.k_dim, spec.v_dim),
            0 if spec.opaque else spec.n_rows(context),
            n * spec.nbytes(context, own) * sequences,
            own.name,
        )
        for (spec, own), n in counts.items()
    )
