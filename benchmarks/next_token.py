"""Decoding with and without a next-token layer: `python -m benchmarks.next_token --output NAME`.

The model is a GLM-4.5 in small, made so that its layer is right as often as asked for
(`tests.support.half_right`), and so that no text repeats itself: nothing is looked up. Otherwise
as `benchmarks.drafts`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlxkv
from benchmarks.report import about, keep, machine_lines
from mlxkv.bench.drafts import OFF, Run, compared, rows
from mlxkv.convert import convert
from mlxkv.generation.outputs import Result
from mlxkv.llm.llm import LLM
from tests.families.test_glm import MOE, hub_weights, our_weights
from tests.support.command_line import chat_model
from tests.support.half_right import half_right
from tests.support.tiny import write_checkpoint

CONFIG = {
    **MOE,
    "vocab_size": 18944,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 48,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "n_routed_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 192,
    "num_nextn_predict_layers": 1,
    "eos_token_id": None,
}
"""GLM-4.5-Air's proportions at an eighth of its width, with half of its experts: with its 46 layers
six tenths of what a token reads is experts, and a twentieth the head."""
MODES = (OFF, "mtp")


def made(folder: Path, n_layers: int, right: float, quantize: str | None, dense: bool) -> Path:
    """The model, in bfloat16 or quantized, with experts or with plain MLPs alone."""
    names = [f"<t{i}>" for i in range(CONFIG["vocab_size"] - 260)]
    chat_model(folder / "dense", special=names)
    config = {**CONFIG, "num_hidden_layers": n_layers, "torch_dtype": "bfloat16"}
    if dense:
        config["first_k_dense_replace"] = n_layers
    weights = half_right(config, hub_weights(config, our_weights(config)), right)
    write_checkpoint(folder / "dense", config, weights, dtype=mx.bfloat16)
    if quantize is None:
        return folder / "dense"
    convert(folder / "dense", folder / "small", quantize=quantize)
    return folder / "small"


def answers(llm: LLM, mode: str, temperature: float, n_tokens: int) -> list[Result]:
    options: dict[str, Any] = {"max_tokens": n_tokens, "temperature": temperature, "seed": 7}
    llm.drafting.forget()
    return [llm.generate("A story:", draft=mode, ignore_eos=True, **options)]


def table(runs: Sequence[Run], right: dict[float, str]) -> str:
    """Medians and ratios, as Markdown."""
    lines = [
        "| temperature | off tok/s | mtp tok/s | ratio | CPU time a token | tokens a pass | "
        "right | same tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.temperature} | {row.off_tps:.1f} | {row.tps:.1f} | {row.ratio:.2f} "
        f"| {row.cpu:.2f} | {row.tokens_a_pass:.2f} | {right[row.temperature]} "
        f"| {row.n_same} of {row.n_runs} |"
        for row in rows(runs)
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=46)
    parser.add_argument("--right", type=float, default=0.7)
    parser.add_argument("--quantize", default=None)
    parser.add_argument("--dense", action="store_true", help="plain MLPs in all layers")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--temperatures", type=float, nargs="+", default=(0.0, 0.8))
    parser.add_argument("--model", type=Path, help="where one was made before, or shall be")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or Path(folder)
        if not path.is_dir() or not any(path.iterdir()):
            made(path, args.layers, args.right, args.quantize, args.dense)
        llm = mlxkv.load(path / ("small" if args.quantize else "dense"), draft="mtp")
        runs: list[Run] = []
        right: dict[float, str] = {}
        for temperature in args.temperatures:
            runs += compared(
                "free text",
                lambda mode, t=temperature: answers(llm, mode, t, args.tokens),
                MODES,
                args.runs,
                temperature=temperature,
            )
            stats = answers(llm, "mtp", temperature, args.tokens)[0].stats.drafts
            n, n_right = (0, 0) if stats is None else stats.by["mtp"]
            right[temperature] = f"{n_right} of {n}"
            print(table(runs, right).splitlines()[-1], flush=True)
    written = about(Path(__file__).parent.parent, "benchmarks.next_token")
    written |= {"layers": args.layers, "right": args.right, "quantize": args.quantize}
    written |= {"dense": args.dense}
    written |= {"runs": [asdict(run) for run in runs]}
    title = f"# A next-token layer, right behind {args.right:.0%} of all tokens"
    keep(
        args.output,
        written,
        "\n".join([title, "", *machine_lines(written), "", table(runs, right)]),
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
