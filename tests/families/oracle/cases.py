"""The table of golden cases: one entry makes one directory of tests/families/golden. No torch here.

A case is a config in the new style (as transformers 5 writes it), plus what the hub style of the
same model looks like. `make_goldens.py` checks with transformers that both mean the same. To add a
family: a base config, the transformers class, the hub keys, and the cases, in a file of its own
beside this one whose `CASES` are joined at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.families.oracle import (
    gemma2_cases,
    gemma3n_cases,
    gemma4_cases,
    gemma_cases,
    glm4_cases,
    glm4_moe_cases,
    glm4_moe_lite_cases,
    glm_moe_dsa_cases,
    gpt_oss_cases,
    qwen_cases,
)
from tests.families.oracle.case import DROP, LONG, Case
from tests.support.tiny import GEMMA, LLAMA

# Llama

# What most Llama repositories hold: a base, a scaling or null, and no head_dim.
LLAMA_HUB = {
    "rope_parameters": DROP,
    "head_dim": DROP,
    "dtype": DROP,
    "torch_dtype": "float32",
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "pretraining_tp": 1,
}


def llama(name: str, *, rope: Mapping[str, Any] | None = None, hub=None, **options: Any) -> Case:
    """A Llama; `rope` is what `rope_scaling` holds, base aside."""
    case_options = {
        key: options.pop(key)
        for key in ("n_prompt", "prefill_in_one", "extra", "renamed")
        if key in options
    }
    theta = options.pop("rope_theta", 10000.0)
    scaling = dict(rope) if rope else None
    parameters = {"rope_theta": theta, "rope_type": "default", **(scaling or {})}
    return Case(
        f"llama-{name}",
        "LlamaForCausalLM",
        {**LLAMA, "rope_parameters": parameters, **options},
        {**LLAMA_HUB, "rope_theta": theta, "rope_scaling": scaling, **(hub or {})},
        **case_options,
    )


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 8.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.8, 2.2, 3.0],
    "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 9.0, 12.0, 20.0],
}

LLAMAS = (
    llama("plain", num_key_value_heads=4),
    llama("gqa", rope_theta=500000.0, n_prompt=LONG),
    llama("mqa", num_key_value_heads=1),
    llama("biases", attention_bias=True, mlp_bias=True),
    llama("tied", tie_word_embeddings=True),
    llama("head-dim", head_dim=24, num_key_value_heads=2, hub={"head_dim": 24, "mlp_bias": DROP}),
    llama("gelu", hidden_act="gelu"),
    llama("linear", rope={"rope_type": "linear", "factor": 4.0}),
    llama(
        "linear-type-key",
        rope={"rope_type": "linear", "factor": 2.5},
        hub={"rope_scaling": {"type": "linear", "factor": 2.5}},
    ),
    llama(
        "llama3",
        rope={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        n_prompt=140,
    ),
    llama("yarn", rope=YARN, n_prompt=140),
    llama("yarn-attention-factor", rope={**YARN, "attention_factor": 1.3}),
    llama("yarn-mscale", rope={**YARN, "mscale": 0.9, "mscale_all_dim": 0.4}),
    llama("yarn-mscale-alone", rope={**YARN, "mscale": 0.7}),
    llama(
        "yarn-no-truncate", rope={**YARN, "truncate": False, "beta_fast": 12.0, "beta_slow": 1.5}
    ),
    llama(
        "yarn-type-key",
        rope=YARN,
        hub={
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
        },
    ),
    llama("yarn-no-original", rope={"rope_type": "yarn", "factor": 2.0}),
    llama("dynamic", rope=DYNAMIC),
    llama("dynamic-past", rope=DYNAMIC, max_position_embeddings=48, prefill_in_one=True),
    llama("longrope-short", rope={**LONGROPE, "original_max_position_embeddings": 128}),
    llama(
        "longrope-long",
        rope={**LONGROPE, "original_max_position_embeddings": 48},
        max_position_embeddings=384,
        prefill_in_one=True,
    ),
    llama(
        "longrope-attention-factor",
        rope={**LONGROPE, "original_max_position_embeddings": 128, "attention_factor": 1.2},
    ),
    llama(
        "inv-freq",
        extra={f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (8,) for i in range(3)},
    ),
    llama("tied-with-head", tie_word_embeddings=True, extra={"lm_head.weight": (96, 64)}),
)


# Mistral and Ministral

MISTRAL_HUB = {**LLAMA_HUB, "pretraining_tp": DROP, "rope_scaling": DROP}


def mistral(name: str, *, architecture="MistralForCausalLM", hub=None, **options: Any) -> Case:
    n_prompt = options.pop("n_prompt", 70)
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    config = {**LLAMA, "rope_parameters": rope, **options}
    return Case(name, architecture, config, {**MISTRAL_HUB, **(hub or {})}, n_prompt)


MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
MISTRALS = (
    mistral("mistral-sliding", sliding_window=24, n_prompt=LONG),
    mistral("mistral-wide", sliding_window=270, n_prompt=LONG),
    mistral("mistral-plain", sliding_window=None),
    mistral(
        "ministral-mixed",
        architecture="MinistralForCausalLM",
        sliding_window=20,
        num_hidden_layers=4,
        head_dim=16,
        hub={"head_dim": 16},
        layer_types=MIXED,
        n_prompt=LONG,
    ),
)


# Gemma 3

GEMMA3 = {
    **GEMMA,
    "num_hidden_layers": 7,
    "sliding_window": 32,
    "query_pre_attn_scalar": 24,
}
GEMMA3_HUB = {
    "rope_parameters": DROP,
    "layer_types": DROP,
    "_sliding_window_pattern": DROP,
    "dtype": DROP,
    "tie_word_embeddings": DROP,
    "torch_dtype": "float32",
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "sliding_window_pattern": 6,
    "cache_implementation": "hybrid",
}
IRREGULAR = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]


def gemma3(name: str, *, hub=None, **options: Any) -> Case:
    n_prompt = options.pop("n_prompt", 100)
    config = {**GEMMA3, "rope_parameters": gemma3n_cases.gemma3n_rope(), **options}
    hub = {**GEMMA3_HUB, **(hub or {})}
    return Case(f"gemma3-{name}", "Gemma3ForCausalLM", config, hub, n_prompt, norm_mean=0.0)


def gemma3_multimodal(name: str, renamed: Mapping[str, str]) -> Case:
    linear = {"rope_type": "linear", "factor": 8.0}
    text = {**GEMMA3, "rope_parameters": gemma3n_cases.gemma3n_rope(linear), "num_hidden_layers": 6}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4}
    # As gemma-3-4b-it's config.json: what is the family's default is left out.
    hub = {
        "text_config": {
            **{key: value for key, value in GEMMA3.items() if key != "rms_norm_eps"},
            "model_type": "gemma3_text",
            "num_hidden_layers": 6,
            "rope_scaling": linear,
        },
        "dtype": DROP,
        "torch_dtype": "float32",
        "tie_word_embeddings": DROP,
    }
    return Case(
        f"gemma3-{name}",
        "Gemma3ForConditionalGeneration",
        config,
        hub,
        80,
        norm_mean=0.0,
        renamed=renamed,
    )


GEMMA3S = (
    gemma3("text", n_prompt=LONG),
    gemma3("wide", sliding_window=270, n_prompt=LONG),
    gemma3(
        "linear",
        **gemma3n_cases.LINEAR,
    ),
    gemma3(
        "irregular",
        num_hidden_layers=4,
        layer_types=IRREGULAR,
        hub={"layer_types": IRREGULAR, "sliding_window_pattern": DROP},
    ),
    gemma3(
        "pattern", num_hidden_layers=5, sliding_window_pattern=2, hub={"sliding_window_pattern": 2}
    ),
    gemma3("softcap", final_logit_softcapping=0.5, num_hidden_layers=3),
    gemma3(
        "untied", tie_word_embeddings=False, num_hidden_layers=3, hub={"tie_word_embeddings": False}
    ),
    gemma3("biases", attention_bias=True, num_hidden_layers=3),
    gemma3_multimodal("multimodal-new", {}),
    gemma3_multimodal(
        "multimodal-old",
        {
            "model.language_model.": "language_model.model.",
            "model.vision_tower.": "vision_tower.vision_model.",
            "model.multi_modal_projector.": "multi_modal_projector.",
            "lm_head.": "language_model.lm_head.",
        },
    ),
)

CASES = (
    *LLAMAS,
    *MISTRALS,
    *GEMMA3S,
    *gemma4_cases.CASES,
    *gemma2_cases.CASES,
    *gemma3n_cases.CASES,
    *gemma_cases.CASES,
    *glm4_cases.CASES,
    *glm4_moe_cases.CASES,
    *glm4_moe_lite_cases.CASES,
    *glm_moe_dsa_cases.CASES,
    *gpt_oss_cases.CASES,
    *qwen_cases.CASES,
)
