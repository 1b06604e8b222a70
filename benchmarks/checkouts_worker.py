"""One figure of one checkout, which PYTHONPATH names; uses the public API alone."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import mlxkv

N_TOKENS, N_TIMES = 96, 5


def main(figure: str, model: str, *rest: str) -> None:
    llm = mlxkv.load(model, dtype="float32")
    prompt = list(range(10, 42))
    if figure == "host":
        tiny = Path(rest[0])
        # Its vocabulary has 256 tokens; these ids are in it, and none of them ends an answer.
        llm = mlxkv.LLM(mlxkv.load_model(tiny), llm.tokenizer, tiny)
    times = []
    for _ in range(N_TIMES + 1):
        chunks = llm.stream(prompt, max_tokens=N_TOKENS)
        next(chunks)
        start = time.thread_time()  # of this thread: MLX computes on others
        *_, last = chunks
        assert last.stats is not None
        n = last.stats.generated_tokens - 1
        times.append((time.thread_time() - start if figure == "host" else last.stats.decode_s) / n)
    scale = 1e6 if figure == "host" else 1e3
    print(scale * statistics.median(times[1:]))  # the first compiles


if __name__ == "__main__":
    main(*sys.argv[1:])
