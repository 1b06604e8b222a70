"""What a model computes in, and what its weights are kept in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import mlx.core as mx

from mlxkv.base import device
from mlxkv.checkpoint.config import text_config
from mlxkv.checkpoint.weights import Weights
from mlxkv.errors import UsageError
from mlxkv.nn import kernels
from mlxkv.nn.encoders import encoder_of
from mlxkv.nn.linear import Product
from mlxkv.nn.model import CausalLM
from mlxkv.nn.moe import ExpertLinear

DTYPES: dict[str, mx.Dtype] = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
}
"""Names of the dtypes that a model can compute in."""


def checkpoint_dtype(raw: Mapping[str, Any], weights: Weights) -> mx.Dtype:
    """The dtype that a checkpoint was made for: that of 16-bit affine scales, if it has any, else
    what its config says, else most of its bytes.

    A converter may have cast everything and left the config as it was, and the other 16-bit dtype
    does not hold the scales. float32 scales do not decide: beside bfloat16 values they hold the
    float16 scales of a GGUF file.
    """
    scales = {name: info for name, info in weights.infos.items() if name.endswith(".scales")}
    of_scales = Weights(scales).dtype
    if of_scales != mx.float32:
        return of_scales
    config = text_config(raw)
    named = config.get("torch_dtype") or config.get("dtype")
    return DTYPES.get(named, weights.dtype) if isinstance(named, str) else weights.dtype


def scale_dtypes(weights: Mapping[str, mx.array], target: mx.Dtype) -> dict[str, mx.Dtype]:
    """What affine scales and biases are kept in: the target if it holds them, else float32.

    float16 and bfloat16 do not hold each other's values. Scales in the dtype of the file would all
    be cast to float32 in every product.
    """
    exact: dict[str, mx.Dtype] = {}
    for name, array in weights.items():
        module, _, kind = name.rpartition(".")
        scales = weights.get(f"{module}.scales")
        if kind in ("scales", "biases") and scales is not None and is_float(scales):
            exact[name] = target if array.dtype == target else mx.float32
    return exact


def compute_dtype(dtype: mx.Dtype | str, checkpoint: mx.Dtype) -> mx.Dtype:
    """What a model computes in.

    Raises:
        UsageError: not "auto" and not one of `DTYPES`.
    """
    if dtype == "auto":
        return device.default_dtype(checkpoint)
    if isinstance(dtype, mx.Dtype) and dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise UsageError(f"dtype must be one of auto, {', '.join(DTYPES)}; got {dtype!r}")


def without_float16(model: CausalLM, asked: mx.Dtype | str, found: mx.Dtype) -> mx.Dtype:
    """The dtype `found`, or float32 in place of float16 for a model that it overflows.

    Raises:
        UsageError: float16 was asked for.
    """
    if found != mx.float16 or not model.overflows_float16:
        return found
    if asked != "auto":
        raise UsageError("must not be float16: this model's values overflow it", field="dtype")
    return mx.float32


def in_dtype(
    model: CausalLM, weights: Mapping[str, mx.array], dtype: mx.Dtype
) -> dict[str, mx.array]:
    """A model's lazy weights in the dtypes they are kept in, where `dtype` is computed in."""
    exact = scale_dtypes(weights, dtype)
    as_they_are = _taken_by_kernels(model, weights) if dtype == mx.float32 else frozenset()
    return {
        name: array
        if model.keeps_dtype(name) or not is_float(array) or name in as_they_are
        else array.astype(exact.get(name, dtype))
        for name, array in weights.items()
    }


def _taken_by_kernels(model: CausalLM, weights: Mapping[str, mx.array]) -> Collection[str]:
    """Weights and scales of products, whose kernels read 16 bits."""
    found = []
    for at, module in model.weights_root().named_modules():
        if encoder_of(at) is None and isinstance(module, Product | ExpertLinear):
            names = (f"{at}.{name}" for name in ("weight", "scales", "biases"))
            if kernels.takes(module):
                found += [name for name in names if name in weights]
    return frozenset(found)


def is_float(array: mx.array) -> bool:
    """Whether its values are floats."""
    return mx.issubdtype(array.dtype, mx.floating)
