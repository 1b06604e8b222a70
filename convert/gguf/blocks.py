"""ggml's blocks of quantized values in MLX's formats.

MLX's affine format is `scale * q + bias` with q unsigned, for groups of 32, 64 or 128 values. Most
ggml types are that, their bits in another order: scales are a float16 times a small integer, exact
in float32 as its product with q is; only the sum with the bias is rounded, here and there alike.
Types with groups of 16 get the nearest group of 32, which docs/design.md has measurements of.

Layout of ggml's types: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from mlxkv.checkpoint.quantization import Format

from .file import dequantize

Scales = tuple[np.ndarray, np.ndarray]
"""Scales and biases of the groups of some blocks, float32 `[blocks, groups of a block]`."""


@dataclass(frozen=True, slots=True)
class Affine:
    """A ggml type in MLX's affine format.

    Attributes:
        bits, group_size: of the format.
        block_bytes: of one ggml block.
        scales: of blocks, uint8 `[n, block_bytes]`.
        codes: of the blocks' values, uint8 `[n, values]`; None to find them by the values.
        exact_in: the dtype that holds scales and biases exactly; None for a type that gets the
            nearest form, whose scales are in 16 bits.
    """

    bits: int
    group_size: int
    block_bytes: int
    scales: Callable[[np.ndarray], Scales]
    codes: Callable[[np.ndarray], np.ndarray] | None = None
    exact_in: str | None = "float32"

    @property
    def format(self) -> Format:
        return Format("affine", self.bits, self.group_size)


def format_of(type_name: str) -> Format | None:
    """MLX's format of a ggml type; None for a type that is dequantized."""
    affine = AFFINE_TYPES.get(type_name)
    return FLOAT4_TYPES.get(type_name) if affine is None else affine.format


def is_exact(type_name: str, scale_dtype: str) -> bool:
    """Whether a type's values in `format_of` it are the same to the bit, with such scales."""
    if type_name in FLOAT4_TYPES:
        return True
    exact_in = AFFINE_TYPES[type_name].exact_in
    return exact_in is not None and scale_dtype in (exact_in, "float32")


def in_mlx_format(rows: np.ndarray, type_name: str) -> tuple[np.ndarray, ...]:
    """Stored rows of a ggml type in the layout of `mx.quantize`.

    Args:
        rows: uint8 `[n, row_bytes]`.
        type_name: one with a `format_of`.

    Returns:
        weight uint32 `[n, columns * bits / 32]` and scales `[n, columns / group]`: float32 with
        biases like them, or uint8.
    """
    if type_name in FLOAT4_TYPES:
        return _FLOAT4[type_name](rows)
    kind, n_rows = AFFINE_TYPES[type_name], len(rows)
    blocks = rows.reshape(-1, kind.block_bytes)
    # Scales of a damaged file may be NaN or infinite; the writer checks them.
    with np.errstate(all="ignore"):
        scales, biases = (np.asarray(part, np.float32) for part in kind.scales(blocks))
        if kind.codes is None:
            values = dequantize(rows, type_name).reshape(*scales.shape, kind.group_size)
            codes = _nearest(values, scales, biases, kind.bits)
        else:
            codes = kind.codes(blocks)
    weight = packed(codes.reshape(-1), kind.bits).reshape(n_rows, -1)
    return weight.view("<u4"), scales.reshape(n_rows, -1), biases.reshape(n_rows, -1)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes, uint8 `[n]` with n a multiple of 8, as MLX's bytes: a stream of bits, lowest first."""
    if bits == 8:
        return codes
    if bits == 4:
        return codes[0::2] | (codes[1::2] << np.uint8(4))
    words = np.zeros(len(codes) // 8, np.uint64)
    for i in range(8):
        words |= codes[i::8].astype(np.uint64) << np.uint64(bits * i)
    return np.ascontiguousarray(words.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :bits])


