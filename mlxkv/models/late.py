"""Weights of encoders, which a loaded model reads when the first picture or sound comes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxkv.checkpoint.weights import Weights, open_weights
from mlxkv.errors import WeightsError
from mlxkv.models import Family
from mlxkv.models.dtypes import in_dtype
from mlxkv.nn.encoders import ENCODERS, encoder_of, placeholder
from mlxkv.nn.kernels import settle
from mlxkv.nn.layers import Prepared
from mlxkv.nn.model import CausalLM

Stamps = Mapping[Path, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class EncoderWeights:
    """Where the weights of a model's encoders are, and how they are read.

    They are opened again when they are needed: MLX reads a lazy array only on the thread that
    opened its file.

    Args:
        path: the model's directory.
        family: which defines the model.
        config: the family's.
        dtype: that the model computes in.
        stamps: size and time of each file of weights when the model was loaded.
    """

    path: Path
    family: Family
    config: Any
    dtype: mx.Dtype
    stamps: Stamps

    def __call__(self, model: CausalLM, kind: str) -> None:
        """Load the encoder of one kind.

        Raises:
            CheckpointError: the files have changed or are damaged.
        """
        weights = open_weights(self.path)
        if stamps_of(weights) != self.stamps:
            raise WeightsError(
                f"{self.path}: its files changed after it was loaded: load the model again"
            )
        kept, _ = self.family.remap(weights.arrays(), self.config)
        part = {name: array for name, array in kept.items() if encoder_of(name) == kind}
        root = model.weights_root()
        if part.keys() - dict(tree_flatten(root.parameters())).keys():
            raise WeightsError(
                f"{self.path}: loading its encoder failed before: load the model again"
            )
        modules = [root[name] for name in ENCODERS[kind] if name in root]
        try:
            root.update(tree_unflatten(list(in_dtype(model, part, self.dtype).items())))
            for module in modules:
                _settle(module)
        except BaseException:  # for example, memory is short: nothing of it stays
            for module in modules:
                module.update(tree_map(placeholder, module.parameters()))
            raise


def stamps_of(weights: Weights) -> Stamps:
    """Size and time of each file."""
    stats = {file: file.stat() for file in weights.files}
    return {file: (stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()}


def _settle(encoder: nn.Module) -> None:
    """Bring the weights of one module into memory, as the loader does those of a model."""
    for array in _arrays(encoder):
        mx.eval(array)
    for module in [m for m in encoder.modules() if isinstance(m, Prepared)]:
        module.prepare()
        mx.eval(module.parameters())
    settle(encoder)
    encoder.eval()
    mx.clear_cache()


def _arrays(module: nn.Module) -> Iterator[mx.array]:
    for _, array in tree_flatten(module.parameters()):
        if isinstance(array, mx.array):
            yield array
