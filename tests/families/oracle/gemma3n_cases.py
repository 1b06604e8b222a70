"""Golden cases of the Gemma 3n language model.

The released multimodal config needs a vision tower that the reference takes from another package,
so here its language model alone is the reference, under the multimodal names where a case says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.families.oracle.case import DROP, LONG, Case
from tests.support.tiny import GEMMA

SLIDING, FULL = "sliding_attention", "full_attention"
# Two donors of each kind, and two layers that read the last of each.
TYPES = [SLIDING, FULL, SLIDING, FULL, SLIDING, FULL]
GEMMA3N = {
    **GEMMA,
    "vocab_size_per_layer_input": 80,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": [128, 128, 64, 64, 96, 48],
    "num_hidden_layers": 6,
    "sliding_window": 24,
    "layer_types": TYPES,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.9, 0.7, 0.0, 0.0, 0.5, 0.0],
    "final_logit_softcapping": 6.0,
    "altup_num_inputs": 4,
    "laurel_rank": 8,
}
# As gemma-3n-E2B's config.json: two keys of Gemma 3 say nothing here.
GEMMA3N_HUB = {
    "rope_parameters": DROP,
    "dtype": DROP,
    "tie_word_embeddings": DROP,
    "use_bidirectional_attention": DROP,
    "torch_dtype": "float32",
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "query_pre_attn_scalar": 256,
    "sliding_window_pattern": 5,
    "altup_lr_multiplier": 1.0,
}
UNUSED_KV = {
    f"model.layers.{i}.self_attn.{name}.weight": shape
    for i in (4, 5)
    for name, shape in {"k_proj": (32, 48), "v_proj": (32, 48), "k_norm": (16,)}.items()
}


def gemma3n_rope(
    full: Mapping[str, Any] | None = None, theta: float = 1e6, local: float = 1e4
) -> dict[str, Any]:
    return {
        FULL: {"rope_type": "default", "rope_theta": theta, **(full or {})},
        SLIDING: {"rope_type": "default", "rope_theta": local},
    }


_SCALED = {"rope_type": "linear", "factor": 8.0}
LINEAR: dict[str, Any] = {
    "rope_parameters": gemma3n_rope(_SCALED, theta=5e5, local=2e4),
    "hub": {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": _SCALED},
}
"""Options of a case whose full layers stretch their positions; Gemma 3 has the same."""


def gemma3n(name: str, *, hub: dict[str, Any] | None = None, **options: Any) -> Case:
    case_options = {
        key: options.pop(key) for key in ("n_prompt", "extra", "renamed") if key in options
    }
    config = {**GEMMA3N, "rope_parameters": gemma3n_rope(), **options}
    hub = {**GEMMA3N_HUB, **(hub or {})}
    return Case(f"gemma3n-{name}", "Gemma3nForCausalLM", config, hub, **case_options)


def short(n: int, **options: Any) -> dict[str, Any]:
    """Options of a model of `n` layers, all dense and of one size."""
    dense = {"intermediate_size": 64, "activation_sparsity_pattern": [0.0] * n}
    return {"num_hidden_layers": n, **dense, **options}


CASES = (
    gemma3n("text", n_prompt=LONG),
    gemma3n("wide", sliding_window=270, n_prompt=LONG, **short(4, layer_types=TYPES[:4])),
    gemma3n("unused-kv", extra=UNUSED_KV),
    gemma3n("unshared", num_kv_shared_layers=0, **short(3, layer_types=[SLIDING, SLIDING, FULL])),
    # What a config leaves out: every fifth layer full, and none sparse where there are so few.
    gemma3n(
        "defaults",
        **short(
            6,
            num_kv_shared_layers=1,
            layer_types=[FULL if i == 4 else SLIDING for i in range(6)],
            altup_num_inputs=2,
        ),
        hub={"layer_types": DROP, "activation_sparsity_pattern": DROP},
    ),
    gemma3n(
        "linear",
        **LINEAR,
        **short(4, layer_types=TYPES[:4]),
    ),
    gemma3n(
        "active-stream",
        altup_num_inputs=3,
        altup_active_idx=2,
        altup_correct_scale=False,
        **short(3, num_kv_shared_layers=1, layer_types=[FULL, SLIDING, SLIDING]),
    ),
    gemma3n("biases", attention_bias=True, **short(4, layer_types=TYPES[:4])),
    gemma3n(
        "untied",
        tie_word_embeddings=False,
        hub={"tie_word_embeddings": False},
        **short(3, num_kv_shared_layers=1, layer_types=[FULL, SLIDING, SLIDING]),
    ),
)
