"""Proportions of released models, as their config.json gives them; weights are never made.

Windows are 512 tokens where the released ones are longer than what is measured: a ring that has
wrapped is the steady state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.families.oracle.gpt_oss_cases import YARN

Config = Mapping[str, Any]

_FULL, _SLIDING = "full_attention", "sliding_attention"


def _every(n_layers: int, period: int) -> list[str]:
    """Layer types of which the last in each period sees everything."""
    return [_SLIDING if (i + 1) % period else _FULL for i in range(n_layers)]


def _config(
    model_type: str,
    layers: int,
    dims: tuple[int, int, int],
    heads: tuple[int, int, int],
    **rest: Any,
) -> Config:
    """A config of (hidden, intermediate, vocabulary) and (query heads, KV heads, head)."""
    hidden, intermediate, vocabulary = dims
    n_heads, n_kv_heads, head_dim = heads
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **rest,
    }


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_GEMMA4_ROPE = {
    _FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
    _SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
}
_YARN = {**YARN, "original_max_position_embeddings": 4096}
_GEMMA = {
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
_GEMMA4 = {
    **_GEMMA,
    "vocab_size_per_layer_input": 262144,
    "global_head_dim": 512,
    "final_logit_softcapping": 30.0,
    "rope_parameters": _GEMMA4_ROPE,
}
_GEMMA4_LARGE = {
    **_GEMMA4,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 1024,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "attention_k_eq_v": True,
}
_GLM_EXPERTS = {
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "rope_theta": 1e6,
    "rope_scaling": None,
}

MODELS: Mapping[str, Config] = {
    "llama-3.1-8b": _config(
        "llama", 32, (4096, 14336, 128256), (32, 8, 128),
        rope_theta=500000.0, rope_scaling=_LLAMA3_ROPE,
    ),
    "smollm2-135m": _config(
        "llama", 30, (576, 1536, 49152), (9, 3, 64), rope_theta=1e5, tie_word_embeddings=True
    ),
    "ministral-8b": _config(
        "ministral", 36, (4096, 12288, 131072), (32, 8, 128),
        rope_theta=1e8, sliding_window=512, layer_types=_every(36, 4),
    ),
    "gemma-2b": _config(
        "gemma", 18, (2048, 16384, 256000), (8, 1, 256),
        rms_norm_eps=1e-6, hidden_act="gelu", tie_word_embeddings=True,
    ),
    "gemma2-2b": _config(
        "gemma2", 26, (2304, 9216, 256000), (8, 4, 256),
        **_GEMMA, query_pre_attn_scalar=256, sliding_window=512,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
    ),
    "gemma3-4b": _config(
        "gemma3_text", 34, (2560, 10240, 262208), (8, 4, 256),
        **_GEMMA, rope_theta=1e6, rope_local_base_freq=10000.0,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
        query_pre_attn_scalar=256, sliding_window=1024, sliding_window_pattern=6,
    ),
    "gemma3n-e2b": {
        **_config(
            "gemma3n_text", 30, (2048, 8192, 262400), (8, 2, 256),
            **_GEMMA, rope_theta=1e6, rope_local_base_freq=10000.0, rope_scaling=None,
            query_pre_attn_scalar=256, sliding_window=512, layer_types=_every(30, 5),
            num_kv_shared_layers=10, vocab_size_per_layer_input=262144,
            hidden_size_per_layer_input=256, final_logit_softcapping=30.0,
            laurel_rank=64, altup_num_inputs=4, altup_active_idx=0, altup_coef_clip=120.0,
            altup_correct_scale=True, activation_sparsity_pattern=[0.95] * 10 + [0.0] * 20,
        ),
        "intermediate_size": [8192] * 30,
    },
    "gemma4-e2b": _config(
        "gemma4_text", 35, (1536, 6144, 262144), (8, 1, 256),
        **_GEMMA4, hidden_size_per_layer_input=256, sliding_window=512,
        layer_types=_every(35, 5), num_kv_shared_layers=20, use_double_wide_mlp=True,
        num_global_key_value_heads=None, attention_k_eq_v=False, enable_moe_block=False,
    ),
    "gemma4-26b-a4b": _config(
        "gemma4_text", 30, (2816, 2112, 262144), (16, 8, 256),
        **_GEMMA4_LARGE, layer_types=_every(30, 6), num_global_key_value_heads=2,
        enable_moe_block=True, num_experts=128, top_k_experts=8, moe_intermediate_size=704,
    ),
    "gemma4-31b": _config(
        "gemma4_text", 60, (5376, 21504, 262144), (32, 16, 256),
        **_GEMMA4_LARGE, layer_types=_every(60, 6), num_global_key_value_heads=4,
        enable_moe_block=False,
    ),
    "glm4-9b": _config(
        "glm4", 40, (4096, 13696, 151552), (32, 2, 128),
        partial_rotary_factor=0.5, attention_bias=True,
    ),
    "glm4.5-air": _config(
        "glm4_moe", 46, (4096, 10944, 151552), (96, 8, 128),
        **_GLM_EXPERTS, partial_rotary_factor=0.5, attention_bias=True, use_qk_norm=False,
        moe_intermediate_size=1408, n_routed_experts=128, num_experts_per_tok=8,
        routed_scaling_factor=1.0, scoring_func="sigmoid",
    ),
    "glm4.7-flash": _config(
        "glm4_moe_lite", 47, (2048, 10240, 154880), (20, 20, 64),
        **_GLM_EXPERTS, partial_rotary_factor=1.0, attention_bias=False, rope_interleave=True,
        q_lora_rank=768, kv_lora_rank=512, qk_nope_head_dim=192, qk_rope_head_dim=64,
        v_head_dim=256, moe_layer_freq=1, moe_intermediate_size=1536, n_routed_experts=64,
        num_experts_per_tok=4, routed_scaling_factor=1.8,
    ),
    "gpt-oss-20b": _config(
        "gpt_oss", 24, (2880, 2880, 201088), (64, 8, 64),
        rope_theta=150000.0, rope_scaling=_YARN, attention_bias=True, swiglu_limit=7.0,
        sliding_window=128, layer_types=_every(24, 2),
        num_local_experts=32, num_experts_per_tok=4,
    ),
}  # fmt: skip
"""Models with a definition of our own; every family is here."""

_TEXT3 = _config(
    "gemma3_text", 1, (2560, 10240, 262208), (8, 4, 256),
    hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6, sliding_window=512,
)  # fmt: skip
_TEXT4 = _config(
    "gemma4_text", 2, (1536, 6144, 262144), (8, 1, 256),
    rms_norm_eps=1e-6, sliding_window=512, hidden_size_per_layer_input=0,
)  # fmt: skip
_TALL = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16}
_WITHOUT = {"mm_embed_dim": 3840, "mm_posemb_size": 1120, "output_proj_dims": 3840}
PICTURES: Mapping[str, tuple[Config, Mapping[str, tuple[int, ...]]]] = {
    "gemma3-4b": (
        {
            "model_type": "gemma3",
            "text_config": _TEXT3,
            "vision_config": {
                **_TALL, "intermediate_size": 4304, "image_size": 896, "patch_size": 14
            },
        },
        {"pixels": (896, 896, 3)},
    ),
    "gemma4-e2b": (
        {
            "model_type": "gemma4",
            "text_config": _TEXT4,
            "vision_config": {"use_clipped_linears": True},
        },
        {"patches": (2520, 768), "positions": (2520, 2)},
    ),
    "gemma4-31b": (
        {
            "model_type": "gemma4",
            "text_config": _TEXT4,
            "vision_config": {
                **_TALL, "intermediate_size": 4304, "num_key_value_heads": 16, "head_dim": 72,
                "standardize": True,
            },
        },
        {"patches": (2520, 768), "positions": (2520, 2)},
    ),
    "gemma4-12b": (
        {"model_type": "gemma4_unified", "text_config": _TEXT4, "vision_config": _WITHOUT},
        {"patches": (280, 6912), "positions": (280, 2)},
    ),
}  # fmt: skip
"""Encoders of pictures, above a language model of a layer or two, and the shapes of one picture."""

FOREIGN: Mapping[str, Config] = {
    "qwen3-8b": _config(
        "qwen3", 36, (4096, 12288, 151936), (32, 8, 128),
        rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling=None, attention_bias=False,
    ),
    "qwen2.5-7b": _config(
        "qwen2", 28, (3584, 18944, 152064), (28, 4, 128), rms_norm_eps=1e-6, rope_theta=1e6
    ),
    "qwen3-30b-a3b": _config(
        "qwen3_moe", 48, (2048, 6144, 151936), (32, 4, 128),
        rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling=None, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768, decoder_sparse_step=1,
        mlp_only_layers=[], norm_topk_prob=True,
    ),
    "olmo2-7b": _config(
        "olmo2", 32, (4096, 11008, 100352), (32, 32, 128),
        rms_norm_eps=1e-6, rope_theta=500000.0, attention_bias=False,
    ),
}  # fmt: skip
"""Models that run on mlx-lm's definition."""
