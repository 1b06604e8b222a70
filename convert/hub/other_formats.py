"""Which of a checkpoint's arrays make one weight of another quantizer's format.

The arrays' names and shapes say it. The config is asked for what they leave open only: bits where
several sizes of codes fill as many words, and whether GPTQ's zeros are stored less one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mlxkv.checkpoint.quantization import other_settings
from mlxkv.checkpoint.weights import TensorInfo

from .. import float4
from .arrays import FLOATS8, ArrayReader, Rows
from .compressed import packed_integers
from .matrices import CodeBook, Float4, Float8, Integers, Matrix, PlainFloat8
from .unused import unused_arrays
from .words import awq_codes, from_words, gptq_codes, in_awq_order

_NESTED = "nested_absmax"
_STEP = 32
"""Rows of a transposed matrix whose zeros fill whole words, at any bits."""


@dataclass(frozen=True, slots=True)
class Found:
    """What is stored in other formats.

    Attributes:
        matrices: name of a weight -> its values.
        used: names of arrays that they are made of.
        unused: names of arrays that no weight needs -> what they are for.
    """

    matrices: Mapping[str, Matrix]
    used: frozenset[str]
    unused: Mapping[str, str]


def find_matrices(infos: Mapping[str, TensorInfo], raw: Mapping[str, Any], source: str) -> Found:
    """The weights of a checkpoint that another quantizer has made.

    Raises:
        WeightsError: arrays are missing, or do not fit together.
    """
    settings = other_settings(raw)
    reader = _Reader(infos, settings, source)
    matrices = dict(reader.all())
    rest = [name for name in infos if name not in reader.used]
    is_quantized = any(not isinstance(each, PlainFloat8) for each in matrices.values())
    unused = unused_arrays(rest, quantized=bool(settings) or is_quantized)
    return Found(matrices, frozenset(reader.used), unused)


class _Reader(ArrayReader):
    def all(self) -> Iterator[tuple[str, Matrix]]:
        makers: tuple[tuple[str, Callable[[str], Matrix]], ...] = (
            (".qweight", self.columns),
            (".weight_packed", self.compressed),
        )
        for name in self.infos:
            for end, make in makers:
                if name.endswith(end):
                    yield f"{name.removesuffix(end)}.weight", make(name.removesuffix(end))
            if (scale := self.scale_of(name)) is not None:
                yield name, self.scaled(name, scale)
            elif f"{name}.absmax" in self.infos and f"{name}.quant_map" in self.infos:
                yield name, self.code_book(name)
        for name in [name for name in self.infos if name not in self.used]:
            if self.infos[name].dtype in FLOATS8:
                yield name, self.cast(name)

    def scale_of(self, name: str) -> str | None:
        """The scale beside a weight that is stored in 8 bits."""
        if self.infos[name].dtype not in (*FLOATS8, "I8", "U8") or name.endswith("_packed"):
            return None
        stem = name.removesuffix(".weight")
        names = (f"{name}_scale_inv", f"{name}_scale", f"{stem}.SCB")
        return next((scale for scale in names if scale in self.infos), None)

    def scaled(self, name: str, scale: str) -> Matrix:
        """FP8, 8-bit integers or NVFP4 with their scales beside them."""
        dtype = self.infos[name].dtype
        if dtype == "U8":
            second = f"{name}_scale_2"
            seconds = self.floats(second) if second in self.infos else np.ones(1, np.float32)
            return self.float4(name, scale, seconds, "nvfp4")
        if dtype == "I8":
            return self.int8(name, scale)
        shape, scales = self.shape(name), self.floats(scale)
        if self.infos[scale].dtype == "U8":  # as MXFP8 stores its powers of two
            scales = float4.e8m0(self.array(scale))
        if len(shape) < 2 or scales.size == 0:
            raise self.error(name, f"is {list(shape)}, not a matrix")
        codes, blocks = self.array(name), self.blocks(scale, scales, shape)
        return Float8(shape, "FP8", codes, *blocks, is_e5m2=dtype == "F8_E5M2")

    def cast(self, name: str) -> Matrix:
        """8-bit floats without a scale, as a cast of the whole model leaves them."""
        codes, dtype = self.array(name), self.infos[name].dtype
        return PlainFloat8(codes.shape or (1,), dtype.removeprefix("F8_"), codes, FLOATS8[dtype])

    def blocks(
        self, name: str, scales: np.ndarray, shape: tuple[int, ...]
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """Scales `[..., rows, columns]` of blocks, and the size of these."""
        n_out, n_in = shape[-2:]
        if scales.size == 1 or (len(shape) == 3 and scales.size == shape[0]):
            return scales.reshape(-1, 1, 1), (n_out, n_in)
        if scales.ndim < len(shape):
            scales = scales[..., None]
        stated = self.settings.get("weight_block_size")
        n_rows, n_columns = scales.shape[-2:]
        sizes = stated if isinstance(stated, list) and len(stated) == 2 else None
        rows = sizes[0] if sizes and n_rows > 1 else -(-n_out // n_rows)
        columns = sizes[1] if sizes and n_columns > 1 else -(-n_in // n_columns)
        fits = all(type(size) is int and size > 0 for size in (rows, columns))
        if not fits or (-(-n_out // rows), -(-n_in // columns)) != (n_rows, n_columns):
            raise self.error(name, f"is {list(scales.shape)}, which does not fit {list(shape)}")
        if scales.shape[:-2] != shape[:-2]:
            raise self.error(name, f"is {list(scales.shape)}, which does not fit {list(shape)}")
        return scales, (rows, columns)

    def float4(self, name: str, scale: str, seconds: np.ndarray, mode: str) -> Matrix:
        codes, scales = self.array(name), self.array(scale)
        shape = (*codes.shape[:-1], codes.shape[-1] * 2)
        group = 16 if mode == "nvfp4" else 32
        expected = (*shape[:-1], shape[-1] // group)
        whole = seconds.size in (1, shape[0] if len(shape) == 3 else 1)
        if len(shape) < 2 or scales.shape != expected or scales.itemsize != 1 or not whole:
            raise self.error(scale, f"is {list(scales.shape)}; it must be {list(expected)}")
        if not (np.isfinite(seconds).all() and (seconds > 0).all()):
            raise self.error(name, "has a second scale that is not positive")
        parts = scales if seconds.size > 1 else scales[None]
        taken = float4.folded(parts, seconds.ravel()) if (seconds != 1).any() else None
        return Float4(shape, codes, scales, seconds, mode, taken)

    def int8(self, name: str, scale: str) -> Matrix:
        shape, zero = self.shape(name), f"{name.removesuffix('.weight')}.weight_zero_point"
        scales = self.floats(scale)
        scales = scales.reshape(len(scales), -1) if scales.ndim else scales.reshape(1, 1)
        if scale.endswith(".SCB"):  # bitsandbytes has the largest value of each row
            scales = scales / np.float32(127)
        fits = len(shape) == 2 and len(scales) in (1, shape[0]) and scales.size
        if not fits or shape[1] % scales.shape[1]:
            raise self.error(scale, f"does not fit {list(shape)}")
        scales = np.broadcast_to(scales, (shape[0], scales.shape[1]))
        zeros = np.float32(0)
        if zero in self.infos:
            zeros = self.floats(zero)
            if zeros.size not in (1, scales.size):
                raise self.error(zero, f"does not fit scales of {list(scales.shape)}")
            zeros = zeros.reshape(-1, scales.shape[1] if zeros.size > 1 else 1)
        zeros = np.broadcast_to(np.float32(zeros) + 128, scales.shape)
        codes = self.array(name)

        def read(start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            moved = np.asarray(codes[start:stop]).view(np.uint8) ^ np.uint8(0x80)
            return moved, scales[start:stop], zeros[start:stop]

        group = shape[1] // scales.shape[1]
        dtype = self.scale_dtype(scale, zero not in self.infos)
        return Integers(shape, "int8", 8, group, read, scale_dtype=dtype)

    def code_book(self, name: str) -> Matrix:
        """bitsandbytes, NF4 or FP4, whose numbers are JSON in an array of bytes."""
        states = [n for n in self.infos if n.startswith(f"{name}.quant_state.")]
        if len(states) != 1:
            raise self.error(name, "has no quant_state")
        try:
            state = json.loads(self.array(states[0]).tobytes())
            shape, size = tuple(state["shape"]), state["blocksize"]
            offset, nested = state.get("nested_offset", 0.0), state.get("nested_blocksize", 0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self.error(states[0], "is not the JSON of a matrix") from error
        numbers = [*shape, size, nested]
        if len(shape) != 2 or any(type(n) is not int or n < 0 for n in numbers) or not size:
            raise self.error(states[0], f"has shape {shape} and blocks of {size!r}")
        # Sharded training keeps the bytes in an array of 16-bit floats.
        codes = self.array(name).reshape(-1).view(np.uint8)
        table = self.floats(f"{name}.quant_map").ravel()
        maxima, n = f"{name}.absmax", shape[0] * shape[1]
        is_nested = self.infos[maxima].dtype == "U8"
        fits = table.size == 16 and codes.size == -(-n // 2)
        if not fits or self.array(maxima).shape != (-(-n // size),):
            raise self.error(name, f"is {codes.size} bytes, which does not fit {list(shape)}")
        if not is_nested:
            read = partial(self._part_of, maxima)
            return CodeBook(shape, "bitsandbytes", codes, table, read, size)
        book, outer = (self.floats(f"{name}.{k}").ravel() for k in ("nested_quant_map", _NESTED))
        if book.size != 256 or not nested or outer.size * nested < -(-n // size):
            raise self.error(maxima, "does not fit its nested scales")

        def unnested(start: int, stop: int) -> np.ndarray:
            inner = np.asarray(self.array(maxima).ravel()[start:stop])
            return book[inner] * outer[np.arange(start, stop) // nested] + np.float32(offset)

        return CodeBook(shape, "bitsandbytes", codes, table, unnested, size)

    def _part_of(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.floats(name, np.s_[start:stop])

    def compressed(self, stem: str) -> Matrix:
        """compressed-tensors: integers of a row in words, or 4-bit floats in bytes."""
        name, scale = f"{stem}.weight_packed", f"{stem}.weight_scale"
        if self.infos[name].dtype == "U8":
            mode = "nvfp4" if f"{stem}.weight_global_scale" in self.infos else "mxfp4"
            seconds = np.ones(1, np.float32)
            if mode == "nvfp4":
                with np.errstate(divide="ignore"):
                    seconds = 1 / self.floats(f"{stem}.weight_global_scale").ravel()
            return self.float4(name, scale, seconds, mode)
        return packed_integers(self, stem)

    def columns(self, stem: str) -> Matrix:
        """AutoAWQ and AutoGPTQ, whose matrices are `[in, out]`."""
        words, scales = self.array(f"{stem}.qweight"), self.array(f"{stem}.scales")
        if words.ndim != 2 or scales.ndim != 2 or words.dtype.itemsize != 4:
            raise self.error(f"{stem}.qweight", "is not a packed matrix")
        n_groups, n_out = scales.shape
        is_gptq = words.shape[1] == n_out
        bits = self._gptq_bits(stem, words, n_out) if is_gptq else 4
        n_in = words.shape[0] * 32 // bits if is_gptq and bits else words.shape[0]
        group = self.group_size(n_in, n_groups)
        fits = bits in (2, 3, 4, 8) and group and n_in * bits % 32 == 0
        if not fits or (not is_gptq and words.shape[1] * 8 != n_out):
            raise self.error(f"{stem}.qweight", f"is {list(words.shape)}, which does not fit")
        zeros, symmetric = self._column_zeros(stem, scales.shape, bits, is_gptq)
        order = self.order(f"{stem}.g_idx", n_in, n_groups, group)
        codes = gptq_codes if is_gptq else awq_codes

        def read(start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            own = self.floats(f"{stem}.scales", np.s_[:, start:stop]).T
            found = np.ascontiguousarray(codes(words, bits, start, stop))
            return found, np.ascontiguousarray(own), zeros(start, stop)

        label = f"{'GPTQ' if is_gptq else 'AWQ'} int{bits}"
        dtype = self.scale_dtype(f"{stem}.scales", symmetric)
        return Integers((n_out, n_in), label, bits, group, read, order, dtype, _STEP)

    def group_size(self, n_in: int, n_groups: int) -> int:
        """Values of a row that share a scale, the last ones perhaps fewer; 0 if none fits."""
        stated = self.settings.get("group_size")
        if type(stated) is int and stated > 0 and -(-n_in // stated) == n_groups:
            return stated
        return n_in // n_groups if n_groups and n_in % n_groups == 0 else 0

    def _gptq_bits(self, stem: str, words: np.ndarray, n_out: int) -> int:
        """Bits of a code: by the shapes, since configs name layers by expressions too."""
        if f"{stem}.g_idx" in self.infos:
            return words.shape[0] * 32 // max(1, self.shape(f"{stem}.g_idx")[0])
        zeros = self.infos.get(f"{stem}.qzeros")
        if zeros is not None and len(zeros.shape) == 2 and zeros.shape[1] * 32 % n_out == 0:
            return zeros.shape[1] * 32 // n_out
        bits = self.settings.get("bits")
        if type(bits) is not int or bits <= 0:
            raise self.error(f"{stem}.qweight", f"has no g_idx, and the config's bits are {bits!r}")
        return bits

    @property
    def _zeros_less_one(self) -> bool:
        """Whether zeros are stored less one: in AutoGPTQ's first format and what follows it."""
        if "auto-round" in str(self.settings.get("quant_method")):
            packing = self.settings.get("packing_format") or self.settings.get("backend") or "auto"
            return packing == "auto" or "gptq" in str(packing)
        return self.settings.get("checkpoint_format", "gptq") != "gptq_v2"

    def _column_zeros(
        self, stem: str, shape: tuple[int, ...], bits: int, is_gptq: bool
    ) -> tuple[Rows, bool]:
        """Zeros of each column's groups, and whether all are the middle of the codes."""
        name, (n_groups, n_out), middle = f"{stem}.qzeros", shape, 1 << (bits - 1)

        def middles(start: int, stop: int) -> np.ndarray:
            return np.full((stop - start, n_groups), middle, np.float32)

        if name not in self.infos:
            return middles, True
        words = self.array(name)
        if words.shape != (n_groups, -(-n_out * bits // 32)) or words.dtype.itemsize != 4:
            raise self.error(name, f"is {list(words.shape)}, which does not fit {list(shape)}")
        less = is_gptq and self._zeros_less_one
        unpack = partial(from_words, bits=bits) if is_gptq else in_awq_order

        def read(start: int, stop: int) -> np.ndarray:
            part = np.asarray(words[:, start * bits // 32 : -(-stop * bits // 32)])
            found = unpack(part)[:, : stop - start].T.astype(np.float32)
            return np.ascontiguousarray(found) + np.float32(less)

        first = unpack(np.asarray(words[:1]))[:, :n_out]
        if (words == words[:1]).all() and (first == middle - less).all():
            return middles, True
        return read, False
