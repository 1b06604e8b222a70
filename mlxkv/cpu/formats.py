"""How weights and activations are told to the kernels; numbers as in `src/kernels.h`."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

KINDS = {
    ("affine", 2): 0,
    ("affine", 3): 1,
    ("affine", 4): 2,
    ("affine", 5): 3,
    ("affine", 6): 4,
    ("affine", 8): 5,
    ("mxfp4", 4): 6,
    ("nvfp4", 4): 6,
    ("mxfp8", 8): 7,
}
DENSE = {mx.bfloat16: 8, mx.float16: 9, mx.float32: 10}
GROUPS = {"affine": (32, 64, 128), "mxfp4": (32,), "nvfp4": (16,), "mxfp8": (32,)}
MOST_GROUPS = 2048
NO_ACT = (0, 0.0, 0.0)
ACTS = {"silu": (1, 0.0, 0.0), "swish": (1, 0.0, 0.0), "gelu_pytorch_tanh": (2, 0.0, 0.0)}
ACTS |= {"gelu_new": ACTS["gelu_pytorch_tanh"], "gelu_fast": ACTS["gelu_pytorch_tanh"]}
"""Name of an activation -> its number and two values of its own."""

Weight = tuple[mx.array, mx.array | None, mx.array | None, int, int, mx.array | None]
"""Values or codes, scales, biases, kind, values of a group, and the bias of the product."""


def clamped(alpha: float, limit: float) -> tuple[int, float, float]:
    """GPT-OSS's activation, see `models.gpt_oss.clamped_swiglu`."""
    return 3, alpha, limit


def weight_of(module: Any, *, looks: bool = True) -> Weight | None:
    """A projection's weight as the kernels take it; None in a format that they do not have.

    Symmetric biases are left out: the kernels' codes are signed. Without `looks` they stay, and no
    value is read.
    """
    w, bias = module["weight"], module.get("bias")
    if not is_known(module) or (bias is not None and bias.dtype != mx.float32):
        return None
    if "scales" not in module:
        return w, None, None, DENSE[w.dtype], 0, bias
    kind, scales, bits = KINDS[module.mode, module.bits], module["scales"], module.bits
    group, biases = module.group_size, module.get("biases")
    if looks and biases is not None and _is_symmetric(scales, biases, bits):
        biases = None
    return w, scales, biases, kind, group, bias


def is_known(module: Any) -> bool:
    """Whether the kernels have the format of a projection's weight."""
    if "scales" not in module:
        w = module["weight"]
        return w.dtype in DENSE and w.shape[-1] % 32 == 0
    group, n_groups = module.group_size, module["scales"].shape[-1]
    is_listed = (module.mode, module.bits) in KINDS and group in GROUPS[module.mode]
    return is_listed and n_groups * group % 32 == 0 and n_groups <= MOST_GROUPS


def narrowed(scales: mx.array, biases: mx.array | None) -> dict[str, mx.array]:
    """Float32 scales and biases in float16, by name; nothing if a value would be another."""
    found = {"scales": scales} if biases is None else {"scales": scales, "biases": biases}
    if any(array.dtype != mx.float32 for array in found.values()):
        return {}
    halves = {name: array.astype(mx.float16) for name, array in found.items()}
    same = [mx.array_equal(halves[name].astype(mx.float32), found[name]) for name in found]
    return halves if all(equal.item() for equal in same) else {}


def _is_symmetric(scales: mx.array, biases: mx.array, bits: int) -> bool:
    middle = 1 << (bits - 1)
    return bool(mx.all(biases.astype(mx.float32) == scales.astype(mx.float32) * -middle).item())
