"""Read a GGUF file without trusting it.

Every count, length and offset of the header is checked against the size of the file before anything
is allocated or read. (The `gguf` package builds several NumPy objects for each element of an array:
11 s and 700 MB for a vocabulary of 262,144 tokens, against 0.3 s here. Its table of types and its
dequantization are used.) Tensor data is read by rows, on demand.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mlxkv.base import regular
from mlxkv.errors import CheckpointError, ModelNotFound, UnsupportedModel

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4  # of ggml
MAX_NAME_BYTES = 256
# A vocabulary is the longest array of a header; the largest published ones have 2**18 entries.
MAX_ARRAY_LENGTH = 1 << 24

_STRING, _ARRAY = 8, 9
_SCALARS: Mapping[int, str] = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
# The shortest entries of a key and of a tensor bound the two counts.
_MIN_KEY_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies.

    Attributes:
        path: of the file that holds it.
        shape: row-major, as in NumPy and MLX (the reverse of the file's order).
        type: name of its ggml type ("F32", "Q4_K", ...).
        offset: of its first byte, from the start of the file.
        row_bytes: bytes of the values along the last dimension.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int
    row_bytes: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """The table of tensors and the metadata: arrays of numbers are NumPy's, of strings lists."""

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    @property
    def architecture(self) -> str:
        """As the file says; "" in a later part of a split model."""
        return self.metadata.get("general.architecture", "")

    def read_rows(self, tensor: GGUFTensor, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as stored: uint8 `[stop - start, row_bytes]`."""
        size = (stop - start) * tensor.row_bytes
        try:
            with regular.open_file(tensor.path) as file:
                file.seek(tensor.offset + start * tensor.row_bytes)
                data = np.fromfile(file, dtype=np.uint8, count=size)
        except OSError as error:
            raise CheckpointError(f"{tensor.path}: cannot be read: {error.strerror}") from error
        if data.size != size:
            raise CheckpointError(f"{tensor.path}: ends inside tensor {tensor.name!r}: truncated")
        return data.reshape(stop - start, tensor.row_bytes)


def open_gguf(path: str | Path) -> GGUFFile:
    """Read and check the header of a GGUF file, or of one part of a split one.

    Raises:
        ModelNotFound: no such file.
        UnsupportedModel: a version, byte order or type of tensor that is not supported.
        CheckpointError: it is damaged.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with regular.open_file(path) as file:
            start = file.read(24)
            _check_start(path, start)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(path, data, size).read()
    except FileNotFoundError:
        raise ModelNotFound(f"no such file: {path}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def dequantize(rows: np.ndarray, type_name: str) -> np.ndarray:
    """Stored rows (uint8 `[n, row_bytes]`) as float32 `[n, columns]`."""
    from gguf import GGMLQuantizationType, quants

    if type_name == "F64":  # not in the package
        return rows.view("<f8").astype(np.float32)
    # Scales of a damaged file may be NaN or infinite; the writer checks the values.
    with np.errstate(all="ignore"):
        return quants.dequantize(rows, GGMLQuantizationType[type_name])


def check_readable(file: GGUFFile, tensor: GGUFTensor) -> None:
    """Raise UnsupportedModel for a tensor of a type that cannot be dequantized."""
    if tensor.type not in readable_types():
        raise UnsupportedModel(
            f"{file.path}: tensor {tensor.name!r} has type {tensor.type}, which cannot be read"
        )


@cache
def readable_types() -> frozenset[str]:
    """Names of the ggml types that `dequantize` supports."""
    from gguf import GGML_QUANT_SIZES

    names = set()
    for kind, (_, type_bytes) in GGML_QUANT_SIZES.items():
        try:
            dequantize(np.zeros((1, type_bytes), np.uint8), kind.name)
        except NotImplementedError:
            continue
        names.add(kind.name)
    return frozenset(names)


def _check_start(path: Path, start: bytes) -> None:
    if start[:4] != MAGIC:
        raise CheckpointError(f"{path}: not a GGUF file: it does not begin with 'GGUF'")
    if len(start) < 24:
        raise CheckpointError(f"{path}: truncated: a GGUF header has 24 bytes, it has {len(start)}")
    (version,) = struct.unpack_from("<I", start, 4)
    if version in VERSIONS:
        return
    if int.from_bytes(start[4:8], "big") in (1, *VERSIONS):
        raise UnsupportedModel(f"{path}: big-endian GGUF files are not supported")
    raise UnsupportedModel(
        f"{path}: GGUF version {version} is not supported, versions 2 and 3 are: convert the model "
        "again with a current llama.cpp"
    )


class _Header:
    """One pass over the header: `offset` is the next byte to read."""

    def __init__(self, path: Path, data: mmap.mmap, size: int):
        self.path, self.data, self.size = path, data, min(size, len(data))
        self.offset = 4

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}: the file is damaged")

    def short(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: truncated or damaged: {what}, the file ends at {self.size:,}"
        )

    def take(self, n_bytes: int, what: str) -> int:
        """Skip the next bytes, and return where they start."""
        start = self.offset
        if n_bytes > self.size - start:
            raise self.short(f"{what} needs {n_bytes:,} bytes at {start:,}")
        self.offset = start + n_bytes
        return start

    def u32(self, what: str) -> int:
        return struct.unpack_from("<I", self.data, self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return struct.unpack_from("<Q", self.data, self.take(8, what))[0]

    def name(self, what: str) -> str:
        """A name that is short and printable, for messages."""
        name = self.string(what, MAX_NAME_BYTES)
        if not name.isprintable():
            raise self.fail(f"{what} is {name!r}")
        return name

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.u64(what)
        if limit is not None and length > limit:
            raise self.fail(f"{what} claims {length:,} bytes")
        start = self.take(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None

    def read(self) -> GGUFFile:
        version = self.u32("the version")
        n_tensors = self.u64("the number of tensors")
        n_keys = self.u64("the number of keys")
        for n, least, what in (
            (n_keys, _MIN_KEY_BYTES, "keys"),
            (n_tensors, _MIN_TENSOR_BYTES, "tensors"),
        ):
            if n * least > self.size:
                raise self.short(f"the header claims {n:,} {what}")
        metadata: dict[str, Any] = {}
        for i in range(n_keys):
            key = self.name(f"the name of key {i}")
            if key in metadata:
                raise self.fail(f"key {key!r} occurs twice")
            metadata[key] = self.value(self.u32(f"the type of key {key!r}"), f"key {key!r}")
        self.check_metadata(metadata)
        tensors = self.tensors(n_tensors, self.alignment(metadata))
        return GGUFFile(self.path, version, metadata, tensors)

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            raise self.fail(f"{what} has the unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        start = self.take(dtype.itemsize, what)
        return np.frombuffer(self.data[start : self.offset], dtype)[0].item()

    def array(self, what: str) -> Any:
        kind = self.u32(what)
        length = self.u64(what)
        if length > MAX_ARRAY_LENGTH:
            raise self.fail(f"{what} claims {length:,} values")
        if kind == _STRING:
            return self.strings(length, what)
        if kind not in _SCALARS:
            raise self.fail(f"{what} is an array of the unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        start = self.take(length * dtype.itemsize, what)
        return np.frombuffer(self.data[start : self.offset], dtype)

    def strings(self, length: int, what: str) -> list[str]:
        """An array of strings, in one loop: a vocabulary has 262,144 of them."""
        if length * 8 > self.size - self.offset:
            raise self.short(f"{what} claims {length:,} strings")
        data, offset, size = self.data, self.offset, self.size
        unpack = struct.Struct("<Q").unpack_from
        found = []
        for i in range(length):
            if offset + 8 > size:
                raise self.short(f"{what} has {i:,} of {length:,} strings")
            start = offset + 8
            offset = start + unpack(data, offset)[0]
            if offset > size:
                raise self.short(f"string {i:,} of {what} ends at {offset:,}")
            try:
                found.append(data[start:offset].decode("utf-8"))
            except UnicodeDecodeError:
                raise self.fail(f"string {i:,} of {what} is not UTF-8") from None
        self.offset = offset
        return found

    def check_metadata(self, metadata: Mapping[str, Any]) -> None:
        is_later_part = metadata.get("split.no", 0) != 0
        if not is_later_part and not isinstance(metadata.get("general.architecture"), str):
            raise self.fail("key 'general.architecture' is missing or not a string")

    def alignment(self, metadata: Mapping[str, Any]) -> int:
        value = metadata.get("general.alignment", 32)
        if type(value) is not int or not 0 < value <= 1 << 20 or value & (value - 1):
            raise self.fail(f"general.alignment is {value!r}, not a power of two")
        return value

    def tensors(self, n_tensors: int, alignment: int) -> dict[str, GGUFTensor]:
        table = []
        for i in range(n_tensors):
            name = self.name(f"the name of tensor {i}")
            n_dims = self.u32(f"the dimensions of tensor {name!r}")
            if n_dims > MAX_DIMS:
                raise self.fail(f"tensor {name!r} claims {n_dims:,} dimensions")
            dims = [self.u64(f"the shape of tensor {name!r}") for _ in range(n_dims)]
            kind = self.u32(f"the type of tensor {name!r}")
            offset = self.u64(f"the offset of tensor {name!r}")
            table.append((name, tuple(reversed(dims)), kind, offset))
        base = -(-self.offset // alignment) * alignment
        found: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in table:
            if name in found:
                raise self.fail(f"tensor {name!r} occurs twice")
            if offset % alignment:
                raise self.fail(f"tensor {name!r} lies at {offset:,}, not aligned to {alignment}")
            found[name] = self.tensor(name, shape, kind, base + offset)
        self.check_overlaps(found)
        return found

    def tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            ggml_type = GGMLQuantizationType(kind)
        except ValueError:
            raise UnsupportedModel(
                f"{self.path}: tensor {name!r} has type {kind}, which the gguf package does not "
                "know: the file is newer than it, or damaged"
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[ggml_type]
        columns = shape[-1] if shape else 1
        if 0 in shape or columns % block:
            raise self.fail(
                f"tensor {name!r} of type {ggml_type.name} has the shape {shape}, "
                f"whose last dimension must be a multiple of {block}"
            )
        row_bytes = columns // block * block_bytes
        nbytes = math.prod(shape[:-1]) * row_bytes
        if offset + nbytes > self.size:
            raise self.short(f"tensor {name!r} needs bytes up to {offset + nbytes:,}")
        return GGUFTensor(self.path, name, shape, ggml_type.name, offset, nbytes, row_bytes)

    def check_overlaps(self, tensors: Mapping[str, GGUFTensor]) -> None:
        end, before = 0, ""
        for tensor in sorted(tensors.values(), key=lambda t: t.offset):
            if tensor.offset < end:
                raise self.fail(f"tensors {before!r} and {tensor.name!r} overlap")
            end, before = tensor.offset + tensor.nbytes, tensor.name
