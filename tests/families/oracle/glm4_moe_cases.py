"""Golden cases of GLM-4.5 and 4.6."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.families.oracle.case import DROP, LONG, Case

GLM_EXPERTS = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 1024,
}
"""What the cases of all GLMs with experts share."""
GLM4_MOE = {
    **GLM_EXPERTS,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "use_qk_norm": True,
    "attention_bias": True,
    "rms_norm_eps": 1e-5,
}
# As GLM-4.5's config.json.
GLM4_MOE_HUB = {
    "rope_parameters": DROP,
    "dtype": DROP,
    "torch_dtype": "float32",
    "partial_rotary_factor": 0.5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "num_nextn_predict_layers": 1,
}
NEXT = "model.layers.3."
# Some of the tensors that predict the token after next; transformers leaves them out as well.
NEXT_TOKEN_LAYER = {
    f"{NEXT}eh_proj.weight": (48, 96),
    f"{NEXT}enorm.weight": (48,),
    f"{NEXT}hnorm.weight": (48,),
    f"{NEXT}self_attn.q_proj.weight": (64, 48),
    f"{NEXT}mlp.gate.e_score_correction_bias": (8,),
    f"{NEXT}mlp.shared_experts.gate_proj.weight": (24, 48),
    f"{NEXT}shared_head.head.weight": (96, 48),
}


def glm4_moe(name: str, *, rope: Mapping[str, Any] | None = None, **options: Any) -> Case:
    """A GLM-4.5; `rope` is what `rope_parameters` changes."""
    hub = {**GLM4_MOE_HUB, **options.pop("hub", {})}
    case_options = {key: options.pop(key) for key in ("n_prompt", "extra") if key in options}
    parameters = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        **(rope or {}),
    }
    return Case(
        f"glm4-moe-{name}",
        "Glm4MoeForCausalLM",
        {**GLM4_MOE, "rope_parameters": parameters, **options},
        hub,
        per_expert=True,
        **case_options,
    )


CASES = (
    glm4_moe("plain", n_prompt=LONG, extra=NEXT_TOKEN_LAYER),
    glm4_moe("no-qk-norm", use_qk_norm=False, hub={"partial_rotary_factor": DROP}),
    glm4_moe("no-biases", attention_bias=False, rope={"rope_theta": 1e6}, hub={"rope_theta": 1e6}),
    glm4_moe("groups", n_group=4, topk_group=2, n_routed_experts=12, num_hidden_layers=2),
    glm4_moe("not-normed", norm_topk_prob=False, routed_scaling_factor=1.5, num_hidden_layers=2),
    glm4_moe("one-expert-two-shared", num_experts_per_tok=1, n_shared_experts=2),
    glm4_moe("all-sparse", first_k_dense_replace=0, num_hidden_layers=2),
    glm4_moe("all-dense", first_k_dense_replace=3),
)
