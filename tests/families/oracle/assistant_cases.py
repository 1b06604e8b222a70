"""Golden cases of Gemma 4's assistant: configs, weights and inputs. No torch here."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.families.oracle.gemma4_cases import BASE, FULL, K_IS_V, SLIDING
from tests.support.tiny import random_weights

WIDE, E, V, I, H, LAYERS = 48, 32, 96, 40, 4, 4
HK = {SLIDING: 2, FULL: 1}
DIMS = {SLIDING: 16, FULL: 32}
TYPES = [SLIDING, SLIDING, SLIDING, FULL]
N_HELD, N_GUESSES = 40, 3
CASES = {"clusters": {"num_centroids": 12, "centroid_intermediate_top_k": 3}, "plain": {}}


def config(case: str) -> dict[str, Any]:
    """config.json of an assistant for the case `gemma4-dense`."""
    text = {
        **K_IS_V,
        **{key: BASE[key] for key in ("vocab_size", "num_key_value_heads", "sliding_window")},
        "head_dim": DIMS[SLIDING],
        "global_head_dim": DIMS[FULL],
        "max_position_embeddings": 1024,
        "model_type": "gemma4_text",
        "hidden_size": E,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "intermediate_size": I,
        "num_attention_heads": H,
        "num_hidden_layers": LAYERS,
        "num_kv_shared_layers": LAYERS,
        "layer_types": TYPES,
        "tie_word_embeddings": True,
    }
    return {
        "model_type": "gemma4_assistant",
        "text_config": text,
        "backbone_hidden_size": WIDE,
        "use_ordered_embeddings": case == "clusters",
        "torch_dtype": "float32",
        **CASES[case],
    }


def weights(case: str) -> dict[str, np.ndarray]:
    """Random tensors under the names of the checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (V, E),
        "model.norm.weight": (E,),
        "pre_projection.weight": (E, 2 * WIDE),
        "post_projection.weight": (WIDE, E),
    }
    for i, kind in enumerate(TYPES):
        at, D = f"model.layers.{i}.", DIMS[kind]
        shapes |= {
            f"{at}self_attn.q_proj.weight": (H * D, E),
            f"{at}self_attn.o_proj.weight": (E, H * D),
            f"{at}self_attn.q_norm.weight": (D,),
            f"{at}mlp.gate_proj.weight": (I, E),
            f"{at}mlp.up_proj.weight": (I, E),
            f"{at}mlp.down_proj.weight": (E, I),
            f"{at}layer_scalar": (1,),
        }
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{at}{norm}_layernorm.weight"] = (E,)
    found = random_weights(shapes, norm_mean=0.5)
    if case == "clusters":
        C = CASES[case]["num_centroids"]
        found |= random_weights({"masked_embedding.centroids.weight": (C, E)})
        order = np.random.RandomState(5).permutation(V).astype(np.int64)
        found["masked_embedding.token_ordering"] = order
    return found


def inputs() -> dict[str, np.ndarray]:
    """Embeddings of the tokens of a draft, a hidden state, and keys and values of each kind."""
    random = np.random.RandomState(3)
    found = {
        "embeddings": random.standard_normal((N_GUESSES, 1, 1, WIDE)),
        "hidden": random.standard_normal((1, 1, WIDE)),
    }
    for kind, D in DIMS.items():
        n = N_HELD if kind == FULL else BASE["sliding_window"]
        for name in "kv":
            found[f"{kind}.{name}"] = random.standard_normal((1, HK[kind], n, D))
    return {name: array.astype(np.float32) for name, array in found.items()}
