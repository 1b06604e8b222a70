"""llama.cpp's own server, as PyPI has it: `python -m benchmarks.llama_server --model FILE ...`.

`pip install xllamacpp` brings it as a library. Runs until it is killed.
"""

from __future__ import annotations

import argparse
import importlib
import signal
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--parallel", type=int, default=8, help="requests at a time")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each")
    args = parser.parse_args()
    binding: Any = importlib.import_module("xllamacpp")
    params = binding.CommonParams()
    params.model.path = args.model
    params.port, params.n_parallel = args.port, args.parallel
    params.n_ctx = args.context * args.parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    server = binding.Server(params)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
