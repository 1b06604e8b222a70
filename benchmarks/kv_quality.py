"""What packed KV costs: `python -m benchmarks.kv_quality --model gemma3:270m --output NAME`.

A text is fed to a model once with native KV and once with each format, all of them the same tokens.
At every position behind the first few hundred, the next token's distribution is held against the
one with native KV. Writes NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.report import about, keep, machine_lines
from mlxkv.base import device
from mlxkv.bench.kv_quality import Quality, Text, measure
from mlxkv.errors import UsageError
from mlxkv.kv.types import layer_types
from mlxkv.models.loader import load_model
from mlxkv.store.resolve import resolve
from mlxkv.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [ROOT / "docs" / name for name in ("kv.md", "design.md")]


def markdown(written: dict[str, Any]) -> str:
    """A table, with what it was measured on above it."""
    settings = written["settings"]
    lines = [
        f"# {written['model']}: packed KV beside native KV",
        "",
        *machine_lines(written),
        f"- BLAS: {', '.join(written['blas'])}; dtype {settings['dtype']}, chunks of "
        f"{settings['chunk']} tokens",
        f"- commit {written['commit']}",
        f"- `{written['command']}`",
        "",
        f"{settings['positions']:,} positions of a text behind its first {settings['skip']:,} "
        "tokens; KL divergence in nats; bytes of the caches beside native ones of 16 bits.",
        "",
        "| | KL mean | median | worst | same likeliest token | perplexity | bytes |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    notes: list[str] = []
    for row in (Quality(**row) for row in written["summary"]):
        figures = ["", "", "", ""]
        if row.kv_type != "native":
            figures = [f"{kl:.1e}" for kl in (row.kl_mean, row.kl_median, row.kl_max)]
            figures.append(f"{100 * row.n_same / row.n_positions:.1f}%")
        name = "by layer" if "," in row.kv_type else row.kv_type
        if name != row.kv_type:
            notes += ["", f"By layer: `{row.kv_type}`."]
        words = [name, *figures, f"{row.perplexity:.3f}", f"{row.share:.2f}"]
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join([*lines, *notes]) + "\n"


def parse() -> argparse.Namespace:
    def formats(text: str) -> list[str]:
        try:
            return [str(layer_types(kv_type)) for kv_type in text.split()]
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_quality", description=__doc__)
    parser.add_argument("--model", required=True, help="a directory or a name mlxkv knows")
    parser.add_argument(
        "--text", type=Path, action="append", metavar="FILE",
        help="what is fed, several in a row; docs/kv.md and docs/design.md by default",
    )  # fmt: skip
    parser.add_argument("--skip", type=int, default=512, help="leading tokens, not compared")
    parser.add_argument("--positions", type=int, default=1024, help="compared behind them")
    parser.add_argument(
        "--kv-types", type=formats, default=["q8", "k8v4", "q4"], metavar="'A B'",
        help="one behind the other, such as 'q8 k8v4,0=native'",
    )  # fmt: skip
    parser.add_argument("--chunk", type=int, default=256, help="tokens fed at a time")
    parser.add_argument("--dtype", default="auto", help="auto: float32 on the CPU")
    parser.add_argument("--output", type=Path, required=True, help="NAME or NAME.json")
    args = parser.parse_args()
    if args.skip < 0 or args.positions < 1 or args.chunk < 1:
        parser.error("--skip must be at least 0, --positions and --chunk at least 1")
    return args


def main() -> None:
    args = parse()
    path = resolve(args.model).resolve()
    model = load_model(path, args.dtype)
    text = "".join(file.read_text(encoding="utf-8") for file in args.text or TEXTS)
    tokens = Tokenizer.from_dir(path).encode(text)
    wanted = args.skip + args.positions + 1
    if len(tokens) < wanted:
        raise SystemExit(
            f"the text has {len(tokens):,} tokens; --skip and --positions take {wanted:,}"
        )
    tokens = tokens[:wanted]
    rows = measure(model, Text(tokens, args.skip, args.chunk), args.kv_types)
    written = {
        "model": path.name,
        "settings": {
            "skip": args.skip,
            "positions": args.positions,
            "chunk": args.chunk,
            "dtype": str(model.compute_dtype).rpartition(".")[2],
            "text": [file.name for file in args.text or TEXTS],
            "tokens_sha256": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
        },
        **about(ROOT, "benchmarks.kv_quality"),
        "blas": [device.load_blas() or "reference"],
        "summary": [asdict(row) for row in rows],
    }
    keep(args.output, written, markdown(written))


if __name__ == "__main__":
    main()
