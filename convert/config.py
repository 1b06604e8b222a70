"""config.json as mlx-lm reads it, and mlx-vlm that of a model with towers: in Hugging Face's hub
style.

transformers 5 writes RoPE and layer kinds in other keys (`rope_parameters`, `layer_types`); those
stay, and the older ones are added. A family has read and checked the config before.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from mlxkv.checkpoint.config import text_config
from mlxkv.checkpoint.tensor_names import TOWERS

_QUANTIZERS = ("quantization", "quantization_config", "compression_config")
# transformers' bookkeeping, and names of code to run.
_NEVER = frozenset(
    {
        "_name_or_path", "auto_map", "model_file", "transformers_version", "dtype", *_QUANTIZERS,
    }
)  # fmt: skip
# What a language model alone does not need.
_DROPPED = _NEVER | {
    "text_config", "vision_config", "audio_config", "mm_tokens_per_image", "image_token_index",
    "boi_token_index", "eoi_token_index",
}  # fmt: skip
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def output_config(
    raw: Mapping[str, Any],
    *,
    native: bool,
    tied: bool,
    dtype: str,
    quantization: Mapping[str, Any] | None,
    towers: Container[str] = (),
    embeds: bool = False,
) -> dict[str, Any]:
    """The config of the output.

    Args:
        raw: the source's, in either style.
        native: whether mlxkv has a definition of its own. Other configs stay as they are, as
            mlx-lm's definitions read them.
        tied: whether the head is the embedding.
        dtype: of what is not quantized.
        quantization: the entry in mlx-lm's format.
        towers: of `TOWERS`, those that are written. Without any a multimodal config is reduced to
            its language model's.
        embeds: whether it is an embedding model's, which stays as transformers reads it.
    """
    if not native:
        dropped = ("_name_or_path", "auto_map", "dtype", *_QUANTIZERS)
        config = {k: v for k, v in raw.items() if k not in dropped}
        if isinstance(inner := config.get("text_config"), Mapping):
            config["text_config"] = {k: v for k, v in inner.items() if k not in _QUANTIZERS}
    elif embeds:
        config = {k: v for k, v in text_config(raw).items() if k not in _DROPPED}
    elif any(tower in towers for tower in TOWERS):
        config = _multimodal(raw, tied, towers)
    else:
        config = _text(raw, tied)
    config["torch_dtype"] = dtype
    if quantization:
        # mlx-lm reads the first and writes both.
        config["quantization"] = dict(quantization)
        config["quantization_config"] = dict(quantization)
    return config


def _multimodal(raw: Mapping[str, Any], tied: bool, towers: Container[str]) -> dict[str, Any]:
    """The config of a model with towers: each part's under its own key."""
    config = {key: value for key, value in raw.items() if key not in _NEVER}
    inner = raw.get("text_config")
    text = _text(raw, tied)
    if isinstance(inner, Mapping):  # the language model's name, not that of one alone
        text |= {key: inner[key] for key in ("model_type", "architectures") if inner.get(key)}
        text = {k: v for k, v in text.items() if k != "architectures" or inner.get(k)}
    if str(raw["model_type"]) == "gemma3":  # where mlx-vlm looks for them
        text["rope_global_base_freq"] = text.get("rope_theta")
        text["mm_tokens_per_image"] = raw.get("mm_tokens_per_image")
        text = {key: value for key, value in text.items() if value is not None}
    config["text_config"] = text
    for key in (f"{tower}_config" for tower in TOWERS if tower not in towers):
        if key in config:
            config[key] = None
    return config | {"tie_word_embeddings": tied, "hidden_size": text["hidden_size"]}


