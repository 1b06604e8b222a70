"""The tensors of a model directory: their headers, validated, and their lazy arrays.

The safetensors format is a length, a JSON header and the bytes. mlxkv reads the header itself: a
plan needs no more than that, and the library's reader imports NumPy, 40 ms of every cold start.
The checks are the library's: the header's length, every offset, no hole, no overlap, no rest.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxkv.base import regular
from mlxkv.checkpoint.config import read_json
from mlxkv.errors import CheckpointError, ModelNotFound, UnsupportedModel, one_line

_FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
_LOADABLE = {*_FLOATS, "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "BOOL"}
_CONVERTIBLE = ("F8_E4M3", "F8_E5M2")
_BITS = {"F32": 32, "F16": 16, "BF16": 16, "F64": 64, "U8": 8, "I8": 8, "U16": 16, "I16": 16,
         "U32": 32, "I32": 32, "U64": 64, "I64": 64, "BOOL": 8, "C64": 64, "F8_E4M3": 8,
         "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}  # fmt: skip
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The format's own bound."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors file, from its header.

    Args:
        shape: as stored.
        dtype: the format's name: F32, BF16, U32, ...
        file: the file that holds it.
        offset: of its first byte in the file.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * _BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a model directory: their headers, validated, and their lazy arrays."""

    infos: Mapping[str, TensorInfo]

    @property
    def files(self) -> list[Path]:
        """The safetensors files, in order."""
        return list(dict.fromkeys(info.file for info in self.infos.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.infos.values())

    @property
    def dtype(self) -> mx.Dtype:
        """The floating dtype that most bytes are in."""
        sizes: dict[str, int] = {}
        for info in self.infos.values():
            if info.dtype in _FLOATS:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        return _FLOATS[max(sizes, key=sizes.__getitem__)] if sizes else mx.float32

    def arrays(self) -> dict[str, mx.array]:
        """Lazy arrays by name; a file is read where one of its arrays is evaluated.

        Raises:
            UnsupportedModel: a dtype that MLX has not.
            CheckpointError: a file cannot be read.
        """
        for name, info in self.infos.items():
            if info.dtype not in _LOADABLE:
                can = "; `mlxkv convert` reads it" if info.dtype in _CONVERTIBLE else ""
                raise UnsupportedModel(
                    f"{info.file}: tensor {name} has dtype {info.dtype}; supported are "
                    f"{', '.join(sorted(_LOADABLE))}{can}"
                )
        arrays: dict[str, mx.array] = {}
        for file in self.files:
            try:
                loaded = mx.load(str(file))
            except (RuntimeError, ValueError) as error:
                raise CheckpointError(f"{file}: cannot be read ({one_line(error):.200})") from error
            assert isinstance(loaded, dict)
            wanted = {name for name, info in self.infos.items() if info.file == file}
            arrays.update({name: array for name, array in loaded.items() if name in wanted})
        return arrays


def open_weights(model_dir: str | Path) -> Weights:
    """Read and validate the headers of a directory's safetensors files; loads no weight.

    Raises:
        ModelNotFound: no safetensors in it.
        CheckpointError: a file is missing, truncated, or its header lies.
    """
    model_dir = Path(model_dir)
    index = model_dir / INDEX
    if index.exists():
        return Weights(_indexed(model_dir, index))
    files = weight_files(path.name for path in model_dir.glob("*.safetensors"))
    if not files:
        hint = ""
        if any(model_dir.glob("*.bin")) or any(model_dir.glob("*.pt*")):
            hint = "; pickled weights can run code and are not read: convert them to safetensors"
        elif any(model_dir.glob("*.gguf")):
            hint = "; convert its GGUF file with `mlxkv convert`"
        raise ModelNotFound(f"{model_dir}: no .safetensors file{hint}")
    infos: dict[str, TensorInfo] = {}
    for file in (model_dir / name for name in files):
        for name, info in read_header(file).items():
            if name in infos:
                raise CheckpointError(
                    f"{file}: tensor {name} is in {infos[name].file.name} as well"
                )
            infos[name] = info
    return Weights(infos)


def weight_files(names: Iterable[str]) -> list[str]:
    """Which files of a directory without an index hold its weights, in order."""
    found = sorted(name for name in names if name.endswith(".safetensors"))
    return [name for name in found if name.startswith("model")] or found


def indexed_files(index: Path) -> list[str]:
    """The files that an index names, each once; they lie beside it.

    Raises:
        CheckpointError: it names none, or one that lies elsewhere.
    """
    return list(dict.fromkeys(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: key 'weight_map' is missing or empty")
    for file_name in weight_map.values():
        if (
            not isinstance(file_name, str)
            or not file_name.endswith(".safetensors")
            or (Path(file_name).name != file_name)
        ):
            raise CheckpointError(f"{index}: weight_map names {file_name!r}, not a file beside it")
    return weight_map


def _indexed(model_dir: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = _weight_map(index)
    infos: dict[str, TensorInfo] = {}
    for file_name in dict.fromkeys(weight_map.values()):
        file = model_dir / file_name
        if not file.exists():
            raise CheckpointError(f"{file}: missing; {index.name} says that it holds weights")
        header = read_header(file)
        for name in (name for name, value in weight_map.items() if value == file_name):
            if name not in header:
                raise CheckpointError(f"{file}: tensor {name} is missing; {index.name} names it")
            infos[name] = header[name]
    return infos


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of one safetensors file.

    Raises:
        CheckpointError: the file is not what its header says.
    """
    try:
        with regular.open_file(file) as opened:
            size = opened.seek(0, 2)
            opened.seek(0)
            length = header_length(opened.read(8), size, file)
            text = opened.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    return parse_header(text, size - 8 - length, file)


def header_length(start: bytes, size: int, file: Path) -> int:
    """Bytes of the JSON header that follows `start`, the first eight bytes of a safetensors file.

    Raises:
        CheckpointError: no header is that long in a file of this size.
    """
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        raise _damaged(file, f"its header cannot be {length:,} bytes of {size:,}")
    return length


def parse_header(text: bytes, n_data: int, file: Path) -> dict[str, TensorInfo]:
    """The entries of a safetensors header.

    Raises:
        CheckpointError: they do not describe the `n_data` bytes that follow it in the file.
    """
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not an object")
    header.pop("__metadata__", None)
    base = 8 + len(text)
    infos = {name: _entry(name, entry, base, file) for name, entry in header.items()}
    end = 0
    for start, n_bytes in sorted((info.offset - base, info.nbytes) for info in infos.values()):
        if start != end:
            raise _damaged(file, f"its header leaves a hole or an overlap at byte {end:,}")
        end += n_bytes
    if end != n_data:
        raise _damaged(file, f"its header describes {end:,} bytes of data and it has {n_data:,}")
    return infos


def _entry(name: str, entry: Any, base: int, file: Path) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _damaged(file, f"tensor {name} has no dtype, shape or data_offsets") from None
    numbers = [*shape, start, stop] if isinstance(shape, list) else [None]
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise _damaged(file, f"tensor {name} has sizes that are not whole numbers")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _damaged(file, f"tensor {name} has dtype {dtype!r}, which the format does not know")
    if (stop - start) * 8 != prod(shape) * _BITS[dtype]:
        raise _damaged(
            file, f"tensor {name} is {stop - start:,} bytes and its shape says otherwise"
        )
    return TensorInfo(tuple(shape), dtype, file, base + start)


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file}: not a whole safetensors file ({what}); fetch it again")


def skipped_text(names: Sequence[str]) -> str:
    """Tensors that are left out, for people: `440 tensors (vision_tower, ...)`; "" for none."""
    groups = set()
    for name in names:
        first, _, rest = name.removeprefix("model.").partition(".")
        groups.add(rest.partition(".")[2] if first == "layers" else first)
    return f"{len(names)} tensors ({', '.join(sorted(groups))})" if names else ""
