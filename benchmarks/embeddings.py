"""Compare vectors of texts with mlx-embeddings:

    python -m benchmarks.embeddings --peer PYTHON [--layers 6] [--texts 48] [--output NAME]

PYTHON has mlx-embeddings. Both read the same checkpoint: EmbeddingGemma's shape with random
weights in float32, fewer layers and a vocabulary of 8,192 words. Texts have 4 to 512 words, as many
short as long ones on a logarithmic scale. Each engine is a process of its own, and they take turns;
of a pair of runs the ratio is taken, and of the ratios the median. mlx-embeddings gets batches of
several sizes, in the order of the texts, and on the CPU an OpenBLAS with a thread for each core
where one is installed; mlxkv gets all texts in one call.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
N_WORDS = 8192
SHORTEST, LONGEST = 4, 512
SIZES = (1, 8, 64)
"""Texts of a batch that mlx-embeddings is given."""
CONFIG = {
    "architectures": ["Gemma3TextModel"],
    "model_type": "gemma3_text",
    "vocab_size": N_WORDS,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 2048,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rms_norm_eps": 1e-6,
    "use_bidirectional_attention": True,
    "torch_dtype": "float32",
}


def texts(n: int) -> list[str]:
    """Texts of mixed lengths, the same for everyone."""
    state = random.Random(0)
    lengths = [
        round(math.exp(state.uniform(math.log(SHORTEST), math.log(LONGEST)))) for _ in range(n)
    ]
    return [" ".join(f"w{state.randrange(4, N_WORDS)}" for _ in range(m)) for m in lengths]


def write_model(folder: Path, n_layers: int) -> None:
    """EmbeddingGemma's shape in sentence-transformers' layout."""
    import mlx.core as mx

    E, F, Q, D = 768, 1152, 768, 256
    shapes = {"embed_tokens.weight": (N_WORDS, E), "norm.weight": (E,)}
    for i in range(n_layers):
        at = f"layers.{i}."
        for name, shape in {
            "q_proj": (Q, E), "k_proj": (D, E), "v_proj": (D, E), "o_proj": (E, Q),
            "q_norm": (D,), "k_norm": (D,),
        }.items():  # fmt: skip
            shapes[f"{at}self_attn.{name}.weight"] = shape
        for name, shape in {"gate_proj": (F, E), "up_proj": (F, E), "down_proj": (E, F)}.items():
            shapes[f"{at}mlp.{name}.weight"] = shape
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{at}{name}_layernorm.weight"] = (E,)
    mx.random.seed(0)
    _save(folder / "model.safetensors", shapes)
    _write(folder / "config.json", {**CONFIG, "num_hidden_layers": n_layers})
    steps = ["Transformer", "Pooling", "Dense", "Dense", "Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"x.{kind}"}
        for i, kind in enumerate(steps)
    ]
    _write(folder / "modules.json", modules)
    _write(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    for i, (a, b) in enumerate(((E, 4 * E), (4 * E, E)), 2):
        sizes = {"in_features": a, "out_features": b, "bias": False}
        _write(folder / f"{i}_Dense" / "config.json", sizes)
        _save(folder / f"{i}_Dense" / "model.safetensors", {"linear.weight": (b, a)})
    _write_tokenizer(folder)


def _save(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    import mlx.core as mx

    arrays = {name: mx.random.normal(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    mx.save_safetensors(str(path), arrays, {"format": "pt"})


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    words = {**special, **{f"w{i}": i for i in range(4, N_WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048}
    _write(folder / "tokenizer_config.json", {**names, "unk_token": "<unk>", **kind})


def mlxkv_run(model: str, size: int) -> Callable[[Sequence[str]], Any]:
    """mlxkv with all texts at once; `size` is nothing to it."""
    import mlxkv

    del size
    return mlxkv.load(model).embed


def peer_run(model: str, size: int) -> Callable[[Sequence[str]], Any]:
    """mlx-embeddings with batches of `size` texts."""
    import mlx.core as mx
    from mlx_embeddings.utils import load  # pyright: ignore[reportMissingImports]

    loaded, tokenizer = load(model)
    encode = tokenizer._tokenizer  # its `generate` does not know this family's arguments

    def run(of: Sequence[str]) -> Any:
        parts = []
        for i in range(0, len(of), size):
            batch = encode(list(of[i : i + size]), padding=True, return_tensors="np")
            ids, mask = mx.array(batch["input_ids"]), mx.array(batch["attention_mask"])
            parts.append(loaded(ids, mask).text_embeds)
            mx.eval(parts[-1])
        return mx.concatenate(parts)

    return run


def use_openblas() -> None:
    """Have MLX's products on the CPU computed by OpenBLAS; mlxkv does so by itself."""
    if sys.platform == "linux":
        os.environ.setdefault("OPENBLAS_NUM_THREADS", str(os.cpu_count()))
        with contextlib.suppress(OSError):
            ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)


