"""What a plan says beside what MLX's peak memory reads, over lengths and chunks.

python -m benchmarks.plan --model smollm2:135m --output benchmarks/results/smollm2-plan
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx

from benchmarks.report import about
from mlxkv.generation.decoder import Row as DecoderRow
from mlxkv.generation.decoder import decode
from mlxkv.generation.session import Session
from mlxkv.llm.llm import LLM, load
from mlxkv.llm.plan import plan
from mlxkv.sampling.params import SamplingParams
from mlxkv.sampling.sampler import Sampler

ROOT = Path(__file__).parent.parent
N_DECODED = 8


@dataclass(frozen=True, slots=True)
class Row:
    """One run: bytes of weights, KV and workspace, planned and measured."""

    kv_type: str
    n_prompt: int
    chunk: int
    planned_bytes: int
    peak_bytes: int
    planned_kv_bytes: int
    kv_bytes: int

    @property
    def off(self) -> float:
        """By how much the plan misses, of the peak."""
        return self.planned_bytes / self.peak_bytes - 1


def measure(llm: LLM, model: str, kv_type: str, n_prompt: int, chunk: int) -> Row:
    """A prompt and a few tokens, with nothing else in memory but the model."""
    needs = plan(model, context=n_prompt + N_DECODED, kv_type=kv_type, chunk=chunk)
    mx.clear_cache()
    mx.synchronize()
    others = mx.get_active_memory() - llm.budget.weights_bytes
    mx.reset_peak_memory()
    session = Session(llm.model, kv_type)
    n_vocab = llm.config.vocab_size
    prompt = [(7919 * i + 5) % n_vocab for i in range(n_prompt)]
    logits = session.prefill(prompt, chunk=chunk)
    list(decode(DecoderRow(session, logits, Sampler(SamplingParams(), n_vocab), N_DECODED)))
    mx.synchronize()
    return Row(
        kv_type,
        n_prompt,
        chunk,
        needs.total_bytes,
        mx.get_peak_memory() - others,
        needs.kv_bytes,
        session.nbytes,
    )


def markdown(rows: list[Row]) -> str:
    """A table."""
    lines = [
        "| KV | prompt | chunk | planned MiB | peak MiB | off | KV |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        kv = "exact" if row.kv_bytes == row.planned_kv_bytes else "differs"
        planned, peak = row.planned_bytes / 2**20, row.peak_bytes / 2**20
        lines.append(
            f"| {row.kv_type} | {row.n_prompt:,} | {row.chunk} | {planned:.1f} | {peak:.1f} | "
            f"{row.off:+.1%} | {kv} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run it and write NAME.json and NAME.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--lengths", default="100,600,2000")
    parser.add_argument("--chunks", default="64,256")
    parser.add_argument("--kv-types", default="native,q8")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    lengths = [int(n) for n in args.lengths.split(",")]
    chunks = [int(n) for n in args.chunks.split(",")]
    llm = load(args.model)
    rows = [
        measure(llm, args.model, kv_type, n, chunk)
        for kv_type in args.kv_types.split(",")
        for n in lengths
        for chunk in chunks
    ]
    table = markdown(rows)
    print(table)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        made = {**about(ROOT, "benchmarks.plan"), "rows": [asdict(row) for row in rows]}
        args.output.with_suffix(".json").write_text(json.dumps(made, indent=1) + "\n", "utf-8")
        args.output.with_suffix(".md").write_text(table, "utf-8")


if __name__ == "__main__":
    main()
