"""Tiny embedding models in the layout of sentence-transformers, with random weights; no torch.

The oracle writes them with the same functions, so golden files hold only vectors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.support.tiny import GEMMA, random_weights, write_checkpoint

SIZES = {**GEMMA, "hidden_size": 64, "max_position_embeddings": 2048}
ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
V1: dict[str, Any] = {
    **SIZES,
    "architectures": ["Gemma3TextModel"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "use_bidirectional_attention": True,
    "torch_dtype": "float32",
}
"""As EmbeddingGemma's config.json: five sliding layers and a full one."""
V2: dict[str, Any] = {
    **SIZES,
    "architectures": ["EmbeddingGemma2TextModel"],
    "model_type": "embedding_gemma2_text",
    "num_hidden_layers": 4,
    "hidden_size_per_layer_input": 16,
    "embedding_dim": 40,
    "sliding_window": 48,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "per_layer_config": {str(i): {"head_dim": 32, "num_key_value_heads": 1} for i in (1, 3)},
    "rope_parameters": ROPE,
    "dtype": "float32",
}
"""As transformers 5.24 writes EmbeddingGemma 2's text model."""
CONFIGS = {"v1": V1, "v2": V2}
DENSE = ((64, 128), (128, 64))
"""Sizes of version 1's layers behind the mean."""
PROMPTS = {"query": "w4 w5 ", "document": "w6 "}
LENGTHS = (1, 2, 17, 17, 60, 255, 256, 257, 300, 700, 2046)
"""Words of the golden texts; each has two tokens more."""


def texts() -> list[str]:
    """The golden texts."""
    state = np.random.RandomState(0)
    return [" ".join(f"w{i}" for i in state.randint(4, 96, n)) for n in LENGTHS]


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of version 1 or 2."""
    c, found = config, dict[str, tuple[int, ...]]()
    found["embed_tokens.weight"] = (c["vocab_size"], c["hidden_size"])
    E, F, H, P = (
        c["hidden_size"],
        c["intermediate_size"],
        c["num_attention_heads"],
        c.get("hidden_size_per_layer_input"),
    )
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    for i in range(c["num_hidden_layers"]):
        at = f"layers.{i}."
        own = c.get("per_layer_config", {}).get(str(i), c)
        D, Hk = own["head_dim"], own["num_key_value_heads"]
        attention = {"q_proj": (H * D, E), "k_proj": (Hk * D, E), "v_proj": (Hk * D, E)}
        attention |= {"o_proj": (E, H * D), "q_norm": (D,), "k_norm": (D,)}
        found |= {f"{at}self_attn.{k}.weight": v for k, v in attention.items()}
        mlp = {"gate_proj": (F, E), "up_proj": (F, E), "down_proj": (E, F)}
        found |= {f"{at}mlp.{k}.weight": v for k, v in mlp.items()}
        found |= {f"{at}{norm}_layernorm.weight": (E,) for norm in norms}
        if P:
            found[f"{at}layer_scalar"] = (1,)
            found[f"{at}ple_block.per_layer_input_gate.weight"] = (P, E)
            found[f"{at}ple_block.per_layer_projection.weight"] = (E, P)
            found[f"{at}ple_block.post_per_layer_input_norm.weight"] = (E,)
    if P:
        n = c["num_hidden_layers"]
        found["ple.per_layer_model_projection.weight"] = (n * P, E)
        found["ple.per_layer_projection_norm.weight"] = (P,)
        found["embedding_projection.weight"] = (c["embedding_dim"], E)
    return {**found, "norm.weight": (E,)}


def weights(version: str) -> dict[str, np.ndarray]:
    """The model's tensors, without those of Dense layers."""
    return random_weights(shapes(CONFIGS[version]), 0, 0.0 if version == "v1" else 1.0)


def dense_weights() -> list[np.ndarray]:
    """Version 1's layers behind the mean, `[out, in]` each."""
    made = random_weights({f"dense.{i}.weight": (b, a) for i, (a, b) in enumerate(DENSE)})
    return list(made.values())


def write_embedder(directory: Path, version: str = "v1", dtype: mx.Dtype = mx.float32) -> Path:
    """Write a model's directory; the directory."""
    write_checkpoint(directory, CONFIGS[version], weights(version), dtype=dtype)
    _write_tokenizer(directory)
    kinds = ["Pooling", *(["Dense", "Dense"] if version == "v1" else []), "Normalize"]
    steps: list[dict[str, Any]] = [_step(0, "", "Transformer")]
    steps += [_step(i, f"{i}_{kind}", kind) for i, kind in enumerate(kinds, 1)]
    _write(directory / "modules.json", steps)
    _write(directory / "config_sentence_transformers.json", {"prompts": PROMPTS})
    if version == "v1":
        pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
        _write(directory / "sentence_bert_config.json", {"max_seq_length": 2048})
    else:
        pooling = {"embedding_dimension": 40, "pooling_mode": "mean", "include_prompt": True}
    _write(directory / "1_Pooling" / "config.json", pooling)
    if version == "v1":
        for i, ((a, b), weight) in enumerate(zip(DENSE, dense_weights(), strict=True), 2):
            _write_dense(directory / f"{i}_Dense", a, b, weight)
    return directory


def _step(i: int, path: str, kind: str) -> dict[str, Any]:
    return {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}


def _write_dense(folder: Path, a: int, b: int, weight: np.ndarray) -> None:
    _write(
        folder / "config.json",
        {
            "in_features": a,
            "out_features": b,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        },
    )
    mx.save_safetensors(str(folder / "model.safetensors"), {"linear.weight": mx.array(weight)})


def _write_tokenizer(directory: Path) -> None:
    """A word a token, between a first and a last one."""
    special = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    vocabulary = {**special, **{f"w{i}": i for i in range(4, 96)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048}
    _write(directory / "tokenizer_config.json", {**names, "unk_token": "<unk>", **kind})


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))
