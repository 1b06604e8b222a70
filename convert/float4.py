"""NVFP4 under a second scale, which MLX has no place for: taken in, or nearest affine values.

NVFP4 has E2M1 values, a scale in E4M3 for each 16, and a float32 for all of them, so that the first
ones keep their digits. MLX has the first only. A power of two goes into them where none of them
leaves the range; their product with another number is no E4M3. There two groups of 16 become an
affine group of 32 at 6 bits, whose step is a quarter of the larger scale: the values of that half
stay, those of the other move by an eighth of that scale at most.
"""

from __future__ import annotations

import numpy as np

from mlxkv.checkpoint.quantization import Format

NEAREST = Format("affine", 6, 32)
_FINER, _MIDDLE = 2, 32

# Twice the values, which are whole numbers then.
_HALVES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


def _e4m3_values() -> np.ndarray:
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    size[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes & 0x80, -size, size).astype(np.float32)


E4M3 = _e4m3_values()
"""Values of the codes of 8-bit floats with 4 bits of exponent."""
E5M2 = (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)
"""The same with 5 bits of exponent: float16 without its lower byte."""


def e8m0(codes: np.ndarray) -> np.ndarray:
    """Powers of two by their exponents, uint8, as float32; NaN for 255."""
    found = np.ldexp(np.float32(1), np.minimum(codes, 254).astype(np.int32) - 127)
    return np.where(codes == 255, np.float32(np.nan), found)


def e2m1(codes: np.ndarray) -> np.ndarray:
    """Values of 4-bit floats, uint8 0 to 15, as float32."""
    return _HALVES[codes].astype(np.float32) / 2


def folded(scales: np.ndarray, seconds: np.ndarray) -> np.ndarray | None:
    """Codes of E4M3 scales that have taken a second scale in, where that changes no value.

    Args:
        scales: codes uint8 `[n, ...]`.
        seconds: float32 `[n]`, of each part.

    Returns:
        uint8 `[n, 256]`, by code; None where one of `scales` times its second scale is no E4M3.
    """
    if (np.frexp(seconds)[0] != 0.5).any():  # nor are digits of a scale lost by powers of two
        return None
    values = E4M3[None] * seconds[:, None]
    order = np.argsort(E4M3[:0x7F])
    places = np.minimum(np.searchsorted(E4M3[:0x7F][order], np.abs(values)), len(order) - 1)
    found = (order[places] | np.arange(256) & 0x80).astype(np.uint8)
    exact = E4M3[found] == values
    fits = all(ok[np.unique(part)].all() for ok, part in zip(exact, scales, strict=True))
    return found if fits else None


def nearest(codes: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values under float32 scales in `NEAREST`.

    Args:
        codes: E2M1, uint8 `[rows, columns]`.
        scales: float32 `[rows, columns / 16]`.

    Returns:
        Codes uint8 `[rows, columns]`, scales and biases float32 `[rows, columns / 32]`, which
        float16 holds.
    """
    rows, columns = codes.shape
    pairs = scales.reshape(rows, columns // 32, 2)
    step = pairs.max(axis=2) / np.float32(2 * _FINER)
    with np.errstate(over="ignore"):  # of a damaged file; the writer refuses infinite scales
        step = step.astype(np.float16).astype(np.float32)
    values = e2m1(codes).reshape(rows, columns // 32, 2, 16) * pairs[..., None]
    divisor = np.where(step == 0, np.float32(1), step)
    found = np.rint(values / divisor[..., None, None]) + _MIDDLE
    found = np.clip(found, 0, 63).astype(np.uint8).reshape(rows, columns)
    return found, step, step * np.float32(-_MIDDLE)
