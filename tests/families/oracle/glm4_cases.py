"""Golden cases of GLM and GLM-4 dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.families.oracle.case import DROP, LONG, Case

GLM4 = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1.5625e-07,
    "attention_bias": True,
    "pad_token_id": 0,
    "eos_token_id": [1, 2],
}
# As GLM-4-9B-0414's config.json.
GLM4_HUB = {
    "rope_parameters": DROP,
    "dtype": DROP,
    "torch_dtype": "float32",
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
}


def glm4(name: str, *, kind: str = "Glm4", rope: Mapping[str, Any] = {}, **options: Any) -> Case:
    """A GLM-4, or with `kind` "Glm" a GLM; `rope` is what `rope_parameters` changes."""
    n_prompt = options.pop("n_prompt", 70)
    hub = options.pop("hub", {})
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, **rope}
    return Case(
        name,
        f"{kind}ForCausalLM",
        {**GLM4, "rope_parameters": rope, **options},
        {**GLM4_HUB, **hub},
        n_prompt,
    )


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}

CASES = (
    glm4("glm4-plain"),
    glm4("glm4-long", n_prompt=LONG, rope={"rope_theta": 1e6}, hub={"rope_theta": 1e6}),
    # The share that turns is the family's default where the key is absent.
    glm4("glm4-no-biases", attention_bias=False, hub={"partial_rotary_factor": DROP}),
    glm4("glm4-mqa-tied", num_key_value_heads=1, tie_word_embeddings=True),
    glm4("glm4-quarter", rope={"partial_rotary_factor": 0.25}, hub={"partial_rotary_factor": 0.25}),
    # GLM-4-32B's card says how to stretch it.
    glm4(
        "glm4-yarn",
        rope=YARN,
        hub={"rope_scaling": {**YARN, "type": "yarn"}},
        n_prompt=140,
    ),
    glm4("glm-plain", kind="Glm", n_prompt=LONG),
    glm4("glm-biases-mha", kind="Glm", num_key_value_heads=4, hub={"rope_theta": DROP}),
)
