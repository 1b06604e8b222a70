"""Open a checkpoint directory or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from mlxkv.checkpoint.gguf_names import first_parts, is_mmproj
from mlxkv.errors import ModelNotFound, UnsupportedModel, UsageError

from .sources import PICKLED, Source


def open_source(
    source: str | Path, *, text_only: bool = False, mmproj: str | Path | None = None
) -> Source:
    """Open a directory or a GGUF file.

    Args:
        source: its path.
        text_only: without towers of pictures and sound.
        mmproj: the GGUF file of a GGUF model's encoders; None for the one beside it, if any.

    Raises:
        UsageError: `mmproj` with another kind of source, or with `text_only`.
        ModelNotFound: there is no such path.
        UnsupportedModel: a file of another kind, or an architecture that is not supported.
        CheckpointError: it is damaged.
    """
    path, encoders = Path(source), None if mmproj is None else Path(mmproj)
    if encoders is not None and text_only:
        raise UsageError("a model of text alone has no encoders", field="mmproj")
    if not path.exists():
        raise ModelNotFound(f"{path}: no such file or folder")
    if path.is_dir():
        return _open_directory(path, text_only, encoders)
    if path.suffix in PICKLED:
        raise UnsupportedModel(
            f"{path}: pickled weights can run code and are not read: use the model's safetensors"
        )
    if path.suffix == ".safetensors":
        raise UnsupportedModel(
            f"{path}: a weights file alone has no config and tokenizer: give its folder "
            f"{path.parent}"
        )
    from .gguf.source import open_gguf_source

    return open_gguf_source(path, encoders, text_only=text_only)


def _open_directory(path: Path, text_only: bool, mmproj: Path | None) -> Source:
    from .gguf.source import open_gguf_source
    from .hub.source import open_hub_source

    if (path / "config.json").exists():
        if mmproj is not None:
            raise UsageError("is for a model in a GGUF file", field="mmproj")
        return open_hub_source(path, text_only=text_only)
    names = sorted(file.name for file in path.glob("*.gguf") if not is_mmproj(file.name))
    files = [path / name for name in first_parts(names)]
    if len(files) == 1:
        return open_gguf_source(files[0], mmproj, text_only=text_only)
    if files:
        names = ", ".join(file.name for file in files)
        raise ModelNotFound(f"{path}: holds {len(files)} GGUF files, name one of them: {names}")
    raise ModelNotFound(f"{path}: holds neither config.json nor a GGUF file")
