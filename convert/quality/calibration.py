"""What measuring a model's weights needs and finds: `auto`, and rounding by the inputs' moments."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxkv.checkpoint.quantization import Format
from mlxkv.checkpoint.tensor_names import tower_of
from mlxkv.errors import UsageError
from mlxkv.nn.model import CausalLM

from ..plan import ITEM_BYTES, ConvertPlan, PlannedTensor
from ..quantization import has_biases, is_next_token, role_of
from ..sources import Source
from .allocate import Choice, allocate
from .reference import Recorder, dense_model, recording, tokenizer_of
from .rounding import DAMPING, Moments, moments_of, rounded
from .sensitivity import Trials, Unit, error_ratios, trial_groups, trial_values, units_of
from .texts import CALIBRATION, read_text, windows

TRIAL_WINDOWS = 8, 64
"""Windows that each trial runs, and tokens of each: there are as many trials as units."""
MOST_TRIALS = 48
"""Trials of a model with more units are of several at once."""
MOMENT_LENGTH = 256
"""Tokens of the windows that moments are summed over."""
MOMENT_WINDOWS = 8, 64
"""How many there are, at least and at most; between these, tokens for `PER_COLUMN` a column."""
PER_COLUMN = 1.5
MOMENT_BYTES = 1 << 30
"""Moments that are kept at a time; each further part of the model is another pass."""
LOOKED_UP = 0.1
"""Damping for an embedding that is the head, whose rows are inputs as well (`rounding.DAMPING`)."""

Step = Callable[[str, int, int], None]
"""Called with what is done ("measuring"), how many steps are done, and of how many."""


def silent(what: str, done: int, total: int) -> None:
    """Say nothing."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What measuring a model's weights found.

    Attributes:
        units: what gets one format each.
        choices: unit -> the formats it could have, and what each adds to the divergence.
        sensitivity: unit -> divergence in nats with it alone at 3 bits.
        n_passes: forward passes, each over `n_tokens`.
        n_tokens: of the text of a pass.
        seconds: that measuring took.
    """

    units: Sequence[Unit]
    choices: Mapping[str, Sequence[Choice]]
    sensitivity: Mapping[str, float]
    n_passes: int
    n_tokens: int
    seconds: float

    def formats(self, plan: ConvertPlan, target_bits: float) -> dict[str, Format]:
        """Weight -> format, under which the whole output has at most so many bits per weight.

        Args:
            plan: of the same weights, in any formats.
            target_bits: scales and what is not quantized included.

        Raises:
            UsageError: no formats are that small.
        """
        names = {name for unit in self.units for name in unit.weights}
        others = sum(tensor.nbytes for tensor in plan.tensors if tensor.name not in names)
        # mlx-vlm's Gemma 3 has a tied embedding twice.
        copies = Counter(tensor.name for tensor in plan.tensors)
        choices = {
            unit: [replace(each, n_bytes=copies[unit] * each.n_bytes) for each in found]
            for unit, found in self.choices.items()
        }
        chosen = allocate(choices, int(target_bits * plan.n_parameters / 8) - others)
        if chosen is None:
            least = others + sum(min(c.n_bytes for c in each) for each in choices.values())
            raise UsageError(
                f"{target_bits:g} is too few bits per weight: this model has "
                f"{8 * least / plan.n_parameters:.2f} at least",
                field="target_bits",
            )
        return {name: chosen[unit.name].format for unit in self.units for name in unit.weights}

    def text(self) -> str:
        """On one line."""
        return (
            f"measured {len(self.sensitivity)} units in {self.n_passes} forward passes over "
            f"{self.n_tokens:,} tokens, {self.seconds:.0f} s"
        )


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

    trials: type[Trials] = Trials

    def __init__(self, source: Source, file: Path | None = None, step: Step = silent):
        text, where = read_text(file or CALIBRATION), str(file or "the calibration text")
        self.source, self._step = source, step
        tokenizer = tokenizer_of(source)
        self._many = windows(tokenizer, text, _n_windows(source), MOMENT_LENGTH, where)
        self._few = windows(tokenizer, text, *TRIAL_WINDOWS, where)
        self._model: CausalLM | None = None

    @property
    def model(self) -> CausalLM:
        """The source's, loaded when it is needed first."""
        if self._model is None:
            self._model = dense_model(self.source)
        return self._model

    def measure(self, plan: ConvertPlan, group_size: int | None, target_bits: float) -> Measured:
        """What each format would do to the weights that a plan quantizes.

        Args:
            plan: of the source.
            group_size: of all formats; None for any.
            target_bits: for which it will be asked.

        Raises:
            UsageError: no formats are that small; nothing was measured.
        """
        began_s = time.monotonic()
        planned = self._measurable(plan)
        units = units_of({name: t.shape for name, t in planned.items()})
        sizes = {
            unit.name: [
                Choice(each, unit.nbytes(each, ITEM_BYTES[planned[unit.name].dtype]), 0.0)
                for each in unit.formats(group_size)
            ]
            for unit in units
        }
        Measured(units, sizes, {}, 0, 0, 0.0).formats(plan, target_bits)
        trials = self.trials(self.model, self._few)
        means = self.recorded(list(planned), full=False)
        diagonals = {name: np.array(mean) for name, mean in means.items()}
        choices, sensitivity = {}, {}
        groups = trial_groups(units, MOST_TRIALS)
        for i, group in enumerate(groups):
            self._step("measuring", i, len(groups))
            values = {name: self._value(name) for unit in group for name in unit.weights}
            tried = {name: trial_values(value) for name, value in values.items()}
            kl = trials.divergence(tried) / len(group)
            for unit in group:
                sensitivity[unit.name], dtype = kl, planned[unit.name].dtype
                ratios = _ratios(unit, sizes[unit.name], values, diagonals, getattr(mx, dtype))
                choices[unit.name] = [
                    replace(each, kl=kl * ratio)
                    for each, ratio in zip(sizes[unit.name], ratios, strict=True)
                ]
        seconds = time.monotonic() - began_s
        return Measured(units, choices, sensitivity, trials.n_passes, self._few.size, seconds)

    def _measurable(self, plan: ConvertPlan) -> dict[str, PlannedTensor]:
        """By name, what a plan quantizes of the text model, without next-token layers."""
        n_layers = self.source.parsed.num_hidden_layers
        return {
            t.name: t
            for t in plan.tensors
            if t.quantization and not tower_of(t.name) and not is_next_token(t.name, n_layers)
        }

    def rounding(self, plan: ConvertPlan) -> Rounding:
        """What rounds the weights of a plan."""
        return Rounding(self, plan)

    def _value(self, name: str) -> mx.array:
        """A weight of the source's model."""
        modules = dict(self.model.weights_root().named_modules())
        return modules[name.removesuffix(".weight")]["weight"]

    def recorded(self, names: Sequence[str], *, full: bool) -> dict[str, mx.array]:
        """Weight -> mean of x x^T of its inputs, where these are seen; or, on fewer windows, of the
        diagonal alone."""
        model, root = self.model, self.model.weights_root()
        text = self._many if full else self._few
        modules = dict(root.named_modules())
        units = units_of(dict.fromkeys(names, (1, 1)))
        paths = {unit.weights: unit.name.removesuffix(".weight") for unit in units}
        seen = {n: path for n, path in paths.items() if isinstance(modules.get(path), nn.Linear)}
        head, last = _head_of(names, self.source), Recorder(nn.Identity(), full)
        with recording(model, list(seen.values()), full) as recorders:
            for i, tokens in enumerate(text):
                self._step("summing moments", i, len(text))
                hidden = model.forward(model.embedded(tokens[None]), None)
                mx.eval(hidden)
                if head is not None:
                    last.add(hidden)
        found = {n: recorders[path].mean() for them, path in seen.items() for n in them}
        if head is not None:
            found[head] = last.mean()
        return {name: mean for name, mean in found.items() if mean is not None}


