"""An adapter fused into the weights of a source, as it is converted.

A quantized source is quantized again where an adapter changes it, in the format that it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxkv.checkpoint.quantization import Format
from mlxkv.errors import UnsupportedModel, UsageError
from mlxkv.models.adapter_targets import Change, Changes, Weighted
from mlxkv.models.loader import random_state_kept
from mlxkv.nn.model import CausalLM

from .adapter import read_adapter
from .sources import Source
from .tensors import SourceTensor, matrix_shape

_EMBEDDING = "model.embed_tokens.weight"


def check_unmeasured(quantize: str | None, *, calibrate: bool, evaluate: bool) -> None:
    """Refuse what is measured on the source, which is not what is written with adapters.

    Raises:
        UsageError: one of these.
    """
    asked = {"quantize": quantize == "auto", "calibrate": calibrate, "evaluate": evaluate}
    for field, is_asked in asked.items():
        if is_asked:
            raise UsageError(
                "measures the source, to which the adapters are not added: fuse them first, and "
                "convert the result",
                field=field,
            )


def with_adapters(source: Source, adapters: Sequence[tuple[Path, float]]) -> Source:
    """A source whose weights are those that adapters make, given by paths and weights.

    Raises:
        WeightsError, UnsupportedModel: as `models.adapters.attach`, and for a change that no weight
            can take: of one of embedding and head, where both are one tensor.
    """
    read = [Weighted(read_adapter(path, source.config), weight) for path, weight in adapters]
    with random_state_kept():
        model = source.family.build(source.parsed)
    tensors: dict[str, SourceTensor] = dict(source.tensors)
    for each in read:
        for name, changes in _by_name(model, source, each).items():
            tensors[name] = FusedTensor(tensors[name], tuple(changes))
    notes = [f"fused: {each.adapter.source} (weight {each.weight:g})" for each in read]
    return replace(source, tensors=tensors, notes=(*source.notes, *notes))


def _by_name(model: CausalLM, source: Source, each: Weighted) -> Mapping[str, list[Change]]:
    root: Any = model.weights_root()
    paths = {id(module): path for path, module in root.named_modules()}
    found: dict[str, list[Change]] = {}
    for change in Changes(model, source.family, each):
        found.setdefault(f"{paths[id(change.place.module)]}.weight", []).append(change)
    embedding = found.get(_EMBEDDING, [])
    rows = [change for change in embedding if change.of_rows]
    if embedding and source.tied and len(rows) * 2 != len(embedding):
        raise UnsupportedModel(
            f"{each.adapter.source}: it changes one of embedding and head, which are one tensor in "
            "this model: it cannot be fused"
        )
    return {**found, _EMBEDDING: rows} if rows else found


@dataclass(frozen=True, slots=True)
class FusedTensor:
    """A tensor plus what one adapter adds to it; see `SourceTensor`."""

    base: SourceTensor
    changes: tuple[Change, ...]

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def origin(self) -> str:
        return self.base.origin

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> str:
        return self.base.dtype

    @property
    def quantization(self) -> Format | None:
        return self.base.quantization

    @property
    def scale_dtype(self) -> str:
        return self.base.scale_dtype

    @property
    def row_step(self) -> int:
        return self.base.row_step

    def rows(self, start: int, stop: int) -> mx.array:
        values = self.base.rows(start, stop).astype(mx.float32)
        return values + sum(
            (change.weight * self._added(change, values, start, stop) for change in self.changes),
            mx.zeros_like(values),
        )

    def quantized_rows(self, start: int, stop: int) -> tuple[mx.array, ...]:
        form = self.quantization
        assert form is not None
        values = self.rows(start, stop).astype(getattr(mx, self.scale_dtype))
        return tuple(mx.quantize(values, form.group_size, form.bits, mode=form.mode))

    def is_exact(self, scale_dtype: str) -> bool:
        return False

    def _added(self, change: Change, values: mx.array, start: int, stop: int) -> mx.array:
        """What a change adds to these rows, whose own values are given."""
        added = mx.concatenate(list(self._products(change, start, stop)))
        if change.magnitude is None:
            return added
        norms = mx.linalg.norm(values + added, axis=1, keepdims=True)
        magnitude = change.magnitude[start:stop, None].astype(mx.float32)
        return magnitude / norms * (values + added) - values

    def _products(self, change: Change, start: int, stop: int) -> Iterator[mx.array]:
        plain = change.change.folded()
        a, b = plain.a, plain.b
        if change.of_rows:
            yield a[start:stop] @ b
            return
        if a.ndim == 2 and b.ndim == 2:
            yield b[:, start:stop].T @ a.T
            return
        n_rows = matrix_shape(self.shape)[0] // self.shape[0]  # of an expert, or a head
        while start < stop:
            i, at = divmod(start, n_rows)
            n = min(stop - start, n_rows - at)
            yield b[i % b.shape[0], :, at : at + n].T @ a[i % a.shape[0]].T
            start += n
