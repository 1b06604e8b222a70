"""Options that the benchmarks share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_machine_options(
    parser: argparse.ArgumentParser, dtype: str = "auto", of: str = "auto: float32 on the CPU"
) -> None:
    """What is computed with and in, and where the results go.

    Args:
        parser: of the benchmark.
        dtype: the default.
        of: help for it.
    """
    parser.add_argument("--blas", choices=("openblas", "reference"), default="openblas")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of OpenBLAS")
    parser.add_argument("--dtype", default=dtype, help=of)
    parser.add_argument("--output", type=Path, required=True, help="NAME or NAME.json")
