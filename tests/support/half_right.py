"""A GLM-4.5 whose next-token layer is right as often as wanted.

Token t is followed by the one behind it in a random cycle through the vocabulary: its row of the
embedding stands in the head at that token's place, and nothing comes between, or little. The layer
gives the embedding on, which is what the head wants to see; of some tokens it has another's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

LOGIT = 20.0
"""Of the token that comes next; others have a standard deviation of LOGIT / sqrt(E)."""


def half_right(
    config: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    right: float,
    *,
    adds: float = 0.0,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """The weights of such a model.

    Args:
        config: of a `glm4_moe` with a next-token layer.
        weights: any of that config, under Hugging Face's names.
        right: of the vocabulary, what share the layer is right behind.
        adds: how much of what they would the model's layers add.
        seed: of the cycle, and of where the layer is wrong.
    """
    random = np.random.RandomState(seed)
    V, E, n = config["vocab_size"], config["hidden_size"], config["num_hidden_layers"]
    layer = f"model.layers.{n}."
    changed = dict(weights)
    for name, array in weights.items():
        if "o_proj." in name or "down_proj." in name:
            changed[name] = array * np.float32(0.0 if name.startswith(layer) else adds)
        elif name.endswith(("norm.weight", "layernorm.weight")):
            changed[name] = np.ones_like(array)
    embedding = random.standard_normal((V, E)).astype(np.float32)
    embedding /= np.sqrt((embedding**2).mean(-1, keepdims=True))
    cycle = random.permutation(V)
    head = np.empty_like(embedding)
    head[np.roll(cycle, -1)] = embedding[cycle] * np.float32(LOGIT / E)
    own = embedding.copy()
    wrong = random.permutation(V)[: V - round(right * V)]
    own[wrong] = np.roll(embedding, 1, axis=0)[wrong]
    changed |= {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": head,
        f"{layer}embed_tokens.weight": own,
        f"{layer}shared_head.head.weight": head,
        f"{layer}eh_proj.weight": np.eye(E, 2 * E, dtype=np.float32),
    }
    return changed
