"""What a switch of adapter costs on a prompt that is known, and what ten adapters keep of it:
`python -m benchmarks.adapters_kv`.

A random Llama, and adapters of rank 8 on queries and values (PEFT's choice for a Llama), or on all
projections, of its last layers. A prompt that nothing is known of is computed under an adapter
(whole), then one that the others have computed (switch), in turn; ratios are medians over pairs.
Pages lie in RAM.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.checkpoints import write_tiny_llama

if TYPE_CHECKING:
    from mlxkv.llm.llm import LLM

N_ADAPTERS = 10
HIDDEN, KV, N_VOCAB = 256, 128, 256


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters_kv", description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument(
        "--changed", type=int, default=8, help="the last of them that adapters change"
    )
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--runs", type=int, default=5, help="pairs of runs, at most 10")
    parser.add_argument("--targets", choices=("qv", "all"), default="qv")
    parser.add_argument("--kv-type", default="native")
    return parser.parse_args(argv)


def write_tokenizer(folder: Path) -> None:
    """One of single bytes, so that the folder is a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")


def write_adapter(folder: Path, layers: range, seed: int, targets: str) -> str:
    """A random LoRA adapter as mlx-lm writes it."""
    import mlx.core as mx

    sizes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, KV)}
    if targets == "all":
        sizes |= {
            "self_attn.k_proj": (HIDDEN, KV),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (HIDDEN, 2 * HIDDEN),
            "mlp.up_proj": (HIDDEN, 2 * HIDDEN),
            "mlp.down_proj": (2 * HIDDEN, HIDDEN),
        }
    mx.random.seed(seed)
    arrays = {}
    for i in layers:
        for name, (n_in, n_out) in sizes.items():
            arrays[f"model.layers.{i}.{name}.lora_a"] = mx.random.normal((n_in, 8)) * 0.05
            arrays[f"model.layers.{i}.{name}.lora_b"] = mx.random.normal((8, n_out)) * 0.05
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    config = {"fine_tune_type": "lora", "num_layers": len(layers)}
    config["lora_parameters"] = {"rank": 8, "scale": 2.0, "dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def seconds(llm: LLM, tokens: list[int], adapter: str | None) -> tuple[float, float, int]:
    """Wall and CPU seconds up to a prompt's logits, and tokens computed above the border alone."""
    import mlx.core as mx

    session = llm.session(adapter=() if adapter is None else (adapter,))
    began, cpu = time.perf_counter(), time.process_time()
    session.restore(tokens)
    mx.eval(session.prefill(tokens))
    took = time.perf_counter() - began, time.process_time() - cpu
    session.finish()
    return *took, session.n_lifted


def prompt(n: int, seed: int) -> list[int]:
    import numpy as np

    return np.random.RandomState(seed).randint(0, N_VOCAB, n).tolist()


def main() -> None:
    args = parse()
    os.environ["MLXKV_KV_DISK"] = "0"
    import mlxkv

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_tiny_llama(root / "model", args.layers, HIDDEN, KV // 64, 64, N_VOCAB)
        write_tokenizer(root / "model")
        changed = range(args.layers - args.changed, args.layers)
        adapters = [
            write_adapter(root / f"a{i}", changed, i, args.targets) for i in range(N_ADAPTERS)
        ]
        with mlxkv.load(root / "model", dtype="float32", kv_type=args.kv_type) as llm:
            measure(llm, adapters, args)


def measure(llm: LLM, adapters: Sequence[str], args: argparse.Namespace) -> None:
    part = args.changed / args.layers
    llm.session(adapter=(adapters[0],))  # from which the border is known
    document, pairs = prompt(args.tokens, 0), []
    seconds(llm, document, adapters[0])
    of_ten = llm.pages_bytes(None)
    for i, adapter in enumerate(adapters[1:]):
        before = llm.pages_bytes(None)
        switch = seconds(llm, document, adapter)
        of_ten += llm.pages_bytes(None) - before
        if i < args.runs:
            whole = seconds(llm, prompt(args.tokens, 1 + i), adapter)
            pairs.append((whole, switch))
            print(f"whole {whole[0]:.2f} s, switch {switch[0]:.2f} s ({switch[2]:,} tokens)")
    before = llm.pages_bytes(None)
    base = seconds(llm, document, None)
    of_base = llm.pages_bytes(None) - before
    kv = llm.pages.nbytes if llm.pages is not None else 0
    for name, at in (("time", 0), ("CPU time", 1)):
        ratios = [switch[at] / whole[at] for whole, switch in pairs]
        ranged = f"{min(ratios):.3f} to {max(ratios):.3f}"
        ratio = statistics.median(ratios)
        print(f"{name}: {ratio:.3f} of a prefill ({ranged}); {ratio / part:.3f} n/L")
    print(f"base behind an adapter: {base[2]:,} tokens above the border alone, {base[0]:.2f} s")
    print(f"ten adapters: {of_ten / kv:.3f} of the document's KV; 1 + 10 n/L is {1 + 10 * part:g}")
    print(f"ten adapters and the base: {(of_ten + of_base) / kv:.3f}")


if __name__ == "__main__":
    main()