def worker(args: argparse.Namespace) -> None:
    """One engine: texts a second, and MLX's peak memory, as JSON on the last line."""
    if args.engine == "mlxkv":
        import mlxkv  # noqa: F401 before MLX: it looks for an OpenBLAS
    else:
        use_openblas()
    import mlx.core as mx

    run = (mlxkv_run if args.engine == "mlxkv" else peer_run)(args.model, args.size)
    of = texts(args.texts)
    mx.eval(run(of[:2]))
    mx.clear_cache()
    mx.reset_peak_memory()
    started, cpu = time.perf_counter(), time.process_time()
    vectors = run(of)
    mx.eval(vectors)
    taken, cpu = time.perf_counter() - started, time.process_time() - cpu
    found = {
        "texts_per_s": len(of) / taken,
        "cpu_s": cpu,
        "peak_bytes": mx.get_peak_memory(),
        "first": vectors[:, :4].astype(mx.float32).tolist(),
    }
    print(json.dumps(found))


def measure(python: str, engine: str, model: Path, args: argparse.Namespace, size: int) -> Any:
    """Run one worker."""
    command = [python, str(Path(__file__)), "--engine", engine, "--model", str(model)]
    command += ["--texts", str(args.texts), "--size", str(size)]
    of_ours = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    path = of_ours if engine == "mlxkv" else args.peer_path
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{engine}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Pairs of runs of the two engines, for each batch size of mlx-embeddings."""
    pairs = []
    for _ in range(args.rounds):
        ours = measure(sys.executable, "mlxkv", model, args, 0)
        theirs = {s: measure(args.peer, "mlx-embeddings", model, args, s) for s in args.sizes}
        pairs.append((ours, theirs))
    short = [i for i, text in enumerate(texts(args.texts)) if len(text.split()) < 250]
    difference = max(
        abs(a - b)
        for ours, theirs in pairs
        for each in theirs.values()
        for i in short  # longer ones it computes with other windows
        for a, b in zip(ours["first"][i], each["first"][i], strict=True)
    )
    return {"pairs": pairs, "difference": difference}


def rows(found: Mapping[str, Any], sizes: Sequence[int]) -> list[str]:
    """A table: texts a second and peak memory, and mlxkv's over each."""
    pairs = found["pairs"]
    middle = statistics.median
    ours = [pair[0] for pair in pairs]
    lines = ["| | texts/s | peak MiB | mlxkv's texts/s over its | mlxkv's peak over its |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    own = middle(x["texts_per_s"] for x in ours), middle(x["peak_bytes"] for x in ours)
    lines.append(f"| mlxkv | {own[0]:.2f} | {own[1] / 2**20:.0f} | | |")
    for size in sizes:
        theirs = [pair[1][size] for pair in pairs]
        speed = middle(x["texts_per_s"] for x in theirs)
        peak = middle(x["peak_bytes"] for x in theirs)
        faster = middle(
            a["texts_per_s"] / b["texts_per_s"] for a, b in zip(ours, theirs, strict=True)
        )
        name, less = f"mlx-embeddings, batches of {size}", own[1] / peak
        lines.append(
            f"| {name} | {speed:.2f} | {peak / 2**20:.0f} | {faster:.2f} x | {less:.2f} x |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer", default=sys.executable, help="Python with mlx-embeddings.")
    parser.add_argument("--peer-path", default="", help="PYTHONPATH of that Python.")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--output", help="Write NAME.json with every run.")
    parser.add_argument("--engine", choices=("mlxkv", "mlx-embeddings"), help=argparse.SUPPRESS)
    parser.add_argument("--model", help="A directory; default: made with random weights.")
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        worker(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(args.model or folder)
        if not args.model:
            write_model(model, args.layers)
        found = compare(args, model)
    print("\n".join(rows(found, args.sizes)))
    print(f"largest difference of a value, of texts under 250 words: {found['difference']:.1e}")
    if args.output:
        Path(f"{args.output}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