def _ratios(
    unit: Unit,
    choices: Sequence[Choice],
    values: Mapping[str, mx.array],
    diagonals: Mapping[str, np.ndarray],
    dtype: mx.Dtype,
) -> list[float]:
    """What each choice would make of a unit's divergence in its trial."""
    sums = [0.0] * len(choices)
    for name in unit.weights:
        share = values[name].size / unit.n_values
        formats = [each.format for each in choices]
        ratios = error_ratios(values[name], diagonals.get(name), formats, dtype)
        sums = [total + share * ratios[each] for total, each in zip(sums, formats, strict=True)]
    return sums


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
        self._part: list[str] = []
        self._found: dict[str, mx.array] = {}
        self._last: tuple[mx.array, Moments] | None = None

    def __call__(self, planned: PlannedTensor, values: mx.array) -> tuple[mx.array, ...]:
        """Rows `[n, in]` of a tensor in its affine format, as `mx.quantize` gives them."""
        target = planned.quantization
        assert target is not None
        moments = self._moments(planned.name) if planned.name in self._parts else None
        if moments is None and role_of(planned.name) != "embedding":
            # Scales that lessen the error of a projection's values alone made models worse.
            return tuple(mx.quantize(values, group_size=target.group_size, bits=target.bits))
        return rounded(values, target, values.dtype, moments)

    def _moments(self, name: str) -> Moments | None:
        if self._parts[name] is not self._part:
            self._part, self._found, self._last = self._parts[name], {}, None
            self._found = self._calibration.recorded(self._part, full=True)
        matrix = self._found.get(name)
        if matrix is None:
            return None
        if self._last is None or self._last[0] is not matrix:
            is_looked_up = name == "model.embed_tokens.weight"
            damping = LOOKED_UP if is_looked_up else DAMPING
            self._last = matrix, moments_of(np.array(matrix), damping)
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


def _n_windows(source: Source) -> int:
    """Windows for moments that have full rank in the widest projection."""
    shapes = [t.shape for t in source.tensors.values() if "embed" not in t.name]
    columns = max((shape[-1] for shape in shapes if len(shape) > 1), default=1)
    least, most = MOMENT_WINDOWS
    return min(most, max(least, math.ceil(PER_COLUMN * columns / MOMENT_LENGTH)))


def _head_of(names: Sequence[str], source: Source) -> str | None:
    """The weight among these that makes the logits."""
    head = "model.embed_tokens.weight" if source.tied else "lm_head.weight"
    return head if head in names else None
