"""Compute with a library that was just built: `python -m mlxkv.cpu.trial PATH`.

In a process of its own: one that does not fit MLX may crash it, and must not be kept.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import mlx.core as mx

from mlxkv.cpu.formats import DENSE, KINDS, NO_ACT
from mlxkv.cpu.library import load

TOLERANCE = 1e-4
"""Of the largest value; sums in another order differ by 1e-6."""


def computes(ops: ModuleType) -> bool:
    """Whether a dense and a packed product are right, of one row and of a chunk."""
    weight = mx.random.normal((64, 128))
    codes, scales, biases = mx.quantize(weight, group_size=32, bits=4)
    packed = codes, scales, biases, KINDS["affine", 4], 32, None
    dense = weight, None, None, DENSE[mx.float32], 0, None
    unpacked = mx.dequantize(codes, scales=scales, biases=biases, group_size=32, bits=4)
    for n_rows in (1, 20):
        x = mx.random.normal((1, n_rows, 128))
        for given, values in ((dense, weight), (packed, unpacked)):
            found, right = ops.linear(x, given, None, -1.0, None, NO_ACT), x @ values.T
            if not mx.all(mx.abs(found - right) < TOLERANCE * mx.abs(right).max()).item():
                return False
    return True


if __name__ == "__main__":
    mx.set_default_device(mx.Device(mx.cpu))
    if not computes(load(Path(sys.argv[1]))):
        sys.exit("the built kernels compute wrong products")
