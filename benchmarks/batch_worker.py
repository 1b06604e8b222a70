"""One engine, one process: tokens/s of all sequences of a batch; a JSON object on the last line.

Both run through their own continuous batching, `mlxkv.generation.decoder.Decoder` and mlx-lm's
`BatchGenerator`, greedy, over caches that hold random KV (see `worker.stream_of`).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.worker import fill, load
from mlxkv.base import device

Step = Callable[[], int]
"""One step of a batch; how many tokens it gave."""

FIRST = 5
"""The token that every sequence begins with behind its filled cache."""


def measure_name(lengths: Sequence[int]) -> str:
    """`batch 4 x 64 tok/s`, or `batch 3 x 64 + 2048 tok/s`."""
    groups = [f"{lengths.count(n)} x {n}" for n in dict.fromkeys(lengths)]
    return f"batch {' + '.join(groups).replace('+ 1 x ', '+ ')} tok/s"


def mlxkv_step(model: Any, n_vocab: int, lengths: Sequence[int]) -> Step:
    """mlxkv with a sequence of each length."""
    import mlx.core as mx

    from mlxkv.cache import make_caches
    from mlxkv.generation.decoder import Decoder, Row
    from mlxkv.generation.session import Session
    from mlxkv.sampling.params import SamplingParams
    from mlxkv.sampling.sampler import Sampler

    decoder = Decoder(model)
    for n in lengths:
        session, token = Session(model), mx.array([[FIRST]])
        fill(session.caches, make_caches(model), lambda c: model(mx.array([[1]]), c), n)
        logits = model.last_logits(token, session.caches)
        decoder.add(Row(session, logits, Sampler(SamplingParams(temperature=0), n_vocab)))
    return lambda: len(decoder.step())


def mlx_lm_step(model: Any, n_vocab: int, lengths: Sequence[int]) -> Step:
    """mlx-lm with a sequence of each length."""
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.models.cache import make_prompt_cache

    generator, caches = BatchGenerator(model, max_tokens=10**9, prefill_batch_size=32), []
    for n in lengths:
        cache = make_prompt_cache(model)
        fill(cache, make_prompt_cache(model), lambda c: model(mx.array([[1]]), cache=c), n)
        caches.append(cache)
    generator.insert([[FIRST] for _ in lengths], caches=caches)
    return lambda: len(generator.next_generated())


ENGINES = {"mlxkv": mlxkv_step, "mlx-lm": mlx_lm_step}


def tokens_per_s(step: Step, seconds: float, at_least: int = 8) -> float:
    """Of all sequences together, behind a few steps that do not count."""
    for _ in range(3):
        step()
    start, n_tokens, n_steps = time.perf_counter(), 0, 0
    while n_steps < at_least or time.perf_counter() - start < seconds:
        n_tokens += step()
        n_steps += 1
    return n_tokens / (time.perf_counter() - start)


def figures(
    engine: str, model: Any, n_vocab: int, lengths: Sequence[int], seconds: float
) -> dict[str, float]:
    """What is reported of one batch."""
    step = ENGINES[engine](model, n_vocab, lengths)
    return {measure_name(lengths): tokens_per_s(step, seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=tuple(ENGINES), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--lengths", type=json.loads, required=True, help="of the sequences")
    parser.add_argument("--seconds", type=float, default=4.0)
    args = parser.parse_args()
    model, n_vocab = load(args.engine, args.model, args.dtype)
    found = figures(args.engine, model, n_vocab, args.lengths, args.seconds)
    print(json.dumps({"blas": device.load_blas() or "reference", "figures": found}), flush=True)
    os._exit(0)  # a step is in flight, see `worker`


if __name__ == "__main__":
    main()
