"""How an architecture of GGUF files becomes a Hugging Face checkpoint; `families/` has each one.

To add one, write its config function and its table of names. Keys that are not understood are
errors, so the function reads or ignores every key that llama.cpp's converter writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .file import GGUFTensor
from .metadata import Metadata

Tensors = Mapping[str, GGUFTensor]
Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows of a stored tensor make one of ours.

    A row r of ours is row `r // count * stride + offset + r % count` of the file.

    Attributes:
        shape: of our tensor.
    """

    shape: tuple[int, ...]
    offset: int
    count: int
    stride: int


@dataclass(frozen=True, slots=True)
class Order:
    """How one of our tensors lies in a tensor of the file.

    Attributes:
        shape: of ours.
        rows: the file's row of each of ours, or value of a vector; None for the same.
        heads: the columns are heads of D values, which lie as `[r, H, D]` in the file and as
            `[H, r, D]` with us; None for the same.
        is_decay: whether the file has -exp(x) of our x.
    """

    shape: tuple[int, ...]
    rows: tuple[int, ...] | None = None
    heads: tuple[int, int, int] | None = None
    is_decay: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one GGUF architecture maps.

    Attributes:
        config: makes the config.json in Hugging Face's hub style.
        layer_names: name within a block -> name within our layer. Without the last part (`weight`,
            `bias`), which then stays; or with it, and then ours is whole.
        dtype: of dequantized values without `--dtype`: bfloat16 for Gemma and others whose
            activations overflow float16; else float16, which has more digits.
        permuted: names within a block of the tensors with rows permuted per head.
        norms_plus_one: norms are stored with 1 added.
        rope_factors: whether the config has what `rope_freqs.weight` says.
        top_names: names of single tensors that only it has -> ours.
        unused: why a tensor is left out, with the config; "" where it is not.
        parts: the tensors of ours that one of the file holds, by our names.
        orders: the same of tensors that are in another order, with the config.
    """

    config: Callable[[Metadata, Tensors], Config]
    layer_names: Mapping[str, str]
    dtype: str
    permuted: frozenset[str] = frozenset()
    norms_plus_one: bool = False
    rope_factors: bool = False
    top_names: Mapping[str, str] = field(default_factory=dict)
    unused: Callable[[str, Mapping[str, Any]], str] = lambda name, config: ""
    parts: Callable[[GGUFTensor], Mapping[str, Rows]] = lambda tensor: {}
    orders: Callable[[GGUFTensor, Mapping[str, Any]], Mapping[str, Order]] = lambda t, config: {}

    @property
    def scale_dtype(self) -> str:
        """The dtype that keeps a quantized tensor's float16 scales without loss.

        float32 beside bfloat16: MLX gives embeddings the dtype of their scales, and in float16 the
        residual stream of such a model overflows.
        """
        return "float16" if self.dtype == "float16" else "float32"
