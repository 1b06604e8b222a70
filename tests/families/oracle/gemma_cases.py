"""Golden cases of Gemma 1."""

from __future__ import annotations

from typing import Any

from tests.families.oracle.case import DROP, LONG, Case
from tests.support.tiny import GEMMA

GEMMA1 = {**GEMMA, "num_hidden_layers": 3, "num_key_value_heads": 4}
# As gemma-2b's config.json: "gelu" is the tanh form, and the head is the embedding unsaid.
GEMMA_HUB = {
    "rope_parameters": DROP,
    "dtype": DROP,
    "tie_word_embeddings": DROP,
    "use_bidirectional_attention": DROP,
    "torch_dtype": "float32",
    "hidden_act": "gelu",
    "rope_theta": 10000.0,
    "rope_scaling": None,
}


def gemma(name: str, *, hub: dict[str, Any] | None = None, **options: Any) -> Case:
    n_prompt = options.pop("n_prompt", 70)
    extra = options.pop("extra", {})
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = {**GEMMA1, "rope_parameters": rope, **options}
    hub = {**GEMMA_HUB, **(hub or {})}
    return Case(
        f"gemma-{name}", "GemmaForCausalLM", config, hub, n_prompt, norm_mean=0.0, extra=extra
    )


CASES = (
    gemma("plain", n_prompt=LONG),
    gemma("mqa", num_key_value_heads=1, n_prompt=LONG),
    # 7B: heads wider than hidden_size / n_heads.
    gemma("head-dim", head_dim=24, num_key_value_heads=2),
    gemma("biases", attention_bias=True),
    gemma("untied", tie_word_embeddings=False, hub={"tie_word_embeddings": False}),
    gemma("tied-with-head", extra={"lm_head.weight": (96, 48)}),
    gemma("silu", hidden_act="silu", hub={"hidden_act": "silu"}),
    gemma(
        "linear",
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
        hub={"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
)
