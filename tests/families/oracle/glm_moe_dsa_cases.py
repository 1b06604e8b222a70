"""Golden cases of GLM-5."""

from __future__ import annotations

from typing import Any

from tests.families.oracle.case import DROP, LONG, Case
from tests.families.oracle.glm4_moe_lite_cases import GLM4_MOE_LITE

GLM_MOE_DSA = {
    **GLM4_MOE_LITE,
    "index_head_dim": 20,
    # Enough heads that no key's score is 0, and two are equal.
    "index_n_heads": 16,
    "index_topk": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
# As GLM-5's config.json.
HUB = {
    "dtype": DROP,
    "torch_dtype": "float32",
    "mlp_layer_types": DROP,
    "indexer_types": DROP,
    "layer_types": DROP,
    "head_dim": 8,
    "qk_head_dim": 20,
    "indexer_rope_interleave": True,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "ep_size": 1,
    "num_nextn_predict_layers": 1,
}


def dsa(name: str, **options: Any) -> Case:
    """A GLM-5."""
    hub = {**HUB, **options.pop("hub", {})}
    n_prompt = options.pop("n_prompt", 70)
    return Case(
        f"glm-moe-dsa-{name}",
        "GlmMoeDsaForCausalLM",
        {**GLM_MOE_DSA, **options},
        hub,
        n_prompt,
        per_expert=True,
    )


CASES = (
    # Past what its indexers choose, from token 40 on; the third layer sees what the second chose.
    dsa(
        "plain",
        n_prompt=LONG,
        index_topk=40,
        first_k_dense_replace=1,
        indexer_types=["full", "full", "shared"],
        hub={"first_k_dense_replace": 1, "index_topk_pattern": "FFS"},
    ),
    dsa(
        "dense",
        attention_bias=True,
        num_hidden_layers=2,
        mlp_layer_types=["dense", "sparse"],
        hub={"first_k_dense_replace": 1},
    ),
)
