"""One engine on the CPU, one process: prints its figures as a JSON object on its last line.

llama.cpp runs as PyPI has it built (`pip install cyllama`: AVX2), in a loop of its calls with its
defaults: batches of 512 tokens, flash attention and 16-bit KV where it chooses them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import worker
from mlxkv.cpu.library import library

CONTEXT = 4096
"""Tokens that llama.cpp makes room for."""


def llama_cpp(gguf: Path, n_threads: int) -> tuple[worker.Stream, int]:
    """llama.cpp's greedy continuation, as `worker.stream_of`, and V."""
    binding: Any = importlib.import_module("cyllama.llama.llama_cpp")
    binding.disable_logging()
    model = binding.LlamaModel(str(gguf), binding.LlamaModelParams())
    params = binding.LlamaContextParams()
    params.n_ctx, params.n_threads, params.n_threads_batch = CONTEXT, n_threads, n_threads
    context = binding.LlamaContext(model, params)
    sampler = binding.LlamaSampler(binding.LlamaSamplerChainParams())
    sampler.add_greedy()
    step = context.n_batch

    def stream(tokens: list[int], n_filled: int = 0) -> Iterator[int]:
        context.kv_cache_clear()
        batch = binding.LlamaBatch(n_tokens=step, embd=0, n_seq_max=1)
        rest, position = [*[1] * n_filled, *tokens], 0
        while True:
            for at in range(0, len(rest), step):
                batch.clear()
                for token in rest[at : at + step]:
                    batch.add(token, position, [0], False)
                    position += 1
                batch.set_last_logits_to_true()
                context.decode(batch)
            token = sampler.sample(context, -1)
            yield token
            rest = [token]

    return stream, model.get_vocab().n_vocab


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("mlxkv", "mlx-lm", "llama.cpp"), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--prefills", type=json.loads, default=[])
    parser.add_argument("--contexts", type=json.loads, default=[])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    if args.engine == "llama.cpp":
        stream, n_vocab = llama_cpp(args.gguf, args.threads)
    else:
        if (kernels := library()) is not None:
            kernels.threads(args.threads)
        model: Any
        model, n_vocab = worker.load(args.engine, args.model, "auto")
        stream = worker.stream_of(args.engine, model, n_vocab)
    figures = worker.speed(stream, n_vocab, args.prefills, args.contexts, args.seconds)
    print(json.dumps(figures), flush=True)
    os._exit(0)  # as in `worker`


if __name__ == "__main__":
    main()
