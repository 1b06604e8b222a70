"""A memory plan for people, with a chart, and as JSON has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlxkv.base import device
from mlxkv.base.units import human_bytes

if TYPE_CHECKING:
    from mlxkv.memory.plan import BatchPlan, LayerKind, Plan

CHART_SIZE = 76, 17
"""Columns and rows."""


DRAFTS = "weights and KV of the model that drafts"


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it."""
    return asdict(plan) | {
        "total_bytes": plan.total_bytes,
        "fits": plan.fits,
        "formula": plan.formula,
    }


def text(plan: Plan) -> str:
    """The plan with its formula and a chart."""
    if plan.batch is not None:
        return _table(_of_embedder(plan, plan.batch))
    return f"{_rows(plan)}\n\n{chart(plan)}"


def _rows(plan: Plan) -> str:
    held = f"{plan.sequences} x {plan.context:,} tokens" if plan.sequences > 1 else ""
    longest = ", ".join(f"{_short(name)} {n:,}" for name, n in plan.max_contexts.items())
    until = " until windows are full" if any(kind.spec.window for kind in plan.layers) else ""
    what = "tokens, or of a state" if any(kind.is_state for kind in plan.layers) else "tokens"
    rows = [
        ("weights", human_bytes(plan.weights_bytes), ""),
        *(("", "", note) for note in _encoders(plan)),
        *([("drafts", human_bytes(plan.draft_bytes), DRAFTS)] if plan.draft_bytes else []),
        (
            "KV cache",
            human_bytes(plan.kv_bytes),
            f"{held or f'{plan.context:,} tokens'}, {plan.kv_type}; "
            f"{human_bytes(plan.kv_bytes_per_token)} a token{until}",
        ),
        *(
            ("", "", f"{human_bytes(kind.nbytes)} in {_layers(kind.n_layers)}, {_kind(plan, kind)}")
            for kind in plan.layers
        ),
        *_media(plan),
        ("workspace", human_bytes(plan.workspace_bytes), f"prefill of {plan.chunk:,} at a time"),
        ("total", human_bytes(plan.total_bytes), "fits" if plan.fits else "does not fit"),
        ("limit", human_bytes(plan.limit_bytes), _of_process()),
        (
            "allocator",
            human_bytes(plan.cache_bytes),
            "freed buffers that MLX keeps at most, until there is need",
        ),
        ("longest", "", f"{longest} tokens fit, whatever the model's context is"),
        (
            "peak",
            human_bytes(plan.peak_bytes),
            f"MLX's peak memory, with {human_bytes(plan.pages_bytes)} of prefix pages, which make "
            "room where there is need",
        ),
        ("formula", "", f"sequences x sum(layers x n_kv_heads x bytes of k and v x {what})"),
        ("", "", plan.formula),
    ]
    return _table(rows)


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    return "\n".join(f"{name:<10} {size:>9}  {note}".rstrip() for name, size, note in rows)


def _short(kv_type: str) -> str:
    return kv_type if kv_type in _MARKS else "by layer"


def _layers(n: int) -> str:
    return f"{n} layer" if n == 1 else f"{n} layers"


def _kind(plan: Plan, kind: LayerKind) -> str:
    if kind.is_state:
        return "a state of one size for any number of tokens"
    return kind.name if kind.kv_type == plan.kv_type else f"{kind.name}, {kind.kv_type}"


def _of_embedder(plan: Plan, batch: BatchPlan) -> list[tuple[str, str, str]]:
    """The rows of a model that makes vectors."""
    tokens = (
        f"a batch of {batch.n_tokens:,} tokens, the most at a time; a text has {batch.longest:,}"
    )
    return [
        ("weights", human_bytes(plan.weights_bytes), ""),
        ("workspace", human_bytes(plan.workspace_bytes), f"{tokens} at most"),
        ("total", human_bytes(plan.total_bytes), "fits" if plan.fits else "does not fit"),
        ("limit", human_bytes(plan.limit_bytes), _of_process()),
        ("KV cache", human_bytes(0), "and no pages: attention goes both ways, nothing is reused"),
        (
            "allocator",
            human_bytes(plan.cache_bytes),
            "freed buffers that MLX keeps at most, until there is need",
        ),
    ]


def _encoders(plan: Plan) -> Iterator[str]:
    names = {"image": "pictures", "audio": "sound"}
    used = {medium.kind for medium in plan.media}
    for kind, n_bytes in plan.encoders.items():
        size, what = human_bytes(n_bytes), names[kind]
        if kind in used:
            yield f"{size} of it to encode {what}"
        else:
            yield f"without {size} to encode {what}, which are loaded when the first comes"


def _media(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """Rows of the pictures and sound, and each one's tokens."""
    if plan.media:
        n_tokens = sum(medium.n_tokens for medium in plan.media)
        yield "media", human_bytes(plan.rows_bytes), f"{n_tokens:,} tokens of the context"
    for medium in plan.media:
        workspace = human_bytes(medium.workspace_bytes)
        yield (
            "",
            "",
            f"{medium.n_tokens:,} tokens: {medium.name or medium.kind}, {workspace} to encode",
        )


def _of_process() -> str:
    """Which limit of this process is less than the machine's memory, if one is."""
    tight = device.tightest()
    return "" if tight is None else f"this process has {tight}, for all that it needs"


def chart(plan: Plan) -> str:
    """Total bytes against context, one curve for each KV format, and the limit if it is near."""
    import plotext

    top = max(n_bytes for curve in plan.curves.values() for _, n_bytes in curve)
    unit, name = next((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (1, "B")) if top >= u)
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(*CHART_SIZE)
    for kv_type, curve in plan.curves.items():
        tokens = [n for n, _ in curve]
        sizes = [n_bytes / unit for _, n_bytes in curve]
        plotext.plot(tokens, sizes, label=_short(kv_type), marker=_MARKS.get(kv_type, "o"))
    if plan.limit_bytes <= 2 * top:
        plotext.hline(plan.limit_bytes / unit)
        name += f" (line: the limit, {human_bytes(plan.limit_bytes)})"
    marks = sorted({max(1, plan.context * i // 4) for i in range(5)})
    plotext.xticks(marks, [f"{n:,}" for n in marks])
    plotext.xlabel("tokens a sequence")
    plotext.title(f"total memory, {name}")
    drawn = plotext.uncolorize(plotext.build())
    plotext.clear_figure()
    return "\n".join(line.rstrip() for line in drawn.splitlines())


_MARKS = {"native": "#", "q8": "+", "k8v4": "x", "q4": "."}
