"""Write what a plan says, with about one block of rows in memory.

Invariant: a folder under the final name is complete. The output is written into a sibling folder
`.NAME.partial-XXXX` and renamed when every byte is on the disk. The partial folder holds a lock as
long as its writer lives: a later run removes folders that no process holds.

The `safetensors` package needs all tensors of a file at once, so the files are written here.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import secrets
import shutil
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import IO, Any

import mlx.core as mx
import numpy as np

from mlxkv.base.device import side_streams
from mlxkv.base.disk import check_space
from mlxkv.base.durable import sync_path
from mlxkv.checkpoint.quantization import Format
from mlxkv.errors import Hint, OutputError, WeightsError
from mlxkv.nn import kernels

from .fidelity import Fidelity
from .plan import ITEM_BYTES, ConvertPlan, PlannedTensor
from .quantization import has_biases
from .sources import write_json
from .tensors import SAFETENSORS_DTYPES, SourceTensor, matrix_shape

# Of float32 values in memory; dequantizing takes a few times this on top.
BLOCK_BYTES = 4 << 20
_LOCK = ".lock"
_BITS = {
    mx.float32: (mx.uint32, np.int32, 0x7F800000),
    mx.float16: (mx.uint16, np.int16, 0x7C00),
    mx.bfloat16: (mx.uint16, np.int16, 0x7F80),
}
"""dtype -> integers of its size without and with a sign, and the bits of infinity."""

Advance = Callable[[str, int], None]
"""Called with a tensor's name and the bytes just written."""
Round = Callable[[PlannedTensor, mx.array], tuple[mx.array, ...]]
"""Rows of a tensor in its affine format, in the layout of `mx.quantize`."""


def write_model(
    plan: ConvertPlan,
    tensors: Mapping[str, SourceTensor],
    write_side_files: Callable[[Path], None],
    output: Path,
    *,
    overwrite: bool = False,
    advance: Advance = lambda name, n_bytes: None,
    fidelity: Fidelity | None = None,
    rounding: Round | None = None,
) -> Path:
    """Write the model directory.

    Args:
        tensors: of the plan, by name.
        write_side_files: writes tokenizer files and the like into a folder.
        output: the folder to make; may exist if it is empty, or with `overwrite`.
        fidelity: measures what changes; None for no measuring.
        rounding: to affine formats; None for that of `mx.quantize`.

    Raises:
        OutputError: exists already, no space, or it cannot be written.
        CheckpointError: the source turns out to be damaged.
    """
    check_output(output, overwrite)
    check_room(output, plan.total_bytes)
    with _partial_folder(output, overwrite) as folder:
        for name, members in plan.shards.items():
            kernels.look_again()  # they may have been built meanwhile
            with _errors_as_output(output), _naming(plan.source):
                _write_shard(folder / name, members, tensors, advance, fidelity, rounding)
        with _errors_as_output(output):
            _write_config(folder, plan)
            write_side_files(folder)
    return output


def check_room(output: Path, n_bytes: int) -> None:
    """Raise OutputError unless so many bytes are free where the output is to lie."""
    check_space(output.parent, n_bytes, f"{output}:", "make room or choose another output")


def write_headers(plan: ConvertPlan, folder: Path) -> None:
    """Write config.json, the index and the headers of the weights: sparse files of their length.

    Args:
        plan: what the model would be.
        folder: an empty one.

    Raises:
        OSError: it cannot be written.
    """
    for name, members in plan.shards.items():
        header, _, size = _layout(members)
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(size)
    _write_config(folder, plan)


def _write_config(folder: Path, plan: ConvertPlan) -> None:
    """config.json, and the index if there are several files of weights."""
    if len(plan.shards) > 1:
        index = {array.name: name for name, members in plan.shards.items()
                 for member in members for array in member.arrays}  # fmt: skip
        sums = {"total_size": plan.total_bytes, "total_parameters": plan.n_parameters}
        shards = {"metadata": sums, "weight_map": dict(sorted(index.items()))}
        write_json(folder / "model.safetensors.index.json", shards)
    write_json(folder / "config.json", dict(sorted(plan.config.items())))


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that is not an empty or new folder.

    Raises:
        OutputError: says what to do.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: exists and is not a folder: choose another output")
    if not overwrite and output.is_dir() and any(output.iterdir()):
        raise OutputError(f"{output}: exists already: choose another output or remove it first")


