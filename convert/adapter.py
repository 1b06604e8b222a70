"""An adapter of any kind: mlx-lm's and PEFT's are read as they are, llama.cpp's is converted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxkv.checkpoint.adapter import Adapter
from mlxkv.checkpoint.adapter_files import GGUF, open_adapter


def read_adapter(path: Path, config: Mapping[str, Any] | None = None) -> Adapter:
    """Read an adapter, its arrays lazy.

    Args:
        path: its directory, or .gguf file.
        config: its model's config.json, by whose heads rows of some GGUF files are brought in
            order; None leaves them.

    Raises:
        CheckpointError: it is damaged, or asks for what is not supported.
    """
    if path.suffix != GGUF:
        return open_adapter(path)
    from .gguf.adapter import read_gguf_adapter

    return read_gguf_adapter(path, config)
