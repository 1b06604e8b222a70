"""Eight clients at one server on the CPU: prints its figures as a JSON object on its last line.

Prompts of 64 tokens and greedy answers of 128, all at the same time, each a text of its own.
llama.cpp's server is the one of `benchmarks.llama_server`, with a place for each client.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from benchmarks.load_server import LLAMA_CPP
from benchmarks.serve import Bench, Setting, cut_with, has_template

CLIENTS, PROMPT, ANSWER, LIMIT_S = 8, 64, 128, 900


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("mlxkv", "mlx-lm", LLAMA_CPP), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--index", type=int, default=0, help="another one asks other texts")
    args = parser.parse_args()
    is_llama = args.engine == LLAMA_CPP
    options = [f"--threads={args.threads}"] if is_llama else []
    bench = Bench(
        args.gguf if is_llama else args.model,
        dict(os.environ),
        {args.engine: options},
        ANSWER,
        LIMIT_S,
        cut_with(args.model),
        has_template(args.model),
    )
    setting = Setting(f"{CLIENTS} x {PROMPT}", (PROMPT,) * CLIENTS)
    run, _ = bench.run(setting, args.engine, args.index)
    print(json.dumps(run.figures), flush=True)


if __name__ == "__main__":
    main()