def _nearest(values: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    """Codes of values `[..., groups, group]` that give them, or what is nearest."""
    steps = np.where(scales == 0, np.float32(1), scales)
    codes = np.rint((values - biases[..., None]) / steps[..., None])
    return np.clip(codes, 0, 2**bits - 1).astype(np.uint8)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at this byte of each block, as float32 `[n, 1]`."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _symmetric(scales: np.ndarray, bits: int) -> Scales:
    """Of codes whose middle stands for 0."""
    return scales, scales * np.float32(-(1 << (bits - 1)))


def _nibbles(blocks: np.ndarray) -> np.ndarray:
    """Codes of the 16 bytes at the end of each block: first all low halves, then all high ones."""
    bytes_ = blocks[:, -16:]
    return np.concatenate([bytes_ & np.uint8(0x0F), bytes_ >> np.uint8(4)], axis=1)


def _signed_bytes(blocks: np.ndarray) -> np.ndarray:
    return blocks[:, 2:] ^ np.uint8(0x80)  # adds 128 modulo 256


def _of_super_block(blocks: np.ndarray) -> Scales:
    """Q4_K and Q5_K: 8 groups of 32, with scales and minima of 6 bits in 12 bytes."""
    low, high, rest = (blocks[:, at : at + 4] for at in (4, 8, 12))
    six, top = np.uint8(0x3F), np.uint8(0x30)
    scale = np.concatenate([low & six, (rest & np.uint8(0x0F)) | (low >> 2 & top)], axis=1)
    minimum = np.concatenate([high & six, (rest >> np.uint8(4)) | (high >> 2 & top)], axis=1)
    return _half(blocks, 0) * scale, -(_half(blocks, 2) * minimum)


def _q6_k(blocks: np.ndarray) -> Scales:
    scales = blocks[:, 192:208].view(np.int8) * _half(blocks, 208)
    return _of_pairs(scales, finer=4, bits=8)


def _q3_k(blocks: np.ndarray) -> Scales:
    low = np.concatenate([blocks[:, 96:104] & 0x0F, blocks[:, 96:104] >> 4], axis=1)
    high = np.concatenate([blocks[:, 104:108] >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    scales = (low | high << 4).astype(np.int8) - np.int8(32)
    return _of_pairs(scales * _half(blocks, 108), finer=4, bits=5)


def _of_pairs(scales: np.ndarray, finer: int, bits: int) -> Scales:
    """Two groups of 16 as one of 32.

    Its step is the larger of the two, divided by `finer`: the values of that group stay the same,
    those of the other move by half of the new step at most. In 16 bits, which files and kernels
    may hold it in; codes follow the rounded step.
    """
    pairs = scales.reshape(len(scales), -1, 2)
    larger = np.abs(pairs).argmax(axis=2)[..., None]
    step = np.take_along_axis(pairs, larger, axis=2)[..., 0] / np.float32(finer)
    return _symmetric(_rounded(step), bits)


def _q2_k(blocks: np.ndarray) -> Scales:
    """Two groups of 16 as one of 32, whose 32 steps span both: some 10 for each of their own."""
    scale = _half(blocks, 80) * (blocks[:, :16] & 0x0F)
    low = -(_half(blocks, 82) * (blocks[:, :16] >> 4))
    ends = np.stack([low, low + 3 * scale], axis=-1).reshape(len(blocks), 8, 4)
    low = _rounded(ends.min(axis=2))
    return _rounded((ends.max(axis=2) - low) / np.float32(31)), low


def _rounded(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


def _iq4_xs(blocks: np.ndarray) -> Scales:
    """8 groups of 32, with scales of 6 bits: 4 low ones, 2 high ones."""
    low = blocks[:, 4:8, None] >> np.array([0, 4], np.uint8) & 0x0F
    high = (
        np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    )
    scales = low.reshape(-1, 8) | high.astype(np.uint8) << 4
    return _symmetric(_half(blocks, 0) * (scales.astype(np.int8) - np.int8(32)), 8)


def _iq3_s(blocks: np.ndarray) -> Scales:
    """Odd multiples, from -15 to 15, of a step for each 32 values."""
    scales = blocks[:, 106:110, None] >> np.array([0, 4], np.uint8) & 0x0F
    step = _half(blocks, 0) * (1 + 2 * scales.reshape(-1, 8))
    return 2 * step, -15 * step


def _of_top_bits(words_at: int, stride: int, factor: float) -> Callable[[np.ndarray], Scales]:
    """IQ2_XXS and IQ3_XXS: the scale of 32 values in the highest 4 bits of their word of signs."""

    def scales(blocks: np.ndarray) -> Scales:
        top = blocks[:, words_at + 3 :: stride][:, :8] >> 4
        return _symmetric(_half(blocks, 0) * (np.float32(0.5) + top) * np.float32(factor), 8)

    return scales


def _iq1_s(blocks: np.ndarray) -> Scales:
    """-1, 0 or 1, moved by an eighth up or down in each 32 values."""
    words = np.ascontiguousarray(blocks[:, 34:50]).view("<u2")
    step = _half(blocks, 0) * (2 * (words >> 12 & 7) + 1)
    moved = np.where(words & 0x8000, np.float32(-0.125), np.float32(0.125))
    return step, step * (moved - 1)


def _ternary(at: int) -> Callable[[np.ndarray], Scales]:
    def scales(blocks: np.ndarray) -> Scales:
        step = np.repeat(_half(blocks, at), 2, axis=1)
        return step, -step

    return scales


AFFINE_TYPES: Mapping[str, Affine] = {
    "Q4_0": Affine(4, 32, 18, lambda b: _symmetric(_half(b, 0), 4), _nibbles, exact_in="float16"),
    "Q4_1": Affine(4, 32, 20, lambda b: (_half(b, 0), _half(b, 2)), _nibbles, exact_in="float16"),
    "Q5_0": Affine(5, 32, 22, lambda b: _symmetric(_half(b, 0), 5), exact_in="float16"),
    "Q5_1": Affine(5, 32, 24, lambda b: (_half(b, 0), _half(b, 2)), exact_in="float16"),
    "Q8_0": Affine(
        8, 32, 34, lambda b: _symmetric(_half(b, 0), 8), _signed_bytes, exact_in="float16"
    ),
    "Q2_K": Affine(5, 32, 84, _q2_k, exact_in=None),
    "Q3_K": Affine(5, 32, 110, _q3_k, exact_in=None),
    "Q4_K": Affine(4, 32, 144, _of_super_block),
    "Q5_K": Affine(5, 32, 176, _of_super_block),
    "Q6_K": Affine(8, 32, 210, _q6_k, exact_in=None),
    "IQ1_S": Affine(2, 32, 50, _iq1_s),
    "IQ2_XXS": Affine(8, 32, 66, _of_top_bits(6, 8, 0.25)),
    "IQ3_XXS": Affine(8, 32, 98, _of_top_bits(66, 4, 0.5)),
    "IQ3_S": Affine(4, 32, 110, _iq3_s),
    "IQ4_NL": Affine(8, 32, 18, lambda b: _symmetric(_half(b, 0), 8), exact_in="float16"),
    "IQ4_XS": Affine(8, 32, 136, _iq4_xs),
    "TQ1_0": Affine(2, 128, 54, _ternary(52), exact_in="float16"),
    "TQ2_0": Affine(2, 128, 66, _ternary(64), exact_in="float16"),
}
"""ggml types that come into MLX's affine format."""

FLOAT4_TYPES = {"MXFP4": Format("mxfp4", 4, 32), "NVFP4": Format("nvfp4", 4, 16)}
"""ggml types that MLX has: 4-bit floats under a scale of 8 bits."""


def _mxfp4(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    blocks = rows.reshape(-1, 17)
    scales = np.ascontiguousarray(blocks[:, 0]).reshape(len(rows), -1)
    weight = packed(_nibbles(blocks).reshape(-1), 4).reshape(len(rows), -1)
    return weight.view("<u4"), scales


def _nvfp4(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes, scales = nvfp4_parts(rows)
    weight = packed(codes.reshape(-1), 4).reshape(len(rows), -1)
    return weight.view("<u4"), scales


def nvfp4_parts(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 `[n, columns]`, and scales, as E4M3 without a sign, `[n, columns / 16]`.

    4 groups of 16 in a block, with their scales in front.
    """
    blocks = rows.reshape(-1, 36)
    scales = blocks[:, :4] & np.uint8(0x7F)
    scales = np.where(scales == 0x7F, np.uint8(0), scales)  # ggml's zero, MLX's NaN
    halves = blocks[:, 4:].reshape(-1, 8)
    codes = np.concatenate([halves & np.uint8(0x0F), halves >> np.uint8(4)], axis=1)
    return codes.reshape(len(rows), -1), scales.reshape(len(rows), -1)


_FLOAT4 = {"MXFP4": _mxfp4, "NVFP4": _nvfp4}
