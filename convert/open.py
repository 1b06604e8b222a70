"""Open a checkpoint directory or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from mlxkv.errors import ModelNotFound, UnsupportedModel

from .sources import PICKLED, Source


def open_source(source: str | Path, *, text_only: bool = False) -> Source:
    """Open a directory or a GGUF file; with `text_only` without towers of pictures and sound.

    Raises:
        ModelNotFound: there is no such path.
        UnsupportedModel: a file of another kind, or an architecture that is not supported.
        CheckpointError: it is damaged.
    """
    path = Path(source)
    if not path.exists():
        raise ModelNotFound(f"{path}: no such file or folder")
    if path.is_dir():
        return _open_directory(path, text_only)
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

    return open_gguf_source(path)


def _open_directory(path: Path, text_only: bool) -> Source:
    from .hub.source import open_hub_source

    if (path / "config.json").exists():
        return open_hub_source(path, text_only=text_only)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        from .gguf.source import open_gguf_source

        return open_gguf_source(files[0])
    if files:
        names = ", ".join(file.name for file in files)
        raise ModelNotFound(f"{path}: holds {len(files)} GGUF files, name one of them: {names}")
    raise ModelNotFound(f"{path}: holds neither config.json nor a GGUF file")
