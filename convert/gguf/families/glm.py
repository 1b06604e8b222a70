"""GLM-4, GLM-4.5 and 4.6, and GLM-4.7-Flash, which llama.cpp has as a DeepSeek 2."""

from __future__ import annotations

from mlxkv.errors import UnsupportedModel

from ..architecture import Architecture, Config, Tensors
from ..metadata import Metadata
from ..rope import linear_or_yarn
from .common import (
    ATTENTION,
    ATTENTION_AND_MLP,
    EXPERTS,
    HEAD_NORMS,
    grouped,
    is_past_the_end,
    sigmoid_experts,
    sizes,
    theta,
)

_NEXT_TOKEN = {
    "nextn.eh_proj": "eh_proj",
    "nextn.enorm": "enorm",
    "nextn.hnorm": "hnorm",
    "nextn.embed_tokens": "embed_tokens",
    "nextn.shared_head_norm": "shared_head.norm",
    "nextn.shared_head_head": "shared_head.head",
}
"""Of the block that predicts the token after next."""
_NEEDED = ("nextn.eh_proj", "nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm", "attn_norm")
_ROUTER = {
    **EXPERTS,
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}


def glm4_config(m: Metadata, tensors: Tensors) -> Config:
    """GLM-4 of 2025, dense; a model with pictures has its rows in another order."""
    if m.any("rope.dimension_sections") is not None:
        raise m.error("rope.dimension_sections", "is of a model with pictures, which is not read")
    n_extra = m.opt_int("nextn_predict_layers") or 0
    config = grouped(m, tensors, extra_layers=n_extra, partial=True)
    return {
        "architectures": ["Glm4ForCausalLM"],
        "model_type": "glm4",
        **config,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "rope_theta": theta(m),
        "rope_scaling": linear_or_yarn(m),
    }


def glm4_moe_config(m: Metadata, tensors: Tensors) -> Config:
    n_extra = m.opt_int("nextn_predict_layers") or 0
    config = grouped(m, tensors, extra_layers=n_extra, partial=True)
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        **config,
        **sigmoid_experts(m, config["num_hidden_layers"]),
        "num_nextn_predict_layers": _n_next_token(config["num_hidden_layers"], tensors),
        "hidden_act": "silu",
        "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "rope_theta": theta(m, 1_000_000.0),
        "rope_scaling": linear_or_yarn(m),
    }


def _n_next_token(n_layers: int, tensors: Tensors) -> int:
    """How many layers predict the token after next, the first behind the model's or none."""
    return int(all(f"blk.{n_layers}.{name}.weight" in tensors for name in _NEEDED))


def glm4_moe_lite_config(m: Metadata, tensors: Tensors) -> Config:
    """GLM-4.7-Flash. A DeepSeek has YaRN, or a router without a correction."""
    if not any("exp_probs_b" in name for name in tensors) or m.any("rope.scaling.type"):
        raise UnsupportedModel(
            f"{m.file.path}: holds a DeepSeek, none of mlxkv's families: of GGUF architecture "
            "'deepseek2' only GLM-4.7-Flash is read; its safetensors run if mlx-lm defines them "
            "(`pip install mlx-lm`)"
        )
    config = sizes(m, tensors, extra_layers=m.opt_int("nextn_predict_layers") or 0)
    rope_dim, rank = m.int("rope.dimension_count"), m.int("attention.kv_lora_rank")
    whole, value = m.int("attention.key_length_mla"), m.int("attention.value_length_mla")
    for key, expected in (
        ("attention.head_count_kv", 1),
        ("attention.key_length", rank + rope_dim),
        ("attention.value_length", rank),
    ):
        if m.int(key, expected) != expected:
            raise m.error(key, f"must be {expected}, a latent for all heads; got {m.int(key)}")
    if whole <= rope_dim:
        raise m.error("attention.key_length_mla", f"must be above {rope_dim}; got {whole}")
    return {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        **config,
        **sigmoid_experts(m, config["num_hidden_layers"]),
        "num_key_value_heads": config["num_attention_heads"],
        "intermediate_size": m.int("feed_forward_length"),
        "q_lora_rank": m.opt_int("attention.q_lora_rank"),
        "kv_lora_rank": rank,
        "qk_nope_head_dim": whole - rope_dim,
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": value,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_interleave": True,
        "topk_method": "noaux_tc",
        "rope_theta": theta(m),
        "rope_scaling": None,
    }


GLM4 = Architecture(
    glm4_config,
    {
        **ATTENTION,
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_norm": "post_attention_layernorm",
        "post_attention_norm": "post_self_attn_layernorm",
        "post_ffw_norm": "post_mlp_layernorm",
    },
    "bfloat16",
    unused=is_past_the_end,
)
GLM4_MOE = Architecture(
    glm4_moe_config,
    {
        **ATTENTION_AND_MLP,
        **HEAD_NORMS,
        **_ROUTER,
        **_NEXT_TOKEN,
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "post_attention_layernorm",
    },
    "bfloat16",
    unused=is_past_the_end,
)
GLM4_MOE_LITE = Architecture(
    glm4_moe_lite_config,
    {
        **ATTENTION_AND_MLP,
        **_ROUTER,
        "attn_q_a": "self_attn.q_a_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_q_b": "self_attn.q_b_proj",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm",
        # The two halves of `kv_b_proj`, of which the keys' is transposed here and there.
        "attn_k_b": "self_attn.embed_q",
        "attn_v_b": "self_attn.unembed_out",
        "ffn_norm": "post_attention_layernorm",
    },
    "bfloat16",
    unused=is_past_the_end,
)
