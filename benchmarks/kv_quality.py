"""What packed KV costs: `python -m benchmarks.kv_quality --model gemma3:270m --output NAME`.

A text is fed to a model once with native KV and once with each format, all of them the same tokens.
At every position behind the first few hundred, the next token's distribution is held against the
one with native KV. Writes NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.report import about, keep, machine_lines
from mlxkv.base import device
from mlxkv.cache import make_caches
from mlxkv.kv.types import KV_TYPES, KVFormat
from mlxkv.models.loader import load_model
from mlxkv.nn.model import CausalLM
from mlxkv.store.resolve import resolve
from mlxkv.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import mlx.core as mx

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [ROOT / "docs" / name for name in ("kv.md", "design.md")]
ROWS = 64
"""Positions whose logits are in memory at a time, of each format."""


@dataclass(frozen=True, slots=True)
class Quality:
    """One format beside native KV; divergences are KL(native || format) in nats.

    Args:
        kv_type: the format.
        share: bytes that its caches take, of those in native 16 bits.
        n_positions: positions compared.
        kl_mean: over all of them.
        kl_median: of them.
        kl_max: at the worst of them.
        n_same: those where the likeliest next token is native KV's.
        perplexity: of the text.
    """

    kv_type: str
    share: float
    n_positions: int
    kl_mean: float
    kl_median: float
    kl_max: float
    n_same: int
    perplexity: float


def measure(
    model: CausalLM, tokens: Sequence[int], n_skipped: int, kv_types: Sequence[str], chunk: int
) -> list[Quality]:
    """Every position of `tokens` but the first `n_skipped` and the last, which has no next token.

    Args:
        model: the model.
        tokens: the text.
        n_skipped: leading positions that are not compared.
        kv_types: formats; what they are held against is native KV.
        chunk: tokens that are fed at a time.
    """
    import mlx.core as mx  # not above: an OpenBLAS has to be loaded before it

    formats = ("native", *kv_types)
    runs = [make_caches(model, kv_type) for kv_type in formats]
    found: list[list[tuple[float, bool, float]]] = [[] for _ in formats]
    n = len(tokens) - 1
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        part = mx.array([list(tokens[start:stop])])
        x, per_layer = model.embed(part), model.embed_per_layer(part)
        hidden = [model.hidden(x, run, per_layer) for run in runs]
        mx.eval(hidden)
        for first in range(max(start, n_skipped), stop, ROWS):
            last = min(first + ROWS, stop)
            logits = [_logits(model, x[:, first - start : last - start]) for x in hidden]
            for i in range(last - first):
                # Row by row: what is summed in float64 stays in the processor's caches.
                log_p = [log_softmax(rows[i]) for rows in logits]
                for of, q in zip(found, log_p, strict=True):
                    of.append(_compared(log_p[0], q, tokens[first + i + 1]))
    return [
        _summed(kv_type, _share(model, kv_type, n), of)
        for kv_type, of in zip(formats, found, strict=True)
    ]


def _logits(model: CausalLM, hidden: mx.array) -> np.ndarray:
    """float32 `[L, V]` of final hidden states `[1, L, E]`."""
    import mlx.core as mx

    return np.array(model.logits(hidden)[0].astype(mx.float32))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities `[V]` in float64: a vocabulary is a long sum for float32."""
    x = logits.astype(np.float64)
    x -= x.max()
    return x - np.log(np.exp(x).sum())


def _compared(p: np.ndarray, q: np.ndarray, following: int) -> tuple[float, bool, float]:
    """KL(p || q), whether both choose the same token, and what q says of the one that follows."""
    kl = float((np.exp(p) * (p - q)).sum())
    return kl, bool(p.argmax() == q.argmax()), float(q[following])


def _summed(kv_type: str, share: float, found: Sequence[tuple[float, bool, float]]) -> Quality:
    kl, same, log_p = (np.array(column) for column in zip(*found, strict=True))
    return Quality(
        kv_type,
        share,
        len(kl),
        float(kl.mean()),
        float(np.median(kl)),
        float(kl.max()),
        int(same.sum()),
        float(np.exp(-log_p.mean())),
    )


def _share(model: CausalLM, kv_type: str, n_tokens: int) -> float:
    """Bytes of the caches over those of native 16-bit ones."""
    specs = [spec for spec in model.cache_specs() if spec is not None]
    of, native = (
        sum(spec.nbytes(n_tokens, KVFormat(name, 2)) for spec in specs)
        for name in (kv_type, "native")
    )
    return of / native


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
    for row in (Quality(**row) for row in written["summary"]):
        figures = ["", "", "", ""]
        if row.kv_type != "native":
            figures = [f"{kl:.1e}" for kl in (row.kl_mean, row.kl_median, row.kl_max)]
            figures.append(f"{100 * row.n_same / row.n_positions:.1f}%")
        words = [row.kv_type, *figures, f"{row.perplexity:.3f}", f"{row.share:.2f}"]
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    def formats(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(KV_TYPES):
            raise argparse.ArgumentTypeError(f"{unknown.pop()!r}; allowed: {', '.join(KV_TYPES)}")
        return names

    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_quality", description=__doc__)
    parser.add_argument("--model", required=True, help="a directory or a name mlxkv knows")
    parser.add_argument(
        "--text", type=Path, action="append", metavar="FILE",
        help="what is fed, several in a row; docs/kv.md and docs/design.md by default",
    )  # fmt: skip
    parser.add_argument("--skip", type=int, default=512, help="leading tokens, not compared")
    parser.add_argument("--positions", type=int, default=1024, help="compared behind them")
    parser.add_argument("--kv-types", type=formats, default=["q8", "q4"], metavar="A,B")
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
    rows = measure(model, tokens, args.skip, args.kv_types, args.chunk)
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
        **about(ROOT, "kv_quality"),
        "blas": [device.load_blas() or "reference"],
        "summary": [asdict(row) for row in rows],
    }
    keep(args.output, written, markdown(written))


if __name__ == "__main__":
    main()
