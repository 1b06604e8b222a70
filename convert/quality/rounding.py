"""Rounding to MLX's affine format so that a layer's results change least.

A weight W `[out, in]` of inputs x with second moments M = E[x x^T] is replaced by Q; what counts is
E|(W - Q) x|^2 = sum over rows of (w - q) M (w - q)^T. Two steps lessen it, and the format stays
what `mx.quantize` writes:

1. Each group's scale and bias: its range shrunk by steps, the best kept, then solved for by least
   squares with the codes that were found. Errors count by the diagonal of M.
2. Columns are rounded one after another, those with the largest moments first, and the error of
   each is made up for in those that follow, by the inverse of M (GPTQ, arXiv 2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxkv.checkpoint.quantization import Format

from ..gguf.blocks import packed

SHRINK = {2: 8, 3: 8, 4: 5}
"""Bits -> how many smaller ranges of a group are tried, each by a 16th; one with more bits."""
DAMPING = 0.01
"""Of the mean moment, added to each: a column whose input is always 0 has none."""
COLUMNS = 32
"""Columns whose errors are made up for one by one, before those behind them are in one product."""


@dataclass(frozen=True, slots=True)
class Moments:
    """What is known of a weight's inputs.

    Attributes:
        diagonal: float32 `[in]`, relative.
        order: columns in the order of rounding, `[in]`.
        factor: upper triangle U with U^T U = M^-1, columns in that order, float32 `[in, in]`.
    """

    diagonal: np.ndarray
    order: np.ndarray
    factor: np.ndarray


def moments_of(matrix: np.ndarray, damping: float = DAMPING) -> Moments:
    """Prepare M, `[in, in]`, for rounding; `damping` as `DAMPING`."""
    diagonal = np.diagonal(matrix).astype(np.float32)
    mean = max(float(diagonal.mean()), 1e-30)
    order = np.argsort(-diagonal, kind="stable")
    M = matrix[np.ix_(order, order)].astype(np.float64) / mean
    M[np.diag_indices_from(M)] += damping
    # Backwards: with M = R R^T, R an upper triangle, U is the inverse of R.
    lower = mx.array(np.linalg.cholesky(M[::-1, ::-1]).astype(np.float32))
    inverse = np.array(mx.linalg.tri_inv(lower, stream=mx.cpu))
    factor = np.ascontiguousarray(inverse[::-1, ::-1])
    return Moments(diagonal / np.float32(mean) + np.float32(damping), order, factor)


def rounded(
    values: mx.array, target: Format, dtype: mx.Dtype, moments: Moments | None
) -> tuple[mx.array, mx.array, mx.array]:
    """Rows in an affine format: weight, scales and biases, in the layout of `mx.quantize`.

    Args:
        values: `[n, in]`.
        target: the format.
        dtype: of scales and biases.
        moments: of the inputs; None if all columns count alike.
    """
    n_rows, columns = values.shape
    values = values.astype(mx.float32)
    diagonal = mx.ones(columns) if moments is None else mx.array(moments.diagonal)
    grouped = values.reshape(n_rows, -1, target.group_size)
    scales, biases = fit_groups(grouped, diagonal, target.bits, dtype)
    if moments is None:
        codes = np.array(nearest(grouped, scales, biases, target.bits))
    else:
        weights, of_scales, of_biases = (np.array(x) for x in (values, scales, biases))
        codes = _compensated(weights, of_scales, of_biases, target, moments)
    weight = packed(codes.astype(np.uint8).reshape(-1), target.bits).reshape(n_rows, -1)
    weight = mx.array(np.ascontiguousarray(weight).view("<u4"))
    return weight, scales.astype(dtype), biases.astype(dtype)


def fit_groups(
    values: mx.array, diagonal: mx.array, bits: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Scales and biases of groups, as `dtype` holds them, float32 `[n, groups]`.

    Args:
        values: float32 `[n, groups, group]`.
        diagonal: how much an error of each column counts, `[groups * group]`.
        bits: of a code.
        dtype: of scales and biases.
    """
    weight = diagonal.reshape(values.shape[1:])
    low, high = values.min(-1), values.max(-1)
    tried = [1 - i / 16 for i in range(1 + SHRINK.get(bits, 1))]
    candidates = [((high - low) * (part / (2**bits - 1)), low * part) for part in tried]
    best = _best(values, weight, bits, candidates, dtype)
    refined = _least_squares(values, nearest(values, *best, bits), weight)
    return _best(values, weight, bits, [best, refined], dtype)


def _best(
    values: mx.array,
    weight: mx.array,
    bits: int,
    candidates: list[tuple[mx.array, mx.array]],
    dtype: mx.Dtype,
) -> tuple[mx.array, mx.array]:
    """Of pairs of scales and biases, each group's with the smallest error, as `dtype` holds it."""
    least: mx.array | None = None
    scales = biases = mx.array(0.0)
    for pair in candidates:
        scale, bias = (part.astype(dtype).astype(mx.float32) for part in pair)
        codes = nearest(values, scale, bias, bits)
        off = values - codes * scale[..., None] - bias[..., None]
        error = (mx.square(off) * weight).sum(-1)
        better = mx.array(True) if least is None else error < least
        least = error if least is None else mx.where(better, error, least)
        scales, biases = mx.where(better, scale, scales), mx.where(better, bias, biases)
        mx.eval(least, scales, biases)
    return scales, biases


def _least_squares(
    values: mx.array, codes: mx.array, weight: mx.array
) -> tuple[mx.array, mx.array]:
    """The scale and bias under which these codes are nearest to the values, `[n, groups]`."""
    total = weight.sum(-1)
    mean_code, mean_value = ((part * weight).sum(-1) / total for part in (codes, values))
    centred = (codes - mean_code[..., None]) * weight
    scale = (centred * values).sum(-1) / mx.maximum((centred * codes).sum(-1), 1e-12)
    return scale, mean_value - scale * mean_code


def nearest(values: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    """The nearest codes, float32 like `values`."""
    steps = mx.where(scales == 0, 1.0, scales)[..., None]
    return mx.clip(mx.round((values - biases[..., None]) / steps), 0, 2**bits - 1)


def _compensated(
    values: np.ndarray, scales: np.ndarray, biases: np.ndarray, target: Format, moments: Moments
) -> np.ndarray:
    """Codes `[n, in]`, each column's error made up for in those that are rounded later."""
    order, U = moments.order, moments.factor
    W = np.ascontiguousarray(values.T[order])  # [in, n]
    scale = np.ascontiguousarray(scales.T)[order // target.group_size]
    bias = np.ascontiguousarray(biases.T)[order // target.group_size]
    step = np.where(scale == 0, np.float32(1), scale)
    codes, top = np.empty_like(W), 2**target.bits - 1
    for start in range(0, len(W), COLUMNS):
        stop = min(start + COLUMNS, len(W))
        errors = np.empty_like(W[start:stop])
        for j in range(start, stop):
            code = np.clip(np.rint((W[j] - bias[j]) / step[j]), 0, top)
            errors[j - start] = (W[j] - code * scale[j] - bias[j]) / U[j, j]
            codes[j] = code
            W[j + 1 : stop] -= U[j, j + 1 : stop, None] * errors[j - start]
        W[stop:] -= U[start:stop, stop:].T @ errors
    back = np.empty_like(codes)
    back[order] = codes
    return back.T
