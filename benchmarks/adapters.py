"""Compare eight requests with an adapter each with mlx-lm's way of answering them:

    python -m benchmarks.adapters [--model smollm2:135m] [--peer PYTHON] [--output NAME]

mlxkv loads one base and decodes the eight answers together, each under its own adapter, and beside
that eight without any. mlx-lm answers one after the other and loads the model again for each, as
its `load(path, adapter_path=...)` does; the time of that is counted, and once more without it. The
adapters are random, in mlx-lm's format. Each engine is a process of its own, and they take turns.
PYTHON has mlx-lm; its weights and scales are made float32 where it computes on the CPU, as
`benchmarks.worker` does.

Prompts and answers are short, as mlx-lm takes some 0.3 s a token of SmolLM2 on two cores; where
there is a GPU, `--tokens 64 --rounds 3` says more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
N_ROWS, N_PROMPT = 8, 8
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapters(model: Path, folder: Path, rank: int, n_layers: int, dtype: str) -> list[Path]:
    """Eight random adapters of a Llama's last layers, all projections, in mlx-lm's format."""
    import mlx.core as mx

    config = json.loads((model / "config.json").read_text())
    E, F, n = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    kv = E // config["num_attention_heads"] * config["num_key_value_heads"]
    sizes = zip(
        PROJECTIONS, ((E, E), (E, kv), (E, kv), (E, E), (E, F), (E, F), (F, E)), strict=True
    )
    of = [(f"{'mlp' if F in size else 'self_attn'}.{name}", size) for name, size in sizes]
    parameters = {"rank": rank, "scale": 2.0, "dropout": 0.0}
    paths = []
    for i in range(N_ROWS):
        mx.random.seed(i)
        path, arrays = folder / str(i), dict[str, mx.array]()
        for layer in range(n - min(n, n_layers or n), n):
            for name, (n_in, n_out) in of:
                at = f"model.layers.{layer}.{name}"
                a, b = mx.random.normal((n_in, rank)), mx.random.normal((rank, n_out))
                arrays[f"{at}.lora_a"] = (a * 0.5 * n_in**-0.5).astype(getattr(mx, dtype))
                arrays[f"{at}.lora_b"] = (b * 0.02).astype(getattr(mx, dtype))
        path.mkdir()
        mx.save_safetensors(str(path / "adapters.safetensors"), arrays)
        keys = [name for name, _ in of]
        raw = {"fine_tune_type": "lora", "num_layers": n_layers or n}
        raw |= {"lora_parameters": {**parameters, "keys": keys}}
        (path / "adapter_config.json").write_text(json.dumps(raw))
        paths.append(path)
    return paths


def prompts(n_vocab: int) -> list[list[int]]:
    """A prompt for each row, without low ids, which end an answer."""
    return [
        [100 + (7 * i + 13 * j) % (n_vocab - 100) for j in range(N_PROMPT)] for i in range(N_ROWS)
    ]


def mlxkv_run(args: argparse.Namespace, adapters: Sequence[str]) -> dict[str, float]:
    """Tokens/s of the eight answers: with adapters when they are not in memory yet, when they are,
    and without."""
    from mlxkv.engine.engine import ThreadedEngine
    from mlxkv.engine.messages import Ask
    from mlxkv.generation.request import Request

    n_vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    engine = ThreadedEngine()
    engine.start()

    async def answered(prompt: list[int], adapter: str | None) -> int:
        options: dict[str, Any] = {"max_tokens": args.tokens, "temperature": 0.0, "draft": "off"}
        request = Request.of(prompt, adapter=adapter, ignore_eos=True, **options)
        ask = Ask(str(args.model), request)
        return sum([chunk.token is not None async for chunk in engine.submit(ask)])

    async def all_of(names: Sequence[str | None]) -> float:
        started = time.perf_counter()
        of = zip(prompts(n_vocab), names, strict=True)
        n_tokens = sum(await asyncio.gather(*(answered(*each) for each in of)))
        return n_tokens / (time.perf_counter() - started)

    async def measure() -> dict[str, float]:
        await all_of([None] * N_ROWS)
        found = {"adapters, first": await all_of(adapters)}
        found["adapters"] = await all_of(adapters)
        return found | {"base": await all_of([None] * N_ROWS)}

    try:
        return asyncio.run(measure())
    finally:
        engine.close()


def mlx_lm_run(args: argparse.Namespace, adapters: Sequence[str]) -> dict[str, float]:
    """Tokens/s of the eight answers one after the other, with loading and without."""
    import mlx.core as mx
    from mlx_lm import load, stream_generate

    on_cpu, n_tokens, loading, started = not mx.metal.is_available(), 0, 0.0, time.perf_counter()
    for i, adapter in enumerate(adapters):
        began = time.perf_counter()
        model, tokenizer, *_ = load(str(args.model), adapter_path=adapter)
        if on_cpu:
            model.set_dtype(mx.float32)
        mx.eval(model.parameters())
        loading += time.perf_counter() - began
        prompt = prompts(args.n_vocab)[i]
        for _ in stream_generate(model, tokenizer, prompt, max_tokens=args.tokens):
            n_tokens += 1
    taken = time.perf_counter() - started
    return {"adapters": n_tokens / taken, "without loading": n_tokens / (taken - loading)}


RUNS: dict[str, Callable[[argparse.Namespace, Sequence[str]], dict[str, float]]] = {
    "mlxkv": mlxkv_run,
    "mlx-lm": mlx_lm_run,
}


def measured(engine: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Run one engine in a process of its own."""
    python = sys.executable if engine == "mlxkv" else args.peer
    command = [python, str(Path(__file__)), "--engine", engine, "--model", str(args.model)]
    command += ["--tokens", str(args.tokens), "--folder", str(folder)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{engine}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """Medians of tokens/s, and the ratios that the targets are about."""
    middle = {
        engine: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for engine, runs in found.items()
    }
    rows = ["| 8 answers | tokens/s |", "| --- | --: |"]
    for engine, figures in middle.items():
        rows += [f"| {engine}, {name} | {value:.1f} |" for name, value in figures.items()]
    pairs = list(zip(*found.values(), strict=True))
    over_base = statistics.median(ours["adapters"] / ours["base"] for ours, _ in pairs)
    over_theirs = statistics.median(ours["adapters"] / peer["adapters"] for ours, peer in pairs)
    rows.append(f"\nadapters over base: {over_base:.2f}; mlxkv over mlx-lm: {over_theirs:.1f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2:135m", help="Of Llama's shape.")
    parser.add_argument("--peer", default=sys.executable, help="Python with mlx-lm.")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=0, help="The last ones; 0: all.")
    parser.add_argument("--dtype", default="float32", help="Of the adapters' files.")
    parser.add_argument("--tokens", type=int, default=16, help="Of an answer.")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", help="Write NAME.json with every run.")
    parser.add_argument("--engine", choices=tuple(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        args.model = Path(args.model)
        args.n_vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
        adapters = [str(args.folder / str(i)) for i in range(N_ROWS)]
        print(json.dumps(RUNS[args.engine](args, adapters)), flush=True)
        os._exit(0)
    from mlxkv.store.resolve import resolve

    args.model = resolve(args.model)
    found: dict[str, list[dict[str, float]]] = {engine: [] for engine in RUNS}
    with tempfile.TemporaryDirectory() as name:
        write_adapters(args.model, Path(name), args.rank, args.layers, args.dtype)
        for _ in range(args.rounds):
            for engine, runs in found.items():
                runs.append(measured(engine, args, Path(name)))
    print("\n".join(table(found)))
    if args.output:
        Path(f"{args.output}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
