"""One tensor per expert, as Hugging Face stores some mixtures -> one tensor of all experts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import mlx.core as mx

from mlxkv.errors import WeightsError

_EXPERT = re.compile(r"^(.*\.)experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.(\w+)$")


def expert_stacks(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Which tensors make one, from their names alone.

    Returns:
        `...switch_mlp.up_proj.weight` -> the names `...experts.N.up_proj.weight` in order.

    Raises:
        WeightsError: an expert is missing between others.
    """
    found: dict[str, dict[int, str]] = {}
    for name in names:
        if match := _EXPERT.match(name):
            prefix, number, projection, kind = match.groups()
            found.setdefault(f"{prefix}switch_mlp.{projection}.{kind}", {})[int(number)] = name
    for stack, experts in found.items():
        if set(experts) != set(range(len(experts))):
            absent = min(set(range(max(experts) + 1)) - set(experts))
            raise WeightsError(f"{stack}: expert {absent} of {max(experts) + 1} is missing")
    return {
        stack: tuple(experts[i] for i in range(len(experts))) for stack, experts in found.items()
    }


def stack_experts(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The weights with the experts of each layer in one tensor `[n_experts, out, in]`, lazily.

    Raises:
        WeightsError: an expert is missing, or of another shape than the first.
    """
    stacks = expert_stacks(weights)
    single = {name for names in stacks.values() for name in names}
    kept = {name: array for name, array in weights.items() if name not in single}
    for stack, names in stacks.items():
        parts = [weights[name] for name in names]
        for name, part in zip(names, parts, strict=True):
            if part.shape != parts[0].shape or part.dtype != parts[0].dtype:
                raise WeightsError(
                    f"{name} is {part.dtype} {list(part.shape)}; the first expert is "
                    f"{parts[0].dtype} {list(parts[0].shape)}"
                )
        kept[stack] = mx.stack(parts)
    return kept
