"""Gemma 1, 2 and 3."""

from __future__ import annotations

from ..architecture import Architecture, Config, Tensors
from ..metadata import Metadata, short_number
from ..rope import linear_or_yarn
from .common import ATTENTION_AND_MLP, HEAD_NORMS, grouped, theta


def gemma_config(m: Metadata, tensors: Tensors) -> Config:
    return {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        **grouped(m, tensors),
        "hidden_act": "gelu_pytorch_tanh",
        "rope_theta": theta(m),
        "rope_scaling": linear_or_yarn(m),
        "attention_bias": False,
    }


def gemma2_config(m: Metadata, tensors: Tensors) -> Config:
    config = grouped(m, tensors)
    caps = {
        f"{kind}_logit_softcapping": m.opt_number(f"{kind}_logit_softcapping")
        for kind in ("attn", "final")
    }
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **config,
        "hidden_activation": "gelu_pytorch_tanh",
        # The 27B model scales by its share of the hidden size and not by head_dim.
        "query_pre_attn_scalar": _scalar(m, config, large=46),
        **{key: short_number(cap) if cap else None for key, cap in caps.items()},
        "sliding_window": m.int("attention.sliding_window", 4096),
        "rope_theta": theta(m),
        "rope_scaling": linear_or_yarn(m),
        "attention_bias": False,
    }


def gemma3_config(m: Metadata, tensors: Tensors) -> Config:
    config = grouped(m, tensors)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if m.opt_number(key):
            raise m.error(key, "must be absent: Gemma 3 has none")
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **config,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _scalar(m, config, large=62),
        "rope_theta": theta(m, 1_000_000.0),
        "rope_local_base_freq": short_number(m.number("rope.freq_base_swa", 10000.0)),
        "rope_scaling": linear_or_yarn(m),
        "sliding_window": m.int("attention.sliding_window"),
        "sliding_window_pattern": m.int("attention.sliding_window_pattern", 6),
        "attention_bias": False,
    }


def _scalar(m: Metadata, config: Config, large: int) -> float:
    """`query_pre_attn_scalar`; the largest model, known by its layers, has its own."""
    if scale := m.opt_number("attention.scale"):
        return round(scale**-2)
    if config["num_hidden_layers"] == large:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


FOUR_NORMS = {
    **ATTENTION_AND_MLP,
    **HEAD_NORMS,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GEMMA = Architecture(
    gemma_config,
    {**ATTENTION_AND_MLP, "ffn_norm": "post_attention_layernorm"},
    "bfloat16",
    norms_plus_one=True,
)
GEMMA2 = Architecture(gemma2_config, FOUR_NORMS, "bfloat16", norms_plus_one=True)
GEMMA3 = Architecture(gemma3_config, FOUR_NORMS, "bfloat16", norms_plus_one=True)
