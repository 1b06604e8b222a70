"""What a GGUF file holds, by its name."""

from __future__ import annotations

from pathlib import Path


def is_mmproj(name: str) -> bool:
    """Whether it holds the encoders of a model, as llama.cpp calls them."""
    return "mmproj" in name.lower() and name.lower().endswith(".gguf")


def mmproj_beside(path: Path) -> list[Path]:
    """The files of encoders in a model file's folder."""
    return sorted(file for file in path.parent.glob("*.gguf") if is_mmproj(file.name))
