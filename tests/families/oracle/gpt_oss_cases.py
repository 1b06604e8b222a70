"""Golden cases of GPT-OSS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.families.oracle.case import DROP, LONG, Case

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
GPT_OSS = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "sliding_window": 24,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}


def gpt_oss(
    name: str, *, rope: Mapping[str, Any] = YARN, theta: float = 150000.0, **options: Any
) -> Case:
    """A GPT-OSS; the hub style is that of the released config.json."""
    hub = {
        "rope_parameters": DROP,
        "dtype": DROP,
        "torch_dtype": "float32",
        "rope_theta": theta,
        "rope_scaling": dict(rope),
        "swiglu_alpha": DROP,
        "experts_per_token": options.get("num_experts_per_tok", 3),
        "initial_context_length": 64,
        **options.pop("hub", {}),
    }
    case_options = {key: options.pop(key) for key in ("n_prompt", "extra") if key in options}
    return Case(
        f"gpt-oss-{name}",
        "GptOssForCausalLM",
        {**GPT_OSS, "rope_parameters": {**rope, "rope_theta": theta}, **options},
        hub,
        **case_options,
    )


CASES = (
    gpt_oss("plain", n_prompt=LONG),
    gpt_oss("truncated-yarn", rope={**YARN, "truncate": True}, num_hidden_layers=2),
    gpt_oss("default-rope", rope={"rope_type": "default"}, theta=10000.0, num_hidden_layers=2),
    gpt_oss(
        "swiglu",
        swiglu_alpha=1.1,
        swiglu_limit=0.5,
        num_hidden_layers=2,
        hub={"swiglu_alpha": 1.1},
    ),
    gpt_oss("no-biases", attention_bias=False, num_hidden_layers=2),
    gpt_oss(
        "layer-types",
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        num_hidden_layers=3,
        n_prompt=LONG,
    ),
    gpt_oss(
        "one-expert",
        num_experts_per_tok=1,
        num_key_value_heads=8,
        num_hidden_layers=2,
        hub={"layer_types": DROP},
    ),
    gpt_oss("all-experts-tied", num_experts_per_tok=6, tie_word_embeddings=True),
)
