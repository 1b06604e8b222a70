"""Golden cases of Gemma 2."""

from __future__ import annotations

from typing import Any

from tests.families.oracle.case import DROP, LONG, Case
from tests.support.tiny import GEMMA

# Caps that bend most scores: the released 50 and 30 would hardly show in a tiny model.
GEMMA2 = {
    **GEMMA,
    "num_hidden_layers": 5,
    "sliding_window": 24,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
# As gemma-2-2b's config.json.
GEMMA2_HUB = {
    "rope_parameters": DROP,
    "layer_types": DROP,
    "dtype": DROP,
    "tie_word_embeddings": DROP,
    "use_bidirectional_attention": DROP,
    "torch_dtype": "float32",
    "rope_theta": 10000.0,
    "hidden_act": "gelu_pytorch_tanh",
    "sliding_window_size": 4096,
    "cache_implementation": "hybrid",
}
IRREGULAR = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
UNCAPPED = {"attn_logit_softcapping": None, "final_logit_softcapping": None}


def gemma2(name: str, *, hub: dict[str, Any] | None = None, **options: Any) -> Case:
    n_prompt = options.pop("n_prompt", 70)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = {**GEMMA2, "rope_parameters": rope, **options}
    hub = {**GEMMA2_HUB, **(hub or {})}
    return Case(f"gemma2-{name}", "Gemma2ForCausalLM", config, hub, n_prompt, norm_mean=0.0)


CASES = (
    gemma2("text", n_prompt=LONG),
    gemma2("wide", sliding_window=270, num_hidden_layers=4, n_prompt=LONG),
    gemma2("mqa", num_key_value_heads=1, num_hidden_layers=2),
    gemma2("uncapped", num_hidden_layers=3, **UNCAPPED),
    gemma2("attention-cap-alone", num_hidden_layers=3, final_logit_softcapping=None),
    gemma2(
        # Caps and window that the config leaves out are the family's own.
        "defaults",
        num_hidden_layers=3,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        sliding_window=4096,
        query_pre_attn_scalar=256,
        hub={
            "attn_logit_softcapping": DROP,
            "final_logit_softcapping": DROP,
            "sliding_window": DROP,
            "query_pre_attn_scalar": DROP,
        },
    ),
    gemma2("irregular", num_hidden_layers=4, layer_types=IRREGULAR, hub={"layer_types": IRREGULAR}),
    gemma2("biases", attention_bias=True, num_hidden_layers=3),
    gemma2(
        "untied", tie_word_embeddings=False, num_hidden_layers=3, hub={"tie_word_embeddings": False}
    ),
)
