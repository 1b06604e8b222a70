"""Adapters (LoRA, https://arxiv.org/abs/2106.09685, and DoRA, https://arxiv.org/abs/2402.09353) as
files have them: mlx-lm's (`adapter_files`), PEFT's (`peft`), llama.cpp's (`convert.gguf.adapter`).

Nothing here knows a model: `models.adapters` finds what a target changes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlxkv.base import regular
from mlxkv.checkpoint.tensor_names import text_name
from mlxkv.checkpoint.weights import Weights, read_header
from mlxkv.errors import WeightsError

CONFIG = "adapter_config.json"
MLX_LM, PEFT = "adapters.safetensors", "adapter_model.safetensors"


_LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")
_BEHIND = ("lm_head", "model.norm")
"""Paths of what lies behind all layers."""
_PEFT = "base_model.model."
"""Before the paths in PEFT's files."""


def first_layer(paths: Iterable[str], n_layers: int) -> int:
    """The first layer of a model that changes of these paths reach: what lies before it computes
    the same. 0 where something before all layers is changed, the last where only the head is.

    Args:
        paths: of projections in a checkpoint.
        n_layers: of the model.
    """
    first = n_layers - 1
    for path in paths:
        if (match := _LAYER.search(path)) is not None:
            first = min(first, int(match[2]))
        elif not text_name(path.removeprefix(_PEFT)).startswith(_BEHIND):
            return 0
    return first


@dataclass(frozen=True, slots=True)
class Target:
    """What an adapter has for one projection: W + scale (a b)^T takes the place of its weight W.

    Args:
        key: of `a` in the file, for messages.
        a: `[in, r]`; of experts `[E, in, r]`; of an embedding `[V, r]`.
        b: `[r, out]`; of experts `[E, r, out]`.
        scale: of the product.
        magnitude: DoRA's: the norms that the rows of the sum are brought to, `[out]`; None for
            plain LoRA.
        kind: "linear"; "embedding" for the rows of tokens alone; "tied" for those and the head;
            "experts" for what PEFT's `target_parameters` made of a layer's experts, with `a`
            `[E r, in]` and `b` `[out, r E]` as they are stored.
    """

    key: str
    a: mx.array
    b: mx.array
    scale: float
    magnitude: mx.array | None = None
    kind: str = "linear"


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter, its arrays lazy.

    Args:
        source: its path, for messages.
        format: mlx-lm, PEFT or GGUF.
        method: LoRA or DoRA.
        base: the model that its config names; "" for none.
        targets: a projection's path in the checkpoint that was trained -> what is added there.
        digest: SHA-256 of its files.
    """

    source: str
    format: str
    method: str
    base: str
    targets: Mapping[str, Target]
    digest: str

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays as they are stored."""
        return sum(
            array.nbytes
            for target in self.targets.values()
            for array in (target.a, target.b, target.magnitude)
            if array is not None
        )

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur."""
        return tuple(sorted({target.b.shape[-2] for target in self.targets.values()}))


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 of files and their names."""
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with regular.open_file(file) as opened:
            while block := opened.read(1 << 20):
                found.update(block)
    return found.hexdigest()


def tensors_of(file: Path) -> dict[str, mx.array]:
    """The lazy arrays of one safetensors file, its header checked.

    Raises:
        CheckpointError: it is damaged.
    """
    return Weights(read_header(file)).arrays()


def pair(
    source: str, path: str, parts: Mapping[str, mx.array], names: tuple[str, str]
) -> tuple[mx.array, mx.array]:
    """The two factors of a target.

    Raises:
        WeightsError: one of them is missing.
    """
    first, second = (parts.get(name) for name in names)
    if first is None or second is None:
        missing = names[0] if first is None else names[1]
        raise WeightsError(f"{source}: {path}.{missing} is missing")
    return first, second
