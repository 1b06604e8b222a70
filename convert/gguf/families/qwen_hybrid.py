"""Qwen3-Next and Qwen3.5, dense and with experts.

llama.cpp keeps the value heads of Qwen3.5's gated delta nets in another order than Hugging Face:
not those of one key head together, but the first of each key head, then the second of each. A file
of Qwen3-Next has the projections of Qwen3.5 but one; it is converted to one of those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..architecture import Architecture, Config, Order, Tensors
from ..file import GGUFTensor
from ..metadata import Metadata
from ..rope import linear_or_yarn
from .common import (
    ATTENTION_AND_MLP,
    EXPERTS,
    HEAD_NORMS,
    block_of,
    fused_experts,
    grouped,
    is_past_the_end,
    theta,
)


def hybrid_config(m: Metadata, tensors: Tensors) -> Config:
    n_experts = m.opt_int("expert_count")
    width = m.int("expert_feed_forward_length") if n_experts else None
    n_extra = m.opt_int("nextn_predict_layers") or 0
    if n_experts:
        m.ignore("feed_forward_length")
    config = grouped(m, tensors, extra_layers=n_extra, partial=True, feed_forward=width)
    m.ignore("rope.dimension_sections")  # of pictures; the positions of text are all the same
    n_values, inner = m.int("ssm.time_step_rank"), m.int("ssm.inner_size")
    if inner % n_values:
        raise m.error("ssm.inner_size", f"must be {n_values} heads; got {inner}")
    rope = linear_or_yarn(m) or {"rope_type": "default"}
    partial = config.pop("partial_rotary_factor")
    rope |= {"rope_theta": theta(m, 1e7), "partial_rotary_factor": partial}
    return {
        "architectures": [f"Qwen3_5{'Moe' if n_experts else ''}ForCausalLM"],
        "model_type": f"qwen3_5{'_moe' if n_experts else ''}",
        **config,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_parameters": rope,
        "full_attention_interval": m.int("full_attention_interval", 4),
        "linear_num_key_heads": m.int("ssm.group_count"),
        "linear_num_value_heads": n_values,
        "linear_key_head_dim": m.int("ssm.state_size"),
        "linear_value_head_dim": inner // n_values,
        "linear_conv_kernel_dim": m.int("ssm.conv_kernel"),
        **(_experts(m, n_experts) if n_experts else {}),
    }


def _experts(m: Metadata, n_experts: int) -> Config:
    if m.opt_int("expert_gating_func") not in (None, 0, 1):
        raise m.error("expert_gating_func", "must be 1, a softmax")
    m.ignore("expert_weights_norm", "expert_shared_count", "expert_weights_scale")
    return {
        "num_experts": n_experts,
        "num_experts_per_tok": m.int("expert_used_count"),
        "moe_intermediate_size": m.int("expert_feed_forward_length"),
        "shared_expert_intermediate_size": m.int("expert_shared_feed_forward_length"),
        "norm_topk_prob": True,
    }


def _orders(tensor: GGUFTensor, c: Mapping[str, Any], *, tiled: bool) -> Mapping[str, Order]:
    """Our tensors of a gated delta net that one of the file holds.

    Args:
        tensor: of the file.
        c: the config.
        tiled: whether value heads are in llama.cpp's order.
    """
    block = block_of(tensor.name)
    if block is None:
        return {}
    layer, stem = block
    at, heads, D = f"model.layers.{layer}.linear_attn.", _heads(c), c["linear_value_head_dim"]
    H, r, n_keys = *heads, 2 * c["linear_num_key_heads"] * c["linear_key_head_dim"]
    tiled = tiled and r > 1

    def wide() -> tuple[int, ...] | None:
        return (*range(n_keys), *(n_keys + row for row in _untiled(H, r, D))) if tiled else None

    match stem:
        case "attn_qkv":
            return {f"{at}in_proj_qkv.weight": Order(tensor.shape, wide())}
        case "ssm_in":  # both in one, as the first files of Qwen3-Next have them
            return _of_key_heads(tensor, at, c)
        case "attn_gate":
            rows = _untiled(H, r, D) if tiled else None
            return {f"{at}in_proj_z.weight": Order(tensor.shape, rows)}
        case "ssm_beta" | "ssm_alpha":
            name = f"{at}in_proj_{'b' if stem == 'ssm_beta' else 'a'}.weight"
            return {name: Order(tensor.shape, _untiled(H, r, 1) if tiled else None)}
        case "ssm_ba":  # of each key head, the betas of its value heads, then the others
            shape = (tensor.shape[0] // 2, *tensor.shape[1:])
            return {
                f"{at}in_proj_{part}.weight": Order(
                    shape, tuple(h * 2 * r + first + j for h in range(H) for j in range(r))
                )
                for part, first in (("b", 0), ("a", r))
            }
        case "ssm_a" | "ssm_dt":
            rows = _untiled(H, r, 1) if tiled else None
            name = "A_log" if stem == "ssm_a" else "dt_bias"
            return {f"{at}{name}": Order((H * r,), rows, is_decay=stem == "ssm_a")}
        case "ssm_conv1d":
            n_taps = c["linear_conv_kernel_dim"]
            shape = (tensor.shape[0], n_taps, 1)
            return {f"{at}conv1d.weight": Order(shape, wide())}
        case "ssm_out":
            columns = (r, H, D) if tiled else None
            return {f"{at}out_proj.weight": Order(tensor.shape, None, columns)}
        case "ffn_gate_inp_shexp":
            name = f"model.layers.{layer}.mlp.shared_expert_gate.weight"
            return {name: Order((1, c["hidden_size"]))}
        case _:
            return {}


def _of_key_heads(tensor: GGUFTensor, at: str, c: Mapping[str, Any]) -> Mapping[str, Order]:
    """A projection with, of each key head, its query, its key, and its value heads and gates."""
    (H, r), D = _heads(c), c["linear_key_head_dim"]
    wide = r * c["linear_value_head_dim"]

    def rows(first: int, n: int) -> tuple[int, ...]:
        return tuple(h * 2 * (D + wide) + first + i for h in range(H) for i in range(n))

    parts = {
        "in_proj_qkv": rows(0, D) + rows(D, D) + rows(2 * D, wide),
        "in_proj_z": rows(2 * D + wide, wide),
    }
    return {
        f"{at}{name}.weight": Order((len(own), *tensor.shape[1:]), own)
        for name, own in parts.items()
    }


def _heads(c: Mapping[str, Any]) -> tuple[int, int]:
    """Key heads, and value heads of each."""
    n = c["linear_num_key_heads"]
    return n, c["linear_num_value_heads"] // n


def _untiled(H: int, r: int, D: int) -> tuple[int, ...]:
    """The file's row of each of ours: heads of D rows, `[r, H]` in the file and `[H, r]` here."""
    return tuple((j * H + h) * D + i for h in range(H) for j in range(r) for i in range(D))


_NAMES = {
    **ATTENTION_AND_MLP,
    **HEAD_NORMS,
    "post_attention_norm": "post_attention_layernorm",
    "ssm_norm": "linear_attn.norm",
}
_WITH_EXPERTS = {
    **_NAMES,
    **EXPERTS,
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}


def _tiled(tensor: GGUFTensor, config: Mapping[str, Any]) -> Mapping[str, Order]:
    return _orders(tensor, config, tiled=True)


def _grouped(tensor: GGUFTensor, config: Mapping[str, Any]) -> Mapping[str, Order]:
    return _orders(tensor, config, tiled=False)


QWEN35 = Architecture(hybrid_config, _NAMES, "bfloat16", unused=is_past_the_end, orders=_tiled)
QWEN35MOE = Architecture(
    hybrid_config,
    _WITH_EXPERTS,
    "bfloat16",
    unused=is_past_the_end,
    parts=fused_experts,
    orders=_tiled,
)
QWEN3NEXT = Architecture(
    hybrid_config,
    _WITH_EXPERTS,
    "bfloat16",
    unused=is_past_the_end,
    parts=fused_experts,
    orders=_grouped,
)
