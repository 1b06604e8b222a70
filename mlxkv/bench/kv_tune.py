"""Which KV format each layer should have: those that cost the least at a number of bytes.

Every layer is tried in every smaller format, the others native, and the KL divergence from native
KV is measured on a text. Layers are then quantized one by one, each time the one whose next format
costs the least KL for each byte that it frees, until the caches fit. Divergences of layers are
taken to add up, which is not exact: the KV type that was found is measured as a whole, beside
those that have one format for all layers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mlxkv
from mlxkv.base import regular
from mlxkv.base.units import human_bytes
from mlxkv.bench.kv_quality import NATIVE, Text, divergence, log_probs, share
from mlxkv.checkpoint.mlxkv_json import write_kv_type
from mlxkv.errors import OutOfMemory, UsageError
from mlxkv.kv.types import CODE_BITS, KV_TYPES, KVFormat, LayerTypes, kv_type_table, layer_types
from mlxkv.llm.llm import LLM
from mlxkv.nn.model import CausalLM
from mlxkv.terminal.console import table

CHUNK = 256
"""Tokens that are fed at a time."""
SKIPPED = 128
"""Leading tokens of the text that are not compared."""
LEAST_POSITIONS = 32

Costs = Mapping[int, Mapping[str, tuple[int, float]]]
"""Layer -> format -> (bytes, KL divergence in nats), from the largest format to the smallest."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One KV type: bytes beside native ones of 16 bits, and the mean KL from native KV in nats."""

    kv_type: str
    share: float
    kl_mean: float


@dataclass(frozen=True, slots=True)
class Tuned:
    """What `tune` found.

    Args:
        found: the KV type.
        uniform: KV types with one format for all layers, for comparison.
        layers: layer -> its format -> mean KL where it alone is in it.
        context: tokens at which bytes are counted.
        n_positions: positions compared.
    """

    found: Measured
    uniform: tuple[Measured, ...]
    layers: Mapping[int, Mapping[str, float]]
    context: int
    n_positions: int


def calibration_text(file: Path | None = None) -> str:
    """The text that formats are measured on: a file's, or this package's own modules."""
    if file is not None:
        try:
            return regular.read_text(file)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file}: cannot be read as text ({error})") from None
    folder = Path(mlxkv.__file__).parent / "generation"
    return "\n".join(regular.read_text(module) for module in sorted(folder.glob("*.py")))


