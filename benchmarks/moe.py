"""Mixtures of experts against mlx-lm: `python -m benchmarks.moe --output NAME`.

Scaled-down GPT-OSS 20B and GLM-4.5-Air with random weights: as many experts, as many chosen, and
the proportions of the released models; a quarter and an eighth as wide, a few layers deep. The
measurements are those of `benchmarks.compare`, one family after the other: NAME-gpt-oss.json and so
on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "vocab_size": 16384,
    "hidden_size": 704,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
GLM = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1344,
    "moe_intermediate_size": 192,
    "num_hidden_layers": 5,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "use_qk_norm": False,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
FAMILIES = {
    "gpt-oss": (GPT_OSS, {"mode": "mxfp4", "bits": 4, "group_size": 32}),
    "glm-4.5": (GLM, {"mode": "affine", "bits": 4, "group_size": 64}),
}
"""config.json, and how the experts are packed; the rest stays as it is."""


def write_checkpoint(path: Path, config: dict[str, Any], packing: dict[str, Any]) -> Path:
    """A checkpoint of random weights that both engines load."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten, tree_map

    from mlxkv.models import family_for
    from mlxkv.nn.moe import ExpertLinear

    mx.random.seed(0)
    definition = family_for(config, "config.json")
    model = definition.build(definition.config(config, "config.json"))
    model.update(tree_map(_random, model.parameters()))
    nn.quantize(model, class_predicate=lambda _, m: isinstance(m, ExpertLinear) and packing)
    path.mkdir(parents=True, exist_ok=True)
    weights: dict[str, Any] = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    (path / "config.json").write_text(json.dumps({**config, "quantization": packing}, indent=1))
    return path


def _random(array: Any) -> Any:
    import mlx.core as mx

    if array.ndim == 1:
        return mx.ones_like(array)
    return mx.random.normal(array.shape) * array.shape[-1] ** -0.5


def main() -> None:
    parser = argparse.ArgumentParser(description="Mixtures of experts: mlxkv and mlx-lm.")
    parser.add_argument("--output", type=Path, required=True, help="NAME")
    parser.add_argument("--families", default=",".join(FAMILIES), metavar="A,B")
    parser.add_argument("--what", default="decode,prefill,memory", metavar="A,B")
    parser.add_argument("--contexts", default="0,2048", metavar="N,N")
    parser.add_argument("--prefills", default="512", metavar="N,N")
    parser.add_argument("--runs", default="3", help="pairs of runs")
    parser.add_argument("--seconds", default="2", help="of decoding in each run")
    args = parser.parse_args()
    for name in args.families.split(","):
        if name not in FAMILIES:
            raise SystemExit(f"--families must be some of {', '.join(FAMILIES)}; got {name!r}")
        with tempfile.TemporaryDirectory() as scratch:
            model = write_checkpoint(Path(scratch) / name, *FAMILIES[name])
            options = {
                "model": model, "what": args.what, "contexts": args.contexts, "prompt": 512,
                "prefills": args.prefills, "runs": args.runs, "seconds": args.seconds,
                "output": args.output.with_name(f"{args.output.name}-{name.replace('.', '')}"),
            }  # fmt: skip
            command = [sys.executable, "-m", "benchmarks.compare"]
            command += [f"--{key}={value}" for key, value in options.items()]
            subprocess.run(command, check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
