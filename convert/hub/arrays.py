"""A checkpoint's arrays by name, as they lie in its files, for the readers of other formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlxkv.checkpoint.weights import TensorInfo
from mlxkv.errors import CheckpointError, WeightsError

from .. import float4

FLOATS8 = {"F8_E4M3": float4.E4M3, "F8_E5M2": float4.E5M2}
"""safetensors' names of 8-bit floats -> values of their codes."""
_NUMPY = {
    "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
    "U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "U32": "<u4", "I64": "<i8",
}  # fmt: skip

Rows = Callable[[int, int], np.ndarray]
"""Some rows of an array."""


@dataclass(slots=True)
class ArrayReader:
    """Reads arrays, and keeps which ones.

    Attributes:
        infos: of all arrays, by name.
        settings: what the config says of the quantizer.
        source: the config's path, for messages.
        used: names of the arrays that were read.
    """

    infos: Mapping[str, TensorInfo]
    settings: Mapping[str, Any]
    source: str
    used: set[str] = field(default_factory=set)

    def error(self, name: str, what: str) -> WeightsError:
        """An error about an array."""
        return WeightsError(f"{self.source}: {name} {what}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape.

        Raises:
            WeightsError: there is no such array.
        """
        if name not in self.infos:
            raise self.error(name, "is missing beside the weight's other arrays")
        return self.infos[name].shape

    def array(self, name: str) -> np.ndarray:
        """An array as it lies in the file, mapped; bfloat16 as its bits.

        Raises:
            WeightsError: it is missing, empty, or has an unknown dtype.
            CheckpointError: the file cannot be read.
        """
        shape = self.shape(name)
        info = self.infos[name]
        if info.dtype not in _NUMPY:
            raise self.error(name, f"has dtype {info.dtype}, which is not supported")
        self.used.add(name)
        if 0 in shape:
            raise self.error(name, "is empty")
        try:
            flat = np.memmap(info.file, _NUMPY[info.dtype], "r", info.offset, shape or (1,))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{info.file}: cannot be read") from error
        return flat.reshape(shape)

    def floats(self, name: str, part: Any = ...) -> np.ndarray:
        """Some of an array's values in float32; raises as `array`."""
        values, dtype = np.asarray(self.array(name)[part]), self.infos[name].dtype
        if dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        if dtype in FLOATS8:
            return FLOATS8[dtype][values]
        return float4.e8m0(values) if dtype == "F8_E8M0" else values.astype(np.float32)

    def scale_dtype(self, scale: str, symmetric: bool) -> str:
        """See `Integers`."""
        names = {"F16": "float16", "BF16": "bfloat16"}
        return names.get(self.infos[scale].dtype, "float32") if symmetric else "float32"

    def order(self, name: str, n_in: int, n_groups: int, group: int) -> np.ndarray | None:
        """Group of each column; None where groups are neighbours in order.

        Raises:
            WeightsError: it names other groups.
        """
        if name not in self.infos:
            return None
        order = np.asarray(self.array(name)).ravel()
        if len(order) != n_in or not ((order >= 0) & (order < n_groups)).all():
            raise self.error(name, f"must name one of {n_groups} groups for {n_in} columns")
        in_order = np.arange(n_in) // group
        return None if np.array_equal(order, in_order) else order.astype(np.int64)
