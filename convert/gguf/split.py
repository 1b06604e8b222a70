"""A model in several GGUF files: any of them stands for all.

Format: llama.cpp's `gguf-split`. The first file has the metadata; all say which part they are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mlxkv.checkpoint.gguf_names import parts_of
from mlxkv.errors import CheckpointError, ModelNotFound

from .file import GGUFFile, GGUFTensor, open_gguf

_COUNT, _NUMBER, _TENSORS = "split.count", "split.no", "split.tensors.count"


def open_whole(path: Path) -> GGUFFile:
    """Open a GGUF file, and with a part of a model all others.

    Returns:
        One table of tensors, with the first part's path and metadata.

    Raises:
        ModelNotFound: the file, or another part of it, is not there.
        UnsupportedModel: see `open_gguf`.
        CheckpointError: a part is damaged, or of another model.
    """
    file = open_gguf(path)
    count = file.metadata.get(_COUNT, 0)
    if type(count) is not int or count <= 1:
        return file
    paths = parts_of(path)
    if len(paths) != count:
        raise CheckpointError(
            f"{path}: is one of {count} parts; it must be named NAME-00001-of-{count:05d}.gguf"
        )
    if missing := [part.name for part in paths if not part.is_file()]:
        raise ModelNotFound(
            f"{path}: {len(missing)} of {count} parts are missing beside it: "
            f"{', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}"
        )
    parts = [file if part == path else open_gguf(part) for part in paths]
    tensors: dict[str, GGUFTensor] = {}
    for number, part in enumerate(parts):
        _check_part(part, number, count)
        if twice := tensors.keys() & part.tensors.keys():
            raise CheckpointError(f"{part.path}: tensor {min(twice)!r} is in another part as well")
        tensors |= part.tensors
    expected = parts[0].metadata.get(_TENSORS, len(tensors))
    if expected != len(tensors):
        raise CheckpointError(
            f"{parts[0].path}: all parts hold {len(tensors)} tensors; {_TENSORS} is {expected}"
        )
    return replace(parts[0], tensors=tensors)


def _check_part(part: GGUFFile, number: int, count: int) -> None:
    said = part.metadata.get(_NUMBER), part.metadata.get(_COUNT)
    if said != (number, count):
        raise CheckpointError(
            f"{part.path}: says that it is part {said[0]!r} of {said[1]!r}, counted from 0; its "
            f"name says {number} of {count}"
        )