def _text(raw: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """The config of a language model alone."""
    config = {k: v for k, v in text_config(raw).items() if k not in _DROPPED}
    if str(config.get("model_type", raw["model_type"])).startswith("gemma4"):
        config |= _gemma4(raw, config)
    else:
        config |= _hub_rope(config)
    config["tie_word_embeddings"] = tied
    # The whole model's count before the language model's.
    config |= {key: raw[key] for key in _TOKEN_IDS if raw.get(key) is not None}
    model_type = str(config.get("model_type", raw["model_type"]))
    if model_type in ("gemma3n", "gemma3n_text"):
        config |= {"model_type": "gemma3n_text", "architectures": ["Gemma3nForCausalLM"]}
    elif model_type in ("gemma3", "gemma3_text"):
        config |= {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
        config |= _sliding_window_pattern(config)
    elif model_type in ("glm4_moe_lite", "glm_moe_dsa"):
        config |= _first_dense(config)
    elif model_type == "qwen3_moe" and "num_experts" not in config:
        config["num_experts"] = config.get("num_local_experts")
    elif model_type.startswith(("qwen3_5", "qwen3_next")):
        config |= _hybrid(config, model_type)
    return config


def _gemma4(raw: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 4 with every number: for those left out mlx-lm takes E2B's."""
    from mlxkv.models.gemma4_config import DEFAULT_ROPE, Config
    from mlxkv.nn.decoder_model import FULL, SLIDING

    c = Config.from_dict(raw)
    full, sliding = c.heads[-1], next((h for h in c.heads if h.window), None)
    n_kv_heads = (sliding or full).n_kv_heads
    spelled_out = {
        "model_type": "gemma4_text",
        "hidden_activation": c.hidden_act,
        "architectures": ["Gemma4ForCausalLM"],
        "layer_types": [FULL if heads.window is None else SLIDING for heads in c.heads],
        "head_dim": (sliding or full).head_dim,
        "global_head_dim": full.head_dim,
        "num_key_value_heads": n_kv_heads,
        "num_global_key_value_heads": full.n_kv_heads if full.n_kv_heads != n_kv_heads else None,
        "rope_parameters": config.get("rope_parameters") or DEFAULT_ROPE,
        "enable_moe_block": c.num_experts > 0,
        "attention_k_eq_v": config.get("attention_k_eq_v", False),
        "sliding_window": config.get("sliding_window", (sliding and sliding.window) or 512),
    }
    same = (
        "num_attention_heads", "max_position_embeddings", "rms_norm_eps",
        "attention_bias", "final_logit_softcapping", "num_kv_shared_layers", "use_double_wide_mlp",
        "hidden_size_per_layer_input", "vocab_size_per_layer_input",
    )  # fmt: skip
    return {**{key: getattr(c, key) for key in same}, **spelled_out}


def _first_dense(config: Mapping[str, Any]) -> dict[str, Any]:
    """GLM's `mlp_layer_types`, which count where both are, as the number that mlx-lm reads."""
    types = config.get("mlp_layer_types")
    if not isinstance(types, list):
        return {}
    n = next((i for i, kind in enumerate(types) if kind != "dense"), len(types))
    return {"first_k_dense_replace": n}


def _hybrid(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """A text model's name, and `layer_types` as the number that mlx-lm reads."""
    names = {
        "qwen3_5": "Qwen3_5ForCausalLM",
        "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
        "qwen3_next": "Qwen3NextForCausalLM",
    }
    model_type = model_type.removesuffix("_text")
    found: dict[str, Any] = {"model_type": model_type, "architectures": [names[model_type]]}
    types = config.get("layer_types")
    if isinstance(types, list) and "full_attention" in types:
        found["full_attention_interval"] = types.index("full_attention") + 1
    return found


def _hub_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` in the older keys, without those that the config has."""
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, Mapping):
        return {}
    added: dict[str, Any] = {}
    sliding = parameters.get("sliding_attention")
    if isinstance(sliding, Mapping) and "rope_theta" in sliding:
        added["rope_local_base_freq"] = sliding["rope_theta"]
    full = parameters.get("full_attention", parameters)
    if isinstance(full, Mapping):
        own = ("rope_theta", "partial_rotary_factor")
        others = (*own, "full_attention", "sliding_attention")
        scaling = {k: v for k, v in full.items() if k not in others}
        plain = scaling.get("rope_type", "default") == "default"
        added["rope_scaling"] = None if plain else scaling
        added |= {key: full[key] for key in own if key in full}
    return {k: v for k, v in added.items() if config.get(k) is None}


def _sliding_window_pattern(config: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 3's `layer_types`, which count where both are, as the number that mlx-lm reads."""
    types = config.get("layer_types")
    if not isinstance(types, list) or not types:
        return {}
    is_full = [kind == "full_attention" for kind in types]
    for pattern in range(1, len(types) + 2):
        if is_full == [i % pattern == 0 for i in range(1, len(types) + 1)]:
            return {"sliding_window_pattern": pattern}
    return {}
