"""What a GGUF file holds, by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import TypeVar

AnyPath = TypeVar("AnyPath", bound=PurePath)

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
_MOST_PARTS = 9999


def is_gguf(name: str) -> bool:
    """Whether it is a GGUF file."""
    return name.lower().endswith(".gguf")


def is_mmproj(name: str) -> bool:
    """Whether it holds the encoders of a model, as llama.cpp calls them."""
    return "mmproj" in name.lower() and is_gguf(name)


def mmproj_beside(path: Path) -> list[Path]:
    """The files of encoders in a model file's folder."""
    return sorted(file for file in path.parent.glob("*.gguf") if is_mmproj(file.name))


def parts_of(path: AnyPath) -> list[AnyPath]:
    """The files of a split model that one of them is of, in order; of any other file itself."""
    match = _PART.fullmatch(path.name)
    if match is None or not 0 < int(match[3]) <= _MOST_PARTS:
        return [path]
    stem, count = match[1], int(match[3])
    return [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]


def first_parts(names: Iterable[str]) -> list[str]:
    """Names of files without those of later parts of split models."""
    found = []
    for name in names:
        match = _PART.fullmatch(name)
        if match is None or int(match[2]) == 1:
            found.append(name)
    return found
