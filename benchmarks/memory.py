"""What a live cache takes while it grows: `python -m benchmarks.memory`.

A cache grows by 256 tokens and is copied then. Layer by layer the transient of that is one layer's
buffer; were all layers' old buffers kept until the step ends it would be the whole cache.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks import checkpoints
from benchmarks.worker import load, stream_of, synthetic
from mlxkv.kv.types import STEP


def growth(engine: str, model_dir: Path, n_tokens: int) -> dict[str, float]:
    """Peak over what is active afterwards, of a step that grows and of the one behind it, in MiB.

    Args:
        engine: "mlxkv" or "mlx-lm".
        model_dir: a model whose activations are small beside its KV.
        n_tokens: a multiple of the step, so that the caches are full.
    """
    import mlx.core as mx

    model, n_vocab = load(engine, model_dir, "float32")
    # Filled to a few tokens before the step.
    tokens = stream_of(engine, model, n_vocab)(synthetic(8, n_vocab), n_tokens - 12)
    peaks = []
    for _ in range(8):
        mx.synchronize()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        next(tokens)
        mx.synchronize()
        after = mx.get_active_memory()
        peaks.append((after - before, mx.get_peak_memory() - after))
    tokens.close()
    at = max(range(1, len(peaks)), key=lambda i: peaks[i][0])  # 0 is the prefill
    return {
        "grown MiB": peaks[at][0] / 2**20,
        "transient MiB": peaks[at][1] / 2**20,
        "transient of another step MiB": peaks[at - 1][1] / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--layers", type=int, default=30)
    args = parser.parse_args()
    n_kv_heads, head_dim = 3, 64  # those of SmolLM2-135M
    row = n_kv_heads * head_dim * 4 * 2
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = checkpoints.write_tiny_llama(
            Path(scratch), args.layers, n_kv_heads=n_kv_heads, head_dim=head_dim
        )
        for n in args.tokens:
            for engine in ("mlxkv", "mlx-lm"):
                layer = {"engine": engine, "tokens": n, "a layer MiB": row * (n + STEP) / 2**20}
                print(json.dumps(layer | growth(engine, model_dir, n)), flush=True)


if __name__ == "__main__":
    main()