@contextmanager
def _errors_as_output(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{output}: cannot be written: {reason}; nothing was kept") from error


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Put the source's path in front of an error about a tensor."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error


@contextmanager
def _partial_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside the output that is renamed to it, or removed on errors."""
    parent = output.absolute().parent
    with _errors_as_output(output):
        parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(parent, output)
        folder = parent / f".{output.name}.partial-{secrets.token_hex(4)}"
        folder.mkdir()
        lock = (folder / _LOCK).open("wb")
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield folder
        with _errors_as_output(output):
            (folder / _LOCK).unlink()
            _publish(folder, output, overwrite)
    except BaseException:
        # Ctrl-C too: no incomplete model may stay.
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        lock.close()


def _remove_stale(parent: Path, output: Path) -> None:
    """Remove partial folders of runs that were killed.

    Raises:
        OutputError: another run is writing this output now.
    """
    for folder in parent.glob(f".{glob.escape(output.name)}.partial-*"):
        try:
            lock = (folder / _LOCK).open("rb+")
        except FileNotFoundError:
            shutil.rmtree(folder, ignore_errors=True)
            continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"{output}: another conversion is writing it") from None
            except OSError:
                continue  # a file system without locks
            shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, output: Path, overwrite: bool) -> None:
    """Rename the folder to the output, after its bytes are on the disk."""
    for path in folder.iterdir():
        sync_path(path, through=False)
    sync_path(folder)
    check_output(output, overwrite)
    replaced = None
    if output.is_dir() and any(output.iterdir()):
        replaced = output.with_name(f".{output.name}.partial-{secrets.token_hex(4)}")
        output.rename(replaced)
    try:
        folder.rename(output)
    except OSError:
        if replaced is not None:
            replaced.rename(output)
        raise
    sync_path(output.absolute().parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _write_shard(
    path: Path,
    members: tuple[PlannedTensor, ...],
    tensors: Mapping[str, SourceTensor],
    advance: Advance,
    fidelity: Fidelity | None,
    rounding: Round | None,
) -> None:
    header, starts, size = _layout(members)
    with path.open("wb") as file:
        file.write(header)
        # While some are computed, those before them are written and the next one is read.
        computed: deque[_Block] = deque()
        for block in _blocks(members, tensors, rounding):
            computed.append(block)
            if len(computed) > len(side_streams()):
                _write_block(file, computed.popleft(), starts, advance, fidelity)
        while computed:
            _write_block(file, computed.popleft(), starts, advance, fidelity)
        if file.seek(0, os.SEEK_END) != size:
            raise WeightsError(f"{path.name}: wrote {file.tell():,} bytes of {size:,}")


@dataclass(frozen=True, slots=True)
class _Block:
    """Some rows of a tensor, being computed as the plan stores them."""

    planned: PlannedTensor
    source: SourceTensor
    start: int
    stop: int
    arrays: tuple[mx.array, ...]


def _blocks(
    members: tuple[PlannedTensor, ...],
    tensors: Mapping[str, SourceTensor],
    rounding: Round | None,
) -> Iterator[_Block]:
    """All rows in order; each block is being computed when it comes, the streams in turn."""
    streams = cycle(side_streams())
    for planned in members:
        source = tensors[planned.name]
        n_rows, columns = matrix_shape(planned.shape)
        step = source.row_step
        n = max(step, BLOCK_BYTES // (4 * max(1, columns)) // step * step)
        for start in range(0, n_rows, n):
            stop = min(n_rows, start + n)
            arrays = _block(planned, source, start, stop, rounding, next(streams))
            yield _Block(planned, source, start, stop, arrays)
        # Buffers of other shapes would pile up in MLX's cache.
        mx.clear_cache()


def _layout(members: tuple[PlannedTensor, ...]) -> tuple[bytes, dict[str, int], int]:
    """The file's header, where each array begins, and the size of the file."""
    arrays = [array for member in members for array in member.arrays]
    # Widest first, so that every array is aligned to its values.
    arrays.sort(key=lambda array: -ITEM_BYTES[array.dtype])
    table: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for array in arrays:
        table[array.name] = {
            "dtype": SAFETENSORS_DTYPES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    starts = {array.name: base + table[array.name]["data_offsets"][0] for array in arrays}
    return struct.pack("<Q", len(text)) + text, starts, base + offset


def _write_block(
    file: IO[bytes],
    block: _Block,
    starts: Mapping[str, int],
    advance: Advance,
    fidelity: Fidelity | None,
) -> None:
    planned, written = block.planned, 0
    if fidelity is not None:
        fidelity.add(planned, block.source, block.start, block.arrays)
    for stored, array in zip(planned.arrays, block.arrays, strict=True):
        data = _bytes_of(array)
        if len(data) != stored.row_bytes * (block.stop - block.start):
            raise WeightsError(f"{planned.origin}: has another size than its header says")
        file.seek(starts[stored.name] + block.start * stored.row_bytes)
        file.write(data)
        written += len(data)
    advance(planned.name, written)


def _block(
    planned: PlannedTensor,
    source: SourceTensor,
    start: int,
    stop: int,
    rounding: Round | None,
    stream: mx.Stream,
) -> tuple[mx.array, ...]:
    """These rows as the plan stores them, being computed; quantized on a stream."""
    dtype = getattr(mx, planned.dtype)
    target = planned.quantization
    if target is None:
        arrays = (_cast(planned, source.rows(start, stop), dtype),)
    elif target == source.quantization:
        weight, *scales = source.quantized_rows(start, stop)
        if has_biases(target):
            scales = [_cast(planned, scale, dtype) for scale in scales]
        arrays = (weight, *scales)
    elif rounding is not None and has_biases(target):
        arrays = rounding(planned, _cast(planned, source.rows(start, stop), dtype))
    else:
        values = _cast(planned, source.rows(start, stop), dtype)
        arrays = _quantized(values, target, stream)
    mx.async_eval(*arrays)
    return arrays


def _quantized(values: mx.array, target: Format, stream: mx.Stream) -> tuple[mx.array, ...]:
    """Finite values in a format."""
    size, bits = target.group_size, target.bits
    if has_biases(target):
        return kernels.quantized(values, size, bits, stream)
    return tuple(mx.quantize(values, size, bits, mode=target.mode, stream=stream))


def _cast(planned: PlannedTensor, values: mx.array, dtype: mx.Dtype) -> mx.array:
    """Cast to the planned dtype.

    Raises:
        WeightsError: NaN or infinite values, in the source or past the range of the dtype.
    """
    cast = values.astype(dtype)
    if not _is_finite(cast):
        if _is_finite(values):
            raise WeightsError(
                f"{planned.origin}: holds values past the range of {planned.dtype}",
                hints=[Hint("dtype", "bfloat16"), Hint("dtype", "float32")],
            )
        raise WeightsError(f"{planned.origin}: holds NaN or infinite values: the file is damaged")
    return cast


def _is_finite(array: mx.array) -> bool:
    """Whether no value is NaN or infinite: as integers they are the largest of their sign.

    On a CPU far faster than `mx.isfinite`, which took as long as quantizing.
    """
    bits, signed, infinity = _BITS[array.dtype]
    found = np.asarray(array.view(bits))
    if not found.size:
        return True
    minus = infinity + (1 << 8 * found.itemsize - 1)
    return int(found.view(signed).max()) < infinity and int(found.max()) < minus


def _bytes_of(array: mx.array) -> memoryview:
    # NumPy has no bfloat16.
    bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.ascontiguousarray(np.asarray(bits)).data.cast("B")
