"""Conversion to 4 bits beside mlx-lm's, and how soon a GGUF file is loaded.

python -m benchmarks.convert --output benchmarks/results/convert
python -m benchmarks.convert --gguf FILE --old FOLDER --output benchmarks/results/convert-gguf

Each run is a process of its own, the sides take turns, and a figure is the median. `cpu s` is the
CPU time of all threads; the peak is the process' resident peak, with what the libraries take.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from benchmarks.report import about

ROOT = Path(__file__).parent.parent
NO_MORE: Mapping[str, str] = MappingProxyType({})
OURS = """
import sys
from mlxkv.convert import convert
convert(sys.argv[1], sys.argv[2], quantize="affine4", group_size=64)
"""
THEIRS = """
import sys
from mlx_lm.convert import convert
convert(sys.argv[1], sys.argv[2], quantize=True, q_bits=4, q_group_size=64)
"""
LOAD = """
import sys, mlxkv
with mlxkv.load(sys.argv[1]) as llm:
    list(llm.stream("Hi", max_tokens=1))
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One process: seconds, CPU seconds of all threads, resident peak."""

    wall_s: float
    cpu_s: float
    peak_bytes: int


def run(code: str, *args: str, env: Mapping[str, str] = NO_MORE) -> Run:
    """Run Python code in a process of its own.

    Raises:
        RuntimeError: it fails.
    """
    sys.stdout.flush()
    start = time.perf_counter()
    child = os.posix_spawn(
        sys.executable, [sys.executable, "-P", "-c", code, *args], {**os.environ, **env}
    )
    _, status, usage = os.wait4(child, 0)
    wall_s = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{code.split()[-1]} ended with status {status}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def write_llama(folder: Path, gigabytes: float) -> Path:
    """A Llama of random weights in bfloat16, in shards, with a tokenizer."""
    import mlx.core as mx
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    hidden, inner, n_vocab, kv = 2048, 8192, 32768, 512
    a_layer = 2 * (2 * hidden * hidden + 2 * kv * hidden + 3 * inner * hidden)
    n_layers = round((gigabytes * 1e9 - 2 * n_vocab * hidden) / a_layer)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": n_layers, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": n_vocab, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    folder.mkdir(parents=True)
    mx.random.seed(0)
    weight_map = {}
    for i in range(-1, n_layers):
        at, name = f"model.layers.{i}", f"model-{i + 1:02}.safetensors"
        norms = ("input_layernorm", "post_attention_layernorm")
        arrays = {f"{at}.{norm}.weight": mx.ones((hidden,), mx.bfloat16) for norm in norms}
        drawn = {f"{at}.{key}.weight": shape for key, shape in shapes.items()}
        if i < 0:
            arrays = {"model.norm.weight": mx.ones((hidden,), mx.bfloat16)}
            drawn = {"model.embed_tokens.weight": (n_vocab, hidden)}
        for key, shape in drawn.items():
            arrays[key] = (mx.random.normal(shape) * 0.02).astype(mx.bfloat16)
        mx.save_safetensors(str(folder / name), arrays, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    vocab = {f"<{i}>": i for i in range(n_vocab)}
    Tokenizer(WordLevel(vocab, unk_token="<0>")).save(str(folder / "tokenizer.json"))
    about_tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<0>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about_tokens))
    return folder


def conversions(source: Path, runs: int, scratch: Path) -> dict[str, list[Run]]:
    """Both converters in turn; what they write is removed."""
    found: dict[str, list[Run]] = {"mlxkv": [], "mlx-lm": []}
    for i in range(runs):
        sides = [("mlxkv", OURS), ("mlx-lm", THEIRS)]
        for name, code in sides if i % 2 == 0 else sides[::-1]:
            found[name].append(run(code, str(source), str(scratch / "out")))
            shutil.rmtree(scratch / "out")
    return found


def loads(gguf: Path, old: Path | None, runs: int, scratch: Path) -> dict[str, list[Run]]:
    """To a first token: from the file, once converted, and from a converted directory.

    The last two take turns, either one first; a first load, which writes, runs twice at most.
    """
    folder = scratch / "converted"
    env = {"MLXKV_MODELS": str(scratch / "models"), "MLXKV_KV_DISK": "0"}
    run(OURS.replace('quantize="affine4", group_size=64', ""), str(gguf), str(folder), env=env)
    found: dict[str, list[Run]] = {"first": [], "second": [], "directory": []}
    if old is not None:
        path = os.pathsep.join(filter(None, (str(old), os.environ.get("PYTHONPATH", ""))))
        before = {**env, "PYTHONPATH": path, "MLXKV_MODELS": str(scratch / "models-before")}
        found["first, before"] = [run(LOAD, str(gguf), env=before)]
    for i in range(runs):
        if i < 2:
            shutil.rmtree(scratch / "models", ignore_errors=True)
            found["first"].append(run(LOAD, str(gguf), env=env))
        sides = [("second", gguf), ("directory", folder)]
        for name, model in sides if i % 2 == 0 else sides[::-1]:
            found[name].append(run(LOAD, str(model), env=env))
    return found


def median(runs: Sequence[Run]) -> Run:
    """Of each figure."""
    return Run(
        statistics.median(each.wall_s for each in runs),
        statistics.median(each.cpu_s for each in runs),
        round(statistics.median(each.peak_bytes for each in runs)),
    )


def markdown(found: Mapping[str, Sequence[Run]]) -> str:
    """A table."""
    lines = ["| | s | cpu s | peak MiB |", "|---|--:|--:|--:|"]
    for name, runs in found.items():
        mid = median(runs)
        lines.append(
            f"| {name} | {mid.wall_s:.2f} | {mid.cpu_s:.2f} | {mid.peak_bytes / 2**20:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=__doc__)
    parser.add_argument("--source", type=Path, help="a checkpoint that is there; default: makes it")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the checkpoint")
    parser.add_argument("--gguf", type=Path, help="measure loading this file instead")
    parser.add_argument("--old", type=Path, help="a folder with an earlier mlxkv, for --gguf")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True, help="NAME, for NAME.json and .md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if args.gguf is not None:
            found = loads(args.gguf, args.old, args.runs, scratch)
        else:
            source = args.source or write_llama(scratch / "source", args.gigabytes)
            found = conversions(source, args.runs, scratch)
    table = markdown(found)
    print(table)
    runs = {name: [vars_of(each) for each in each_run] for name, each_run in found.items()}
    args.output.with_suffix(".json").write_text(
        json.dumps(about(ROOT, "benchmarks.convert") | {"runs": runs}, indent=2)
    )
    args.output.with_suffix(".md").write_text(table)


def vars_of(each: Run) -> dict[str, float]:
    """A run as JSON has it."""
    return {"wall_s": each.wall_s, "cpu_s": each.cpu_s, "peak_bytes": each.peak_bytes}


if __name__ == "__main__":
    main()
