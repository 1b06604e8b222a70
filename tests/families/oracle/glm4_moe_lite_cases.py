"""Golden cases of GLM-4.7-Flash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.families.oracle.case import DROP, LONG, Case
from tests.families.oracle.glm4_moe_cases import GLM_EXPERTS

GLM4_MOE_LITE = {
    **GLM_EXPERTS,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "routed_scaling_factor": 1.8,
    "attention_bias": False,
    # Far from that of the norms inside the projections, so that the two cannot be confused.
    "rms_norm_eps": 0.05,
}
# As GLM-4.7-Flash's config.json.
GLM4_MOE_LITE_HUB = {
    "rope_parameters": DROP,
    "rope_interleave": DROP,
    "mlp_layer_types": DROP,
    "qk_head_dim": DROP,
    "partial_rotary_factor": 1.0,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "first_k_dense_replace": 1,
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 1,
}


def lite(name: str, *, rope: Mapping[str, Any] | None = None, **options: Any) -> Case:
    """A GLM-4.7-Flash; `rope` is what `rope_parameters` changes."""
    hub = {**GLM4_MOE_LITE_HUB, **options.pop("hub", {})}
    n_prompt = options.pop("n_prompt", 70)
    parameters = {"rope_type": "default", "rope_theta": 10000.0, **(rope or {})}
    return Case(
        f"glm4-moe-lite-{name}",
        "Glm4MoeLiteForCausalLM",
        {**GLM4_MOE_LITE, "rope_parameters": parameters, **options},
        hub,
        n_prompt,
        per_expert=True,
    )


YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}
SPARSE_FIRST = ["sparse", "dense", "sparse"]

CASES = (
    lite("plain", n_prompt=LONG),
    # So small that a chunk is absorbed as well.
    lite("small-rank", kv_lora_rank=8, rope={"rope_theta": 1e6}, hub={"rope_theta": 1e6}),
    lite("biases", attention_bias=True, num_hidden_layers=2),
    lite("plain-queries", q_lora_rank=None),
    lite("halves", rope_interleave=False, hub={"rope_interleave": False}, num_hidden_layers=2),
    lite("groups", n_group=2, topk_group=1, num_hidden_layers=2),
    lite("yarn", rope=YARN, hub={"rope_scaling": YARN}, n_prompt=140, num_hidden_layers=2),
    lite("layer-types", mlp_layer_types=SPARSE_FIRST, hub={"mlp_layer_types": SPARSE_FIRST}),
)
