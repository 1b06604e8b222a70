"""Tensors of latent attention (MLA) -> our names, which are mlx-lm's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import mlx.core as mx

from mlxkv.checkpoint import tensor_names
from mlxkv.checkpoint.expert_stacks import stack_experts
from mlxkv.errors import WeightsError


class Sizes(Protocol):
    """What a config says of its heads and layers."""

    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def next_token(self) -> object | None: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def qk_nope_head_dim(self) -> int: ...
    @property
    def v_head_dim(self) -> int: ...
    @property
    def kv_lora_rank(self) -> int: ...


def latent_names(
    weights: Mapping[str, mx.array], config: Sizes
) -> tuple[dict[str, mx.array], list[str]]:
    """Hugging Face names -> ours, which are mlx-lm's: experts stacked, `kv_b_proj` in its halves.

    Returns:
        The weights, and the names left out: rotary frequencies and layers that the config does not
        have.

    Raises:
        WeightsError: a `kv_b_proj` of another shape than the config says.
    """
    n_layers = config.num_hidden_layers + (config.next_token is not None)
    kept, skipped = tensor_names.without_extra_layers(weights, n_layers)
    kept = stack_experts(kept)
    for name in [name for name in kept if name.endswith(".self_attn.kv_b_proj.weight")]:
        module = name.removesuffix(".weight")
        kinds = [kind for kind in _KINDS if f"{module}.{kind}" in kept]
        parts = {kind: kept.pop(f"{module}.{kind}") for kind in kinds}
        attention = module.removesuffix("kv_b_proj")
        for part, array in _halves(parts, config, module).items():
            kept[attention + part] = array
    return kept, skipped


_KINDS = ("weight", "scales", "biases")


def _halves(parts: dict[str, mx.array], config: Sizes, module: str) -> dict[str, mx.array]:
    """`kv_b_proj`, whose rows are each head's keys and then values, as two modules.

    The values' rows stay packed as they are. The keys' part is transposed, which packed groups
    cannot be: it is unpacked, without another rounding.
    """
    H, D = config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim
    for kind, array in parts.items():
        if array.ndim != 2 or array.shape[0] != H * D:
            raise WeightsError(f"{module}.{kind} is {list(array.shape)}; it must have {H * D} rows")
    heads = {kind: array.reshape(H, D, -1) for kind, array in parts.items()}
    keys = {kind: array[:, : config.qk_nope_head_dim] for kind, array in heads.items()}
    values = {kind: array[:, config.qk_nope_head_dim :] for kind, array in heads.items()}
    found = {f"unembed_out.{kind}": mx.contiguous(array) for kind, array in values.items()}
    dense = _unpacked(keys, config.kv_lora_rank, module) if "scales" in keys else keys["weight"]
    return {**found, "embed_q.weight": mx.contiguous(dense.swapaxes(-1, -2))}


def _unpacked(parts: dict[str, mx.array], columns: int, module: str) -> mx.array:
    """The values of packed rows of `columns`; how they are packed follows from the shapes."""
    weight, scales, biases = parts["weight"], parts["scales"], parts.get("biases")
    bits, group_size = weight.shape[-1] * 32 // columns, columns // scales.shape[-1]
    modes = {(4, 32): "mxfp4", (8, 32): "mxfp8", (4, 16): "nvfp4"}
    mode = "affine" if biases is not None else modes.get((bits, group_size))
    if mode is None:
        raise WeightsError(f"{module} is packed in a way that is not known")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(weight, scales, biases, group_size, bits, mode=mode, dtype=mx.float32)
