"""Checkpoints for benchmarks: a tiny random Llama, and a float32 copy of a real one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def write_tiny_llama(
    path: Path,
    n_layers: int = 32,
    hidden: int = 64,
    n_kv_heads: int = 2,
    head_dim: int = 16,
    n_vocab: int = 256,
    context: int = 16384,
) -> Path:
    """A float32 Llama whose steps compute next to nothing: what is left is the host's time."""
    import mlx.core as mx

    n_heads, intermediate = 2 * n_kv_heads, 2 * hidden
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": n_vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    shapes = {"model.embed_tokens.weight": (n_vocab, hidden), "model.norm.weight": (hidden,)}
    for i in range(n_layers):
        at = f"model.layers.{i}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_proj.weight": (n_heads * head_dim, hidden),
            f"{at}.self_attn.k_proj.weight": (n_kv_heads * head_dim, hidden),
            f"{at}.self_attn.v_proj.weight": (n_kv_heads * head_dim, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, n_heads * head_dim),
            f"{at}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{at}.mlp.up_proj.weight": (intermediate, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, intermediate),
        }
    mx.random.seed(0)
    weights = {
        name: mx.ones(shape) if len(shape) == 1 else mx.random.normal(shape) * 0.05
        for name, shape in shapes.items()
    }
    path.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return path


def write_float32_copy(source: Path, path: Path) -> Path:
    """The same weights with every floating tensor, quantization scales included, in float32.

    What both command lines are timed on where they compute on the CPU: mlx-lm's has no option for
    the dtype, and on 16-bit scales it takes minutes to a first token there.
    """
    import mlx.core as mx

    path.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            arrays = {
                name: array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
                for name, array in mx.load(str(file)).items()
            }
            mx.save_safetensors(str(path / file.name), arrays, metadata={"format": "mlx"})
        elif file.name == "config.json":
            config = json.loads(file.read_text(encoding="utf-8"))
            config["torch_dtype"] = config["dtype"] = "float32"
            (path / file.name).write_text(json.dumps(config, indent=2), encoding="utf-8")
        elif file.is_file():
            shutil.copy(file, path / file.name)
    return path
