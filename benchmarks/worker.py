"""One engine, one process, one measurement: prints a JSON object on its last line.

Both engines run through their own loop: `Session.prefill` and `decoder.decode`, and
`mlx_lm.generate.generate_step`, greedy. `base.device` is imported first in both cases, so that both
compute with the same BLAS.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlxkv.base import device

PROMPT_AT_ZERO = 8
"""Tokens of prompt that count as "context 0"."""

BITS = {"q8": 8, "q4": 4}
"""KV format -> what mlx-lm calls it; both have groups of 64 where 64 divides the head."""

Stream = Callable[..., Iterator[int]]


def load(engine: str, model_dir: Path, dtype: str) -> tuple[Any, int]:
    """The model in `dtype` ("auto": float32 on the CPU, else the checkpoint's), and V."""
    import mlx.core as mx

    if engine == "mlxkv":
        from mlxkv.models.loader import load_model

        model = load_model(model_dir, dtype)
        return model, model.config.vocab_size
    from mlx_lm.utils import load_model as load_mlx_lm

    model, config = load_mlx_lm(model_dir, lazy=True)
    if dtype == "auto" and device.on_cpu():
        dtype = "float32"
    if dtype != "auto":
        # The scales of packed weights as well: 16-bit scales are several times slower on the CPU.
        model.set_dtype(getattr(mx, dtype))
    mx.eval(model.parameters())
    return model, config["vocab_size"]


def stream_of(engine: str, model: Any, n_vocab: int, kv_type: str = "native") -> Stream:
    """(tokens, n) -> the endless greedy continuation, with the engine's own chunks and caches.

    The caches hold n tokens of random KV before the prompt: decoding over 8192 tokens costs the
    same as behind a real prompt of that length, which takes minutes where a prefill is slow.
    """
    import mlx.core as mx

    if engine == "mlxkv":
        from mlxkv.cache import make_caches
        from mlxkv.generation.decoder import Row, decode
        from mlxkv.generation.session import Session
        from mlxkv.sampling.params import SamplingParams
        from mlxkv.sampling.sampler import Sampler

        def ours(tokens: list[int], n_filled: int = 0) -> Iterator[int]:
            session, native = Session(model, kv_type), make_caches(model)
            fill(session.caches, native, lambda native: model(mx.array([[1]]), native), n_filled)
            del native
            for _ in range(n_filled):
                session.append(1)
            logits = session.prefill([*[1] * n_filled, *tokens])
            sampler = Sampler(SamplingParams(temperature=0), n_vocab)
            yield from decode(Row(session, logits, sampler))

        return ours
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    def theirs(tokens: list[int], n_filled: int = 0) -> Iterator[int]:
        caches = make_prompt_cache(model)
        pack_mlx_lm(caches, kv_type)
        native = make_prompt_cache(model)
        fill(caches, native, lambda native: model(mx.array([[1]]), cache=native), n_filled)
        del native
        for token, _ in generate_step(mx.array(tokens), model, max_tokens=-1, prompt_cache=caches):
            yield token

    return theirs


def pack_mlx_lm(caches: list[Any], kv_type: str) -> list[str]:
    """Replace mlx-lm's empty caches by its packed ones, which `generate_step` does for `kv_bits`.

    That gives up on a model with a cache that cannot be packed; here such a layer stays native.

    Returns:
        Why, for each layer that did.
    """
    if kv_type == "native":
        return []
    bits, reasons = BITS[kv_type], []
    for i, cache in enumerate(caches):
        try:
            caches[i] = cache.to_quantized(group_size=64, bits=bits)
        except (AttributeError, NotImplementedError) as error:
            reasons.append(str(error))
    return reasons


def left_native(model: Any, kv_type: str) -> str:
    """What a reader has to know about mlx-lm's packed KV of this model; "" if it is all packed."""
    from mlx_lm.models.cache import make_prompt_cache

    caches = make_prompt_cache(model)
    reasons = pack_mlx_lm(caches, kv_type)
    if not reasons:
        return ""
    return f"{kv_type}: {len(reasons)} of {len(caches)} layers native ({reasons[0]})"


def fill(caches: list[Any], like: list[Any], one_token: Callable[[Any], Any], n: int) -> None:
    """Bring caches to `n` tokens of random KV.

    Args:
        caches: empty, packed or not.
        like: empty native ones; a token goes through the model on these, for the shapes.
        one_token: computes a token on caches.
        n: tokens.
    """
    import mlx.core as mx

    if n == 0:
        return
    mx.eval(one_token(like))
    for cache, native in zip(caches, like, strict=True):
        # One block over and over: drawing a long context takes longer than decoding behind it.
        block = [
            mx.random.normal((*x.shape[:2], 512, x.shape[3])).astype(x.dtype)
            for x in (native.keys, native.values)
        ]
        for start in range(0, n, 512):
            L = min(512, n - start)
            cache.update_and_fetch(*(x[:, :, :L] for x in block))
            mx.eval(cache.state)
    mx.clear_cache()


def synthetic(n: int, n_vocab: int) -> list[int]:
    """Token ids that look like nothing, the same for both engines."""
    return [(i * 7919 + 13) % (n_vocab - 10) + 5 for i in range(n)]


def speed(
    stream: Stream,
    n_vocab: int,
    prefills: list[int],
    contexts: list[int],
    seconds: float,
    kv_type: str = "native",
) -> dict[str, float]:
    """Prefill tokens/s to the first token, and decode tokens/s behind it."""
    figures: dict[str, float] = {}
    kv = "" if kv_type == "native" else f"{kv_type} "
    _pull(stream(synthetic(PROMPT_AT_ZERO, n_vocab)), 0.0, 4)  # kernels, compilers, first pages
    for n in prefills:
        start, start_cpu = time.perf_counter(), _cpu_s()
        tokens = stream(synthetic(n, n_vocab))
        next(tokens)
        figures[f"prefill {n} {kv}tok/s"] = n / (time.perf_counter() - start)
        figures[f"prefill {n} {kv}cpu ms/tok"] = 1e3 * (_cpu_s() - start_cpu) / n
        tokens.close()
    for n in contexts:
        tokens = stream(synthetic(PROMPT_AT_ZERO, n_vocab), max(0, n - PROMPT_AT_ZERO))
        _pull(tokens, 0.0, 2)
        start_cpu = _cpu_s()
        n_steps, elapsed = _pull(tokens, seconds, 8)
        figures[f"decode {n} {kv}tok/s"] = n_steps / elapsed
        figures[f"decode {n} {kv}cpu ms/tok"] = 1e3 * (_cpu_s() - start_cpu) / n_steps
        tokens.close()
    return figures


def _pull(tokens: Iterator[int], seconds: float, at_least: int) -> tuple[int, float]:
    start, n = time.perf_counter(), 0
    while n < at_least or time.perf_counter() - start < seconds:
        next(tokens)
        n += 1
    return n, time.perf_counter() - start


def graph(stream: Stream, n_vocab: int, n_steps: int = 200) -> dict[str, float]:
    """Host time of one step: from asking for a token until its graph is handed to MLX.

    Both loops end a step with one `mx.async_eval`. Here it evaluates to the end and its time is
    not counted, so that nothing runs while the next graph is built.
    """
    import mlx.core as mx

    figures = {}
    tokens = stream(synthetic(PROMPT_AT_ZERO, n_vocab))
    _pull(tokens, 0.0, 20)
    figures["whole step ms"] = 1e3 * statistics.median(_times(tokens, n_steps))
    tokens.close()

    handed_over = []

    def async_eval(*arrays: Any) -> None:
        handed_over.append(time.perf_counter())
        mx.eval(*arrays)

    original, mx.async_eval = mx.async_eval, async_eval
    try:
        tokens = stream(synthetic(PROMPT_AT_ZERO, n_vocab))
        _pull(tokens, 0.0, 20)
        built = []
        for _ in range(n_steps):
            handed_over.clear()
            start = time.perf_counter()
            next(tokens)
            built.append(handed_over[0] - start)
    finally:
        mx.async_eval = original
    figures["graph ms"] = 1e3 * statistics.median(built)
    return figures


def _times(tokens: Iterator[int], n: int) -> Iterator[float]:
    for _ in range(n):
        start = time.perf_counter()
        next(tokens)
        yield time.perf_counter() - start


def memory(stream: Stream, n_vocab: int, n_prompt: int, n_steps: int = 64) -> dict[str, float]:
    """Peaks of this whole process, loading included."""
    import mlx.core as mx

    figures = {"loaded peak MiB": mx.get_peak_memory() / 2**20}
    _pull(stream(synthetic(n_prompt, n_vocab)), 0.0, n_steps)
    figures["MLX peak MiB"] = mx.get_peak_memory() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    figures["process peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    return figures


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("mlxkv", "mlx-lm"), required=True)
    parser.add_argument("--measure", choices=("speed", "graph", "memory"), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-type", choices=("native", *BITS), default="native")
    parser.add_argument("--prefills", type=json.loads, default=[])
    parser.add_argument("--contexts", type=json.loads, default=[])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--prompt", type=int, default=2048)
    args = parser.parse_args()

    model, n_vocab = load(args.engine, args.model, args.dtype)
    stream = stream_of(args.engine, model, n_vocab, args.kv_type)
    match args.measure:
        case "speed":
            lengths = args.prefills, args.contexts
            figures = speed(stream, n_vocab, *lengths, args.seconds, args.kv_type)
        case "graph":
            figures = graph(stream, n_vocab)
        case _:
            figures = memory(stream, n_vocab, args.prompt)
    note = left_native(model, args.kv_type) if args.engine == "mlx-lm" else ""
    blas = device.load_blas() or "reference"
    print(json.dumps({"blas": blas, "figures": figures, "note": note}), flush=True)
    # Both loops leave a step in flight, and OpenBLAS' exit handler can wait for it forever.
    os._exit(0)


if __name__ == "__main__":
    main()
