"""Qwen 2 and 3, and Qwen 3's mixtures of experts; mlx-lm defines Qwen 2."""

from __future__ import annotations

from ..architecture import Architecture, Config, Tensors
from ..metadata import Metadata
from ..rope import linear_or_yarn
from .common import ATTENTION_AND_MLP, EXPERTS, HEAD_NORMS, grouped, theta


def _dense(m: Metadata, tensors: Tensors) -> Config:
    config = grouped(m, tensors)
    # How an embedding's or a reranker's rows are joined says that it is one.
    if m.opt_int("pooling_type"):
        raise m.error("pooling_type", "is of an embedding or reranker model, which is not read")
    return {
        **config,
        "hidden_act": "silu",
        "rope_theta": theta(m, 1_000_000.0),
        "rope_scaling": linear_or_yarn(m),
    }


def qwen2_config(m: Metadata, tensors: Tensors) -> Config:
    config = _dense(m, tensors)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if config["head_dim"] * heads != hidden:
        raise m.error("attention.key_length", f"must be {hidden} / {heads}")
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **config}


def qwen3_config(m: Metadata, tensors: Tensors) -> Config:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **_dense(m, tensors),
        "attention_bias": False,
    }


def qwen3moe_config(m: Metadata, tensors: Tensors) -> Config:
    """Every layer has experts, weighed by their share among the chosen."""
    if m.opt_int("expert_shared_feed_forward_length"):
        raise m.error("expert_shared_feed_forward_length", "must be absent: it shares no expert")
    if m.opt_int("expert_gating_func") not in (None, 0, 1):
        raise m.error("expert_gating_func", "must be 1, a softmax")
    m.ignore("expert_weights_norm")
    return {
        **qwen3_config(m, tensors),
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": m.int("expert_count"),
        "num_experts_per_tok": m.int("expert_used_count"),
        "moe_intermediate_size": m.int("expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }


_NAMES = {**ATTENTION_AND_MLP, **HEAD_NORMS, "ffn_norm": "post_attention_layernorm"}
QWEN2 = Architecture(qwen2_config, _NAMES, "bfloat16")
QWEN3 = Architecture(qwen3_config, _NAMES, "bfloat16")
QWEN3MOE = Architecture(qwen3moe_config, {**_NAMES, **EXPERTS}, "bfloat16")
