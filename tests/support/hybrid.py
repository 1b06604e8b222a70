"""A tiny Qwen3.5 that chats: two gated delta nets and a layer with full attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from mlxkv.models import family_for
from tests.families.oracle.qwen_cases import HYBRID, ROPE
from tests.support.command_line import chat_model
from tests.support.tiny import random_weights, write_checkpoint

TYPES = ["linear_attention", "linear_attention", "full_attention"]


def hybrid_chat_model(folder: Path, **changes: Any) -> Path:
    """See `chat_model`, which makes its tokenizer."""
    chat_model(folder)
    config = json.loads((folder / "config.json").read_text())
    own = {key: config[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
    config = {
        **HYBRID,
        **own,
        "model_type": "qwen3_5_text",
        "architectures": ["Qwen3_5ForCausalLM"],
        "num_hidden_layers": 3,
        "layer_types": TYPES,
        "intermediate_size": 64,
        "max_position_embeddings": 8192,
        "rope_parameters": ROPE,
        "torch_dtype": "float32",
        **changes,
    }
    family = family_for(config, "config.json")
    parameters = tree_flatten(family.build(family.config(config, "config.json")).parameters())
    weights = random_weights({name: array.shape for name, array in parameters})
    weights["lm_head.weight"][:3] = 0  # special tokens are never the likeliest
    return write_checkpoint(folder, config, weights)
