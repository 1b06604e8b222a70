"""Tensors of a GGUF file as `SourceTensor`s, and ggml's quantization in MLX's layout."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxkv.checkpoint.quantization import Format

from .file import GGUFFile, GGUFTensor, dequantize

AFFINE_TYPES = {
    "Q4_0": Format("affine", 4, 32),
    "Q4_1": Format("affine", 4, 32),
    "Q8_0": Format("affine", 8, 32),
}
"""ggml types that MLX's affine format holds without loss."""


@dataclass(frozen=True, slots=True)
class GGUFWeight:
    """A tensor of a GGUF file, with the values and row order of the Hugging Face checkpoint.

    Attributes:
        head_dim: rows are permuted within heads of this many, for llama.cpp's RoPE; 0: not.
        added: the file's values minus the checkpoint's (1 for Gemma's norms).
        scale_dtype: see `SourceTensor`. A block's scale is a float16, and so is its bias:
            -8 d and -128 d are exact unless they overflow, which the writer checks.
    """

    file: GGUFFile
    tensor: GGUFTensor
    name: str
    head_dim: int = 0
    added: float = 0.0
    scale_dtype: str = "float16"

    @property
    def origin(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        plain = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
        return plain.get(self.tensor.type, self.tensor.type)

    @property
    def quantization(self) -> Format | None:
        is_plain = len(self.shape) < 2 or self.added
        return None if is_plain else AFFINE_TYPES.get(self.tensor.type)

    @property
    def row_step(self) -> int:
        return max(1, self.head_dim if len(self.shape) > 1 else 1)

    def stored(self, start: int, stop: int) -> np.ndarray:
        """The bytes of rows [start, stop) of the Hugging Face checkpoint."""
        stored = self.file.read_rows(self.tensor, start, stop)
        is_permuted = self.head_dim and len(self.shape) > 1
        return _unpermute(stored, self.head_dim) if is_permuted else stored

    def rows(self, start: int, stop: int) -> mx.array:
        values = dequantize(self.stored(start, stop), self.tensor.type)
        if self.head_dim and len(self.shape) == 1:
            values = _unpermute(values.reshape(-1, 1), self.head_dim).reshape(1, -1)
        if self.added:
            values = values - np.float32(self.added)
        return mx.array(values)

    def quantized_rows(self, start: int, stop: int) -> tuple[mx.array, ...]:
        return tuple(map(mx.array, to_affine(self.stored(start, stop), self.tensor.type)))


def _unpermute(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of a Llama GGUF's q or k back in Hugging Face's order.

    Per head, Hugging Face rotates row i with row i + D/2, llama.cpp row 2i with row 2i + 1, and
    its converter reorders the rows for that: `[2, D/2]` of each head became `[D/2, 2]`.
    """
    n_rows, width = rows.shape
    split = rows.reshape(n_rows // head_dim, head_dim // 2, 2, width)
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(n_rows, width)


def to_affine(rows: np.ndarray, type_name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stored rows of a Q4_0, Q4_1 or Q8_0 tensor in MLX's affine format, group 32.

    MLX computes `scale * q + bias` with q unsigned: Q4_0 (`d * (q - 8)`) and Q8_0 (`d * q`, q
    signed) get a bias of -8 d and -128 d, Q4_1 (`d * q + m`) is the same already. In float32 all
    these products are exact, so the values are the same to the bit.

    Args:
        rows: uint8 `[n, row_bytes]`.

    Returns:
        weight uint32 `[n, columns * bits / 32]`, scales and biases float32 `[n, columns / 32]`.
    """
    n_rows = rows.shape[0]
    block_bytes = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[type_name]
    blocks = rows.reshape(-1, block_bytes)
    scales = _halves(blocks, 0)
    if type_name == "Q8_0":
        # Adding 128 modulo 256 flips the highest bit.
        quants = blocks[:, 2:] ^ np.uint8(0x80)
        biases = scales * np.float32(-128)
    else:
        head = 4 if type_name == "Q4_1" else 2
        quants = _nibbles(blocks[:, head:])
        biases = _halves(blocks, 2) if type_name == "Q4_1" else scales * np.float32(-8)
    weight = np.ascontiguousarray(quants).reshape(n_rows, -1).view("<u4")
    return weight, scales.reshape(n_rows, -1), biases.reshape(n_rows, -1)


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at this byte of each block, as float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(quants: np.ndarray) -> np.ndarray:
    """ggml keeps values i and i + 16 of a block in one byte, MLX values 2i and 2i + 1."""
    low, high = quants & np.uint8(0x0F), quants >> np.uint8(4)
    packed = np.empty_like(quants)
    packed[:, :8] = low[:, 0::2] | (low[:, 1::2] << np.uint8(4))
    packed[:, 8:] = high[:, 0::2] | (high[:, 1::2] << np.uint8(4))
    return packed
