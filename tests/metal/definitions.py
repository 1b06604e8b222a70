"""Configs of mlx-lm's definitions, small ones, each with another kind of layer or of attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.metal.proportions import Config


def _config(model_type: str, **rest: Any) -> Config:
    return {
        "model_type": model_type,
        "num_hidden_layers": 4,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "vocab_size": 4096,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        **rest,
    }


DEFINITIONS: Mapping[str, Config] = {
    "fused attention": _config("qwen3"),
    "scores": _config("qwen3", head_dim=96),  # no kernel of Metal's has heads of 96 for a chunk
    "experts": _config(
        "qwen3_moe", num_experts=32, num_experts_per_tok=4, moe_intermediate_size=256,
        decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True,
    ),
    "windows": _config("exaone4", sliding_window=1024, sliding_window_pattern="LLLG"),
    "wide windows": _config(
        "cohere2", sliding_window=4096, sliding_window_pattern=4, logit_scale=1.0
    ),
    "positions": {
        "model_type": "gpt2", "n_ctx": 16384, "n_embd": 512, "n_head": 8, "n_layer": 4,
        "n_positions": 16384, "layer_norm_epsilon": 1e-5, "vocab_size": 4096,
    },
    "states": {
        "model_type": "mamba2", "num_heads": 16, "head_dim": 64, "vocab_size": 4096,
        "hidden_size": 512, "intermediate_size": 1024, "state_size": 64, "num_hidden_layers": 4,
        "layer_norm_epsilon": 1e-5, "conv_kernel": 4, "n_groups": 1, "use_bias": False,
        "use_conv_bias": True, "tie_word_embeddings": True, "time_step_limit": [0.0, 100.0],
        "time_step_rank": 32, "chunk_size": 256, "rms_norm": True, "norm_before_gate": False,
        "ssm_state_size": 64, "max_position_embeddings": 16384,
    },
    "convolutions": _config(
        "lfm2", conv_bias=False, conv_L_cache=3, norm_eps=1e-5, block_dim=512, block_ff_dim=1024,
        block_multiple_of=256, block_ffn_dim_multiplier=1.0, block_auto_adjust_ff_dim=False,
        full_attn_idxs=[1, 3], layer_types=["conv", "full_attention"] * 2,
    ),
}  # fmt: skip
