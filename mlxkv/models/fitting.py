"""Modules of the kinds that a checkpoint's weights are of, and weights that fit the modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxkv.checkpoint.quantization import Quantization
from mlxkv.errors import UnsupportedModel, WeightsError
from mlxkv.models.dtypes import is_float


def pack_modules(
    root: nn.Module, weights: Mapping[str, Any], quantization: Quantization | None, source: str
) -> None:
    """Turn the modules whose weights are packed into their quantized kind.

    Raises:
        UnsupportedModel: packed weights, and the config does not say how.
    """
    packed = {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}
    if not packed:
        return
    if quantization is None:
        raise UnsupportedModel(f"{source}: key 'quantization' is missing and weights are packed")

    def kind(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path not in packed or not hasattr(module, "to_quantized"):
            return False
        entry = quantization.at(path) or quantization.default
        if module["weight"].shape[-1] % entry.group_size:
            raise WeightsError(
                f"{source}: {path} has rows of {module['weight'].shape[-1]}, which groups of "
                f"{entry.group_size} do not divide"
            )
        return entry.to_dict()

    nn.quantize(root, class_predicate=kind)


def check_names(root: nn.Module, weights: Mapping[str, mx.array], where: Path) -> None:
    """Hold a checkpoint's names and shapes against the model's.

    Raises:
        WeightsError: lists what is missing, unknown, or of another shape.
    """
    expected = dict(tree_flatten(root.parameters()))
    missing, unknown = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing:
        raise WeightsError(f"{where}: {_listed(missing)} missing from the weights")
    if unknown:
        raise WeightsError(f"{where}: {_listed(unknown)} not known to this architecture")
    for name in sorted(expected):
        want, got = expected[name], weights[name]
        if want.shape != got.shape:
            raise WeightsError(
                f"{where}: tensor {name} has shape {list(got.shape)}; config.json makes it "
                f"{list(want.shape)}"
            )
        if want.dtype != got.dtype and not (is_float(want) and is_float(got)):
            kind = "a floating dtype" if is_float(want) else want.dtype
            raise WeightsError(f"{where}: tensor {name} is {got.dtype}; it must be {kind}")


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"
