"""How much the model's divergence grows when a weight is quantized, measured on text.

A unit is what gets one format: a weight, or those that are fused where they have one format
(queries, keys and values; gate and up). For each, the model runs once with the unit at 3 bits, or
with some neighbours of a kind, where there are many.

Other formats are not tried: divergence is quadratic in a small error, so theirs is the measured one
times the ratio of the errors of the unit's results, which a sample of its rows and the second
moments of its inputs give.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxkv.checkpoint.quantization import MODES, Format
from mlxkv.nn.kernels import Settled
from mlxkv.nn.model import CausalLM

from ..quantization import fits
from .compare import divergence, log_softmax
from .rounding import fit_groups, nearest

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = MODES["affine"][1]
TRIAL_BITS = 3
SAMPLE_ROWS = 48
"""Of a weight, to compare the errors of formats on."""
KEPT_BYTES = 256 << 20
"""The source's distributions at the positions that are compared, float32 `[n, V]`."""
MOST_POSITIONS = 512
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_SIBLING = {name: names[0] for names in _FUSED for name in names}


@dataclass(frozen=True, slots=True)
class Unit:
    """Weights with one format.

    Attributes:
        name: of the first.
        weights: names of all.
        n_values: of all.
        columns: that each of them has.
    """

    name: str
    weights: tuple[str, ...]
    n_values: int
    columns: int

    def formats(self, group_size: int | None = None) -> list[Format]:
        """Those that it could have."""
        groups = GROUPS if group_size is None else (group_size,)
        every = (Format("affine", bits, group) for bits in BITS for group in groups)
        return [each for each in every if fits(each, (1, self.columns))]

    def nbytes(self, target: Format, scale_bytes: int) -> int:
        """In an affine format, whose scales and biases have so many bytes each."""
        n_groups = self.n_values // target.group_size
        return self.n_values * target.bits // 8 + 2 * n_groups * scale_bytes


def units_of(shapes: Mapping[str, tuple[int, ...]]) -> list[Unit]:
    """The units of these weights, in their order."""
    groups: dict[str, list[str]] = {}
    for name in shapes:
        parent, _, own = name.removesuffix(".weight").rpartition(".")
        groups.setdefault(f"{parent}.{_SIBLING.get(own, own)}", []).append(name)
    return [
        Unit(
            them[0],
            tuple(them),
            sum(int(np.prod(shapes[name])) for name in them),
            shapes[them[0]][-1],
        )
        for them in groups.values()
    ]


def trial_groups(units: Sequence[Unit], most: int) -> list[list[Unit]]:
    """Units that are tried together: alone if there are at most so many, else neighbours of a kind.

    What a trial measures is divided equally, for neighbouring layers are much alike.
    """
    kinds: dict[str, list[Unit]] = {}
    for unit in units:
        kinds.setdefault(re.sub(r"\blayers\.\d+\.", "layers.*.", unit.name), []).append(unit)
    n = -(-len(units) // most)
    return [them[i : i + n] for them in kinds.values() for i in range(0, len(them), n)]


class Trials:
    """The source's distributions on a text, and runs with one unit quantized.

    Attributes:
        n_passes: forward passes over the text so far.
    """

    def __init__(self, model: CausalLM, tokens: mx.array):
        self._model, self._tokens = model, tokens
        self._modules = dict(model.weights_root().named_modules())
        self.n_passes = 0
        self._every = 1
        hidden = self._hidden()
        n_vocab = model.logits(hidden[:1, :1]).shape[-1]
        n_kept = max(1, min(MOST_POSITIONS, KEPT_BYTES // (4 * n_vocab)))
        self._every = -(-tokens.size // n_kept)
        self._kept = self._log_p(hidden)

    def _hidden(self) -> mx.array:
        """Final hidden states `[B, L, E]`."""
        self.n_passes += 1
        hidden = self._model.forward(self._model.embedded(self._tokens), None)
        mx.eval(hidden)
        return hidden

    def _log_p(self, hidden: mx.array) -> mx.array:
        rows = hidden.reshape(-1, hidden.shape[-1])[:: self._every]
        log_p = log_softmax(self._model.logits(rows[None])[0])
        mx.eval(log_p)
        return log_p

    def divergence(self, weights: Mapping[str, mx.array]) -> float:
        """Mean KL in nats of the model with these weights in the places of its own."""
        before = {name: self._weight(name) for name in weights}
        try:
            self._set(weights)
            return float(divergence(self._kept, self._log_p(self._hidden())).mean())
        finally:
            self._set(before)

    def _weight(self, name: str) -> mx.array:
        return self._modules[name.removesuffix(".weight")]["weight"]

    def _set(self, weights: Mapping[str, mx.array]) -> None:
        for name, value in weights.items():
            path = name.removesuffix(".weight")
            self._modules[path]["weight"] = value
            self._settle(path)

    def _settle(self, path: str) -> None:
        """Have a module and those around it take the new weight for the kernels, inner first."""
        while path:
            module = self._modules.get(path)
            if isinstance(module, Settled):
                module.settle()
            path = path.rpartition(".")[0]


def trial_values(value: mx.array) -> mx.array:
    """A weight as its trial has it: at 3 bits, in the largest group that divides its rows."""
    group = max(group for group in GROUPS if value.shape[-1] % group == 0)
    arrays = mx.quantize(value, group_size=group, bits=TRIAL_BITS)
    found = mx.dequantize(*arrays, group_size=group, bits=TRIAL_BITS, dtype=value.dtype)
    mx.eval(found)
    return found


def error_ratios(
    value: mx.array, diagonal: np.ndarray | None, formats: Iterable[Format], dtype: mx.Dtype
) -> dict[Format, float]:
    """The squared error of a weight's results in each format, over that of its trial.

    Args:
        value: the weight, its last axis the inputs.
        diagonal: second moments of the inputs, `[in]`; None if all count alike.
        formats: affine ones.
        dtype: of scales and biases.
    """
    rows = value.reshape(-1, value.shape[-1])
    step = max(1, len(rows) // SAMPLE_ROWS)
    rows = rows[::step][:SAMPLE_ROWS].astype(mx.float32)
    weight = mx.ones(rows.shape[-1]) if diagonal is None else mx.array(diagonal)
    trial = _error(trial_values(rows), rows, weight)
    return {
        each: _error(_fitted(rows, weight, each, dtype), rows, weight) / max(trial, 1e-30)
        for each in formats
    }


def _fitted(rows: mx.array, weight: mx.array, target: Format, dtype: mx.Dtype) -> mx.array:
    grouped = rows.reshape(len(rows), -1, target.group_size)
    scales, biases = fit_groups(grouped, weight, target.bits, dtype)
    codes = nearest(grouped, scales, biases, target.bits)
    return (codes * scales[..., None] + biases[..., None]).reshape(rows.shape)


def _error(found: mx.array, rows: mx.array, weight: mx.array) -> float:
    return float((mx.square(found.astype(mx.float32) - rows) * weight).sum())
