"""What measuring a model's weights needs and finds: `auto`, and rounding by the inputs' moments."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxkv.checkpoint.quantization import Format
from mlxkv.checkpoint.tensor_names import tower_of
from mlxkv.errors import UsageError
from mlxkv.nn.model import CausalLM

from ..plan import ITEM_BYTES, ConvertOptions, ConvertPlan, PlannedTensor, make_plan
from ..quantization import has_biases
from ..sources import Source
from .allocate import Choice, allocate
from .reference import Recorder, dense_model, recording, tokenizer_of
from .rounding import Moments, moments_of, rounded
from .sensitivity import Trials, Unit, error_ratios, trial_values, units_of
from .texts import CALIBRATION, read_text, windows

TRIAL_WINDOWS = 8, 64
"""Windows that each trial runs, and tokens of each: there are as many trials as units."""
MOMENT_WINDOWS = 16, 256
"""Windows that moments are summed over, and tokens of each."""
MOMENT_BYTES = 1 << 30
"""Moments that are kept at a time; each further part of the model is another pass."""

Step = Callable[[str, int, int], None]
"""Called with what is done ("measuring"), how many steps are done, and of how many."""


def silent(what: str, done: int, total: int) -> None:
    """Say nothing."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What `auto` found.

    Attributes:
        formats: of each weight by name.
        sensitivity: unit -> divergence in nats with it alone at 3 bits.
        n_passes: forward passes, each over `n_tokens`.
        n_tokens: of the text of a pass.
        seconds: that measuring took.
    """

    formats: Mapping[str, Format]
    sensitivity: Mapping[str, float]
    n_passes: int
    n_tokens: int
    seconds: float

    def text(self) -> str:
        """On one line."""
        return (
            f"measured {len(self.sensitivity)} units in {self.n_passes} forward passes over "
            f"{self.n_tokens:,} tokens, {self.seconds:.0f} s"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "formats": {name: each.to_dict() for name, each in self.formats.items()},
            "sensitivity": dict(self.sensitivity),
            "n_passes": self.n_passes,
            "n_tokens": self.n_tokens,
            "seconds": self.seconds,
        }


class Calibration:
    """A source's model and a text to run it on.

    Args:
        source: opened with `text_only`.
        file: a text of the user's; None for the one that is shipped.
        step: told about progress.

    Raises:
        UsageError: the file cannot be read or is too short.
        TokenizerError: the source has no tokenizer.
    """

    def __init__(self, source: Source, file: Path | None = None, step: Step = silent):
        text, where = read_text(file or CALIBRATION), str(file or "the calibration text")
        self.source, self._step = source, step
        tokenizer = tokenizer_of(source)
        self._many = windows(tokenizer, text, *MOMENT_WINDOWS, where)
        self._few = windows(tokenizer, text, *TRIAL_WINDOWS, where)
        self._model: CausalLM | None = None

    @property
    def model(self) -> CausalLM:
        """The source's, loaded when it is needed first."""
        if self._model is None:
            self._model = dense_model(self.source)
        return self._model

    def choose(
        self, options: ConvertOptions, target_bits: float, group_size: int | None
    ) -> Measured:
        """Formats under which the whole output has at most so many bits per weight.

        Raises:
            UsageError: no formats are that small.
        """
        began_s = time.monotonic()
        plan = make_plan(self.source, options)
        planned = {t.name: t for t in plan.tensors if t.quantization is not None}
        units = units_of({name: t.shape for name, t in planned.items()})
        trials = Trials(self.model, self._few)
        diagonals = self._diagonals(list(planned))
        choices, sensitivity = {}, {}
        for i, unit in enumerate(units):
            self._step("measuring", i, len(units))
            kl, found = self._choices(unit, trials, diagonals, group_size, planned[unit.name])
            choices[unit.name], sensitivity[unit.name] = found, kl
        chosen = _within(plan, units, choices, target_bits)
        formats = {name: chosen[unit.name].format for unit in units for name in unit.weights}
        seconds = time.monotonic() - began_s
        return Measured(formats, sensitivity, trials.n_passes, self._few.size, seconds)

    def rounding(self, plan: ConvertPlan) -> Rounding:
        """What rounds the weights of a plan."""
        return Rounding(self, plan)

    def _choices(
        self,
        unit: Unit,
        trials: Trials,
        diagonals: Mapping[str, np.ndarray],
        group_size: int | None,
        planned: PlannedTensor,
    ) -> tuple[float, list[Choice]]:
        """A unit's divergence in its trial, and what each format would make of it."""
        modules = dict(self.model.weights_root().named_modules())
        values = {name: modules[name.removesuffix(".weight")]["weight"] for name in unit.weights}
        kl = trials.divergence({name: trial_values(value) for name, value in values.items()})
        formats, dtype = unit.formats(group_size), getattr(mx, planned.dtype)
        sums = dict.fromkeys(formats, 0.0)
        for name, value in values.items():
            share = value.size / unit.n_values
            ratios = error_ratios(value, diagonals.get(name), formats, dtype)
            for each, ratio in ratios.items():
                sums[each] += ratio * share
        size = ITEM_BYTES[planned.dtype]
        return kl, [Choice(f, unit.nbytes(f, size), kl * ratio) for f, ratio in sums.items()]

    def _diagonals(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Second moments of each weight's inputs, `[in]`, of those whose inputs are seen."""
        recorders = self.recorded(names, full=False)
        return {name: np.array(mean) for name, mean in recorders.items()}

    def recorded(self, names: Sequence[str], *, full: bool) -> dict[str, mx.array]:
        """Weight -> mean of x x^T of its inputs, or of the diagonal, where the inputs are seen."""
        model, root = self.model, self.model.weights_root()
        modules = dict(root.named_modules())
        units = units_of(dict.fromkeys(names, (1, 1)))
        paths = {unit.weights: unit.name.removesuffix(".weight") for unit in units}
        seen = {n: path for n, path in paths.items() if isinstance(modules.get(path), nn.Linear)}
        head, last = _head_of(names, self.source), Recorder(nn.Identity(), full)
        with recording(model, list(seen.values()), full) as recorders:
            for i in range(len(self._many)):
                self._step("summing moments", i, len(self._many))
                hidden = model.forward(model.embedded(self._many[i : i + 1]), None)
                mx.eval(hidden)
                if head is not None:
                    last.add(hidden)
        found = {n: recorders[path].mean() for them, path in seen.items() for n in them}
        if head is not None:
            found[head] = last.mean()
        return {name: mean for name, mean in found.items() if mean is not None}


class Rounding:
    """Rounds the weights of a plan by the moments of their inputs, in the plan's order.

    Moments of a part of the model are kept at a time; the next part costs another pass.
    """

    def __init__(self, calibration: Calibration, plan: ConvertPlan):
        self._calibration = calibration
        shapes = {
            tensor.name: tensor.shape
            for tensor in plan.tensors
            if tensor.quantization is not None
            and has_biases(tensor.quantization)
            and tensor.action in ("quantize", "requantize")
            and not tower_of(tensor.name)
        }
        self._parts = {n: part for part in parts_of(shapes, MOMENT_BYTES) for n in part}
        self._found: dict[str, mx.array] = {}
        self._last: tuple[mx.array, Moments] | None = None

    def __call__(self, planned: PlannedTensor, values: mx.array) -> tuple[mx.array, ...]:
        """Rows `[n, in]` of a tensor in its affine format, as `mx.quantize` gives them."""
        assert planned.quantization is not None
        moments = self._moments(planned.name) if planned.name in self._parts else None
        return rounded(values, planned.quantization, values.dtype, moments)

    def _moments(self, name: str) -> Moments | None:
        part = self._parts[name]
        if not self._found.keys() & set(part):
            self._found, self._last = {}, None
            self._found = self._calibration.recorded(part, full=True)
        matrix = self._found.get(name)
        if matrix is None:
            return None
        if self._last is None or self._last[0] is not matrix:
            self._last = matrix, moments_of(np.array(matrix))
        return self._last[1]


def parts_of(shapes: Mapping[str, tuple[int, ...]], most_bytes: int) -> list[list[str]]:
    """Weights in parts whose inputs' moments, float32 `[in, in]`, take so many bytes at most.

    Weights of one unit, which share moments, count and stay together.
    """
    parts: list[list[str]] = [[]]
    size = 0
    for unit in units_of(shapes):
        more = 4 * unit.columns**2
        if parts[-1] and size + more > most_bytes:
            parts.append([])
            size = 0
        parts[-1] += unit.weights
        size += more
    return parts


def _within(
    plan: ConvertPlan,
    units: Sequence[Unit],
    choices: Mapping[str, Sequence[Choice]],
    target_bits: float,
) -> dict[str, Choice]:
    """The units' choices that keep the whole output within so many bits per weight.

    Raises:
        UsageError: none do.
    """
    measured = {name for unit in units for name in unit.weights}
    others = sum(tensor.nbytes for tensor in plan.tensors if tensor.name not in measured)
    budget = int(target_bits * plan.n_parameters / 8) - others
    chosen = allocate(choices, budget)
    if chosen is None:
        least = others + sum(min(each.n_bytes for each in found) for found in choices.values())
        raise UsageError(
            f"{target_bits:g} is too few bits per weight: this model has "
            f"{8 * least / plan.n_parameters:.2f} at least",
            field="target_bits",
        )
    return chosen


def _head_of(names: Sequence[str], source: Source) -> str | None:
    """The weight among these that makes the logits."""
    head = "model.embed_tokens.weight" if source.tied else "lm_head.weight"
    return head if head in names else None
