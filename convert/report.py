"""A plan as text, for `--dry-run`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from .plan import ConvertPlan, PlannedTensor, listed
from .quantization import name_of

_LAYER = re.compile(r"\blayers\.(\d+)\.")


def describe(plan: ConvertPlan) -> str:
    """The plan as text: a line for the tensors that differ only by their layer, then sums."""
    rows = [("TENSOR", "COUNT", "SHAPE", "FROM", "TO", "SIZE")]
    groups: dict[tuple[str, ...], list[PlannedTensor]] = {}
    for tensor in plan.tensors:
        key = (
            _LAYER.sub("layers.*.", tensor.name),
            "x".join(map(str, tensor.shape)),
            tensor.source_dtype,
            stored_as(tensor),
        )
        groups.setdefault(key, []).append(tensor)
    for (name, shape, origin, target), members in groups.items():
        size = _size(sum(tensor.nbytes for tensor in members))
        rows.append((name, str(len(members)), shape, origin, target, size))
    return "\n".join([*_aligned(rows), "", *_sums(plan)])


def changes(plan: ConvertPlan, errors: Mapping[str, float]) -> list[str]:
    """Lines on what is not as it was asked for or left out, and on a quantized source: how many
    tensors keep their values, how far others are off.

    Args:
        errors: see `ConvertResult`.
    """
    kinds = Counter(became(tensor) for tensor in plan.tensors if not tensor.is_same)
    same = sum(tensor.is_same for tensor in plan.tensors)
    lines = exceptions(plan)
    lines += left_out(plan)
    lines += [f"{same} tensors keep their quantized values"] if same else []
    return lines + [
        f"{kinds[kind]} tensors, {kind}: "
        + (f"off by {error:.2g} of their root mean square" if error else "no difference")
        for kind, error in errors.items()
    ]


def left_out(plan: ConvertPlan) -> list[str]:
    """Lines on arrays of the source that are not written, by the reason."""
    names: dict[str, list[str]] = {}
    for name, reason in plan.skipped:
        names.setdefault(reason, []).append(name)
    return [
        f"left out: {len(them)} ({listed(them, 3)}): {reason}" for reason, them in names.items()
    ]


def exceptions(plan: ConvertPlan) -> list[str]:
    """Lines on weights that are not quantized as was asked for, by the reason."""
    names: dict[tuple[bool, str], list[str]] = {}
    for tensor in plan.tensors:
        if tensor.note:
            key = tensor.quantization is None, tensor.note
            names.setdefault(key, []).append(tensor.name)
    return [
        f"{'not quantized' if is_plain else 'in smaller groups'}: {len(them)} "
        f"({listed(them, 4)}): {note}"
        for (is_plain, note), them in names.items()
    ]


def became(tensor: PlannedTensor) -> str:
    """Such as "FP8 as bfloat16"."""
    return f"{tensor.source_dtype} as {stored_as(tensor)}"


def stored_as(tensor: PlannedTensor) -> str:
    """Such as "affine4 g64, float16 scales"."""
    if tensor.quantization is None:
        return tensor.dtype
    quantization = tensor.quantization
    if quantization.mode != "affine":
        return name_of(quantization)
    return f"{name_of(quantization)} g{quantization.group_size}, {tensor.dtype} scales"


def _sums(plan: ConvertPlan) -> list[str]:
    lines = [
        f"{plan.n_parameters:,} parameters, {_size(plan.total_bytes)}, "
        f"{plan.bits_per_weight:.2f} bits per weight, {len(plan.shards)} "
        f"file{'s' if len(plan.shards) > 1 else ''}",
    ]
    lines += exceptions(plan)
    if same := sum(tensor.is_same for tensor in plan.tensors):
        lines.append(f"the same values: {same} tensors that were quantized")
    nearest = Counter(became(tensor) for tensor in plan.tensors if not tensor.is_exact)
    lines += [f"nearest values: {n} tensors, {how}" for how, n in nearest.items()]
    lines += left_out(plan)
    if plan.side_files:
        lines.append(f"beside them: {', '.join(('config.json', *plan.side_files))}")
    lines += [f"note: {note}" for note in plan.notes]
    return lines


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.rjust(width) if i in (1, 5) else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _size(n_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} B"
