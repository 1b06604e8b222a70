"""Golden cases of Gemma 4; see cases.py. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.families.oracle.case import DROP, LONG, Case

FULL, SLIDING = "full_attention", "sliding_attention"
BASE = {
    "vocab_size": 96,
    "vocab_size_per_layer_input": 96,
    "hidden_size": 48,
    "hidden_size_per_layer_input": 0,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "max_position_embeddings": 1024,
    "sliding_window": 24,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
    "final_logit_softcapping": 8.0,
}
# What repositories hold: sizes of full layers under keys of their own, RoPE nested in both styles.
HUB = {
    "per_layer_config": DROP,
    "dtype": DROP,
    "torch_dtype": "float32",
    "global_head_dim": 32,
    "num_global_key_value_heads": None,
}
# 31B and 26B-A4B: fewer KV heads in full layers, whose keys are their values.
K_IS_V = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
MOE = {
    "enable_moe_block": True,
    "num_experts": 6,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
}
# E2B and E4B: per-layer embeddings, and the last layers read the KV of earlier ones.
E2B = {
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 3,
    "num_hidden_layers": 7,
    "num_key_value_heads": 1,
    "use_double_wide_mlp": True,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, SLIDING, FULL],
}


def gemma4(
    name: str, *, hub: Mapping[str, Any] | None = None, n_prompt: int = 70, **options: Any
) -> Case:
    extra, norm_mean = options.pop("extra", {}), options.pop("norm_mean", 0.5)
    config = {**BASE, **options}
    sizes = {key: config[key] for key in HUB if key in config}
    hub = {**HUB, **sizes, **(hub or {})}
    # Norms around 0.5: nothing else scales the scores, and near one-hot attention would blow
    # rounding up a thousandfold.
    return Case(
        f"gemma4-{name}",
        "Gemma4ForCausalLM",
        config,
        hub,
        n_prompt,
        norm_mean=norm_mean,
        extra=extra,
    )


DEFAULTED = (
    "attention_bias", "attention_k_eq_v", "enable_moe_block", "final_logit_softcapping",
    "global_head_dim", "head_dim", "hidden_activation", "layer_types",
    "num_global_key_value_heads", "num_key_value_heads", "num_kv_shared_layers", "rms_norm_eps",
    "rope_parameters", "tie_word_embeddings", "use_double_wide_mlp",
)  # fmt: skip
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "position_embedding_size": 8,
}
AUDIO = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [8, 4],
    "output_proj_dims": 16,
    "use_clipped_linears": False,
}


def multimodal(
    name: str, parts: Mapping[str, Any], *, architecture="Gemma4", **options: Any
) -> Case:
    """The language model inside a checkpoint that sees and hears, as most repositories have it."""
    config = {**BASE, **options}
    sizes = {key: config.get(key) for key in ("global_head_dim", "num_global_key_value_heads")}
    model_type = "gemma4_unified_text" if "Unified" in architecture else "gemma4_text"
    hub = {
        "text_config": {**config, **sizes, "model_type": model_type, "dtype": "float32"},
        "torch_dtype": "float32",
        "dtype": DROP,
    }
    return Case(
        f"gemma4-{name}",
        f"{architecture}ForConditionalGeneration",
        {"text_config": config, **parts},
        hub,
        norm_mean=0.5,
    )


def unused_kv(layers: Mapping[int, int], E: int = 48, Hk: int = 2) -> dict[str, tuple[int, ...]]:
    """What repositories hold for layers that read another's KV: layer -> its head size."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, D in layers.items():
        attention = f"model.layers.{i}.self_attn."
        shapes |= {f"{attention}{name}.weight": (Hk * D, E) for name in ("k_proj", "v_proj")}
        shapes[f"{attention}k_norm.weight"] = (D,)
    return shapes


CASES = (
    gemma4("dense", **K_IS_V, n_prompt=LONG),
    gemma4("e2b", **E2B, n_prompt=LONG),
    gemma4(
        "e4b",
        **{**E2B, "use_double_wide_mlp": False, "num_key_value_heads": 2, "sliding_window": 40},
        extra=unused_kv({4: 16, 5: 16, 6: 32}),
    ),
    gemma4(
        "wide",
        num_hidden_layers=3,
        layer_types=[SLIDING, SLIDING, FULL],
        sliding_window=270,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        n_prompt=LONG,
    ),
    gemma4(
        "irregular",
        num_hidden_layers=7,
        layer_types=[FULL, SLIDING, FULL, SLIDING, FULL, SLIDING, FULL],
        num_kv_shared_layers=4,
        hidden_size_per_layer_input=8,
        hidden_activation="gelu",
    ),
    # Everything that transformers has a default for is left out of the hub style.
    gemma4(
        "defaults",
        num_hidden_layers=7,
        layer_types=None,
        final_logit_softcapping=None,
        global_head_dim=512,
        head_dim=256,
        norm_mean=0.1,
        num_attention_heads=4,
        num_key_value_heads=4,
        hub=dict.fromkeys(DEFAULTED, DROP),
    ),
    gemma4(
        "rope",
        num_hidden_layers=3,
        layer_types=[SLIDING, FULL, FULL],
        rope_parameters={
            FULL: {
                "rope_type": "proportional",
                "rope_theta": 5e5,
                "partial_rotary_factor": 0.4,
                "factor": 2.0,
            },
            SLIDING: {"rope_type": "linear", "rope_theta": 2e4, "factor": 4.0},
        },
    ),
    gemma4(
        "biases-untied",
        **K_IS_V,
        num_hidden_layers=3,
        layer_types=[SLIDING, FULL, FULL],
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    gemma4(
        "moe", **MOE, **{**K_IS_V, "num_hidden_layers": 3, "layer_types": [SLIDING, FULL, FULL]}
    ),
    multimodal(
        "multimodal-moe",
        {"vision_config": VISION},
        **{
            **K_IS_V,
            **MOE,
            "num_hidden_layers": 3,
            "layer_types": [SLIDING, SLIDING, FULL],
            "use_bidirectional_attention": "vision",
        },
    ),
    multimodal(
        "multimodal-e2b",
        {"vision_config": VISION, "audio_config": AUDIO},
        **{
            **E2B,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": [SLIDING, FULL, SLIDING, FULL],
        },
    ),
    multimodal(
        "unified",
        {"vision_config": {"mm_embed_dim": 16, "mm_posemb_size": 8, "output_proj_dims": 48}},
        architecture="Gemma4Unified",
        **K_IS_V,
    ),
)