def tune(
    llm: LLM,
    budget: float,
    context: int | None = None,
    text: str | None = None,
    n_positions: int = 256,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tuned:
    """Find the formats of a model's layers.

    Args:
        llm: the model.
        budget: bytes of the caches, as a part of those of native 16-bit ones.
        context: tokens at which bytes are counted: windows weigh less in a longer one. None for
            the model's.
        text: to measure on; None for `calibration_text`.
        n_positions: of the text that are compared.
        on_progress: called with (done, all) KV types that were measured.

    Raises:
        UsageError: a budget that no formats meet, too few positions, or a text that is too short.
        OutOfMemory: more positions than native KV's distributions have room for.
    """
    context = llm.context if context is None else context
    _check(llm.model, budget, context)
    tried = list(_tried(llm.model, context))
    n_all = sum(name != NATIVE for _, name, _ in tried) + len(KV_TYPES)
    text = calibration_text() if text is None else text
    measured = _Measured(llm.model, _text(llm, text, n_positions), n_all, on_progress)
    costs: dict[int, dict[str, tuple[int, float]]] = {}
    for layer, name, n_bytes in tried:
        kl = 0.0 if name == NATIVE else measured.kl(f"{NATIVE},{layer}={name}")
        costs.setdefault(layer, {})[name] = n_bytes, kl
    sixteen_bits = sum(of[NATIVE][0] for of in costs.values())
    found = by_layer(choose(costs, int(budget * sixteen_bits)))
    found, *uniform = (
        Measured(t, share(llm.model, t, context), measured.kl(t)) for t in (found, *KV_TYPES[1:])
    )
    layers = {layer: {name: kl for name, (_, kl) in of.items()} for layer, of in costs.items()}
    return Tuned(found, tuple(uniform), layers, context, measured.n_positions)


def _check(model: CausalLM, budget: float, context: int) -> None:
    if context < 1:
        raise UsageError(f"must be at least 1; got {context}", field="context")
    if all(spec is None or spec.opaque for spec in model.cache_specs()):
        raise UsageError("this model keeps a state instead of KV, which has no formats")
    least = share(model, KV_TYPES[-1], context)
    if not least <= budget <= 1:
        raise UsageError(
            f"must be {least:.3f} ({KV_TYPES[-1]}) to 1 ({NATIVE}); got {budget:g}", field="budget"
        )


def choose(costs: Costs, most_bytes: int) -> dict[int, str]:
    """Layer -> format, of at most so many bytes in all, with a small sum of divergences.

    Greedy: the step to a smaller format that costs the least KL for each byte, until all fits; then
    back to larger formats where they still fit, those that gain the most first.
    """
    chosen = {layer: next(iter(of)) for layer, of in costs.items()}

    def steps(*, down: bool) -> Iterator[tuple[float, int, int, str]]:
        """(KL a byte, bytes, layer, format) of each change to a smaller or larger format."""
        for layer, of in costs.items():
            n_now, kl_now = of[chosen[layer]]
            for name, (n_bytes, kl) in of.items():
                if n_bytes != n_now and (n_bytes < n_now) is down:
                    yield (kl - kl_now) / (n_now - n_bytes), n_bytes - n_now, layer, name

    while _bytes_of(costs, chosen) > most_bytes:
        _, _, layer, name = min(steps(down=True))
        chosen[layer] = name
    while True:
        room = most_bytes - _bytes_of(costs, chosen)
        fitting = [step for step in steps(down=False) if step[1] <= room and step[0] > 0]
        if not fitting:
            return chosen
        _, _, layer, name = max(fitting)
        chosen[layer] = name


def by_layer(chosen: Mapping[int, str]) -> str:
    """The KV type of such formats: the commonest for all layers, the others by layer."""
    default = Counter(chosen.values()).most_common(1)[0][0]
    others = tuple((i, name) for i, name in sorted(chosen.items()) if name != default)
    return str(layer_types(str(LayerTypes(default, others))))


def _bytes_of(costs: Costs, chosen: Mapping[int, str]) -> int:
    return sum(costs[layer][name][0] for layer, name in chosen.items())


def _tried(model: CausalLM, context: int) -> Iterator[tuple[int, str, int]]:
    """(layer, format, bytes) of each layer with KV in each format that is smaller than the last.

    A latent layer takes the same bytes in `q8` and `k8v4`.
    """
    for layer, spec in enumerate(model.cache_specs()):
        if spec is None or spec.opaque:
            continue
        before = None
        for name in CODE_BITS:
            n_bytes = spec.nbytes(context, KVFormat(name, 2))
            if n_bytes != before:
                yield layer, name, n_bytes
            before = n_bytes


def _text(llm: LLM, text: str, n_positions: int) -> Text:
    if n_positions < LEAST_POSITIONS:
        raise UsageError(
            f"must be at least {LEAST_POSITIONS}; got {n_positions}", field="positions"
        )
    tokens = llm.tokenizer.encode(text)[: min(SKIPPED + n_positions + 1, llm.context)]
    if len(tokens) < SKIPPED + LEAST_POSITIONS + 1:
        raise UsageError(
            f"the text has {len(tokens):,} tokens, of which {SKIPPED:,} are not compared; "
            f"{SKIPPED + LEAST_POSITIONS + 1:,} are needed"
        )
    n_bytes = 4 * (len(tokens) - SKIPPED - 1) * llm.config.vocab_size
    room = max(0, llm.budget.limit_bytes - llm.budget.used_bytes)
    if n_bytes > room:
        raise OutOfMemory(
            f"native KV's distributions take {human_bytes(n_bytes)}, and the memory limit leaves "
            f"{human_bytes(room)}: compare fewer positions"
        )
    return Text(tokens, SKIPPED, CHUNK)


def write(model_dir: Path, tuned: Tuned) -> Path:
    """Set what was found in the model's mlxkv.json; the file."""
    return write_kv_type(model_dir, tuned.found.kv_type)


def to_dict(tuned: Tuned) -> dict[str, Any]:
    """What was found, as JSON has it; `kv_type` is for `mlxkv.json`."""
    return {"kv_type": kv_type_table(tuned.found.kv_type), **asdict(tuned)}


def to_text(tuned: Tuned) -> str:
    """What was found, beside formats for all layers."""
    setting = json.dumps({"kv_type": kv_type_table(tuned.found.kv_type)})
    rows = [
        (name, f"{of.share:.3f}", f"{of.kl_mean:.2e}")
        for name, of in (*((of.kv_type, of) for of in tuned.uniform), ("found", tuned.found))
    ]
    header = "KV TYPE", "BYTES OF 16-BIT KV", "MEAN KL"
    listed = table(header, rows, right=header[1:])
    where = f"bytes at {tuned.context:,} tokens, KL in nats at {tuned.n_positions:,} positions"
    return f"{setting}\n\n{listed}\n\n{where}"


class _Measured:
    """Native KV's distributions, in memory: 4 bytes a position and token of the vocabulary."""

    def __init__(
        self,
        model: CausalLM,
        text: Text,
        n_all: int,
        on_progress: Callable[[int, int], None] | None,
    ):
        self._model, self._text = model, text
        self._native = [p.astype(np.float32) for p in log_probs(model, text, NATIVE)]
        self._n_all, self._n_done, self._on_progress = n_all, 0, on_progress

    @property
    def n_positions(self) -> int:
        return len(self._native)

    def kl(self, kv_type: str) -> float:
        """The mean divergence of a KV type."""
        others = log_probs(self._model, self._text, kv_type)
        pairs = zip(self._native, others, strict=True)
        found = float(np.mean([divergence(p.astype(np.float64), q) for p, q in pairs]))
        self._n_done += 1
        if self._on_progress is not None:
            self._on_progress(self._n_done, self._n_all)
        return found
