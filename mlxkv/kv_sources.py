"""What `mlxkv kv save` reads: texts, files and folders, as one prompt."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlxkv.errors import UsageError
from mlxkv.run import join_prompt, read_piped

MAX_FILE_BYTES = 4 << 20
"""A larger file in a folder is data, not something to read."""


def read(sources: Sequence[str]) -> str:
    """The prompt that some arguments and the piped text give.

    Args:
        sources: files and folders, or one text. A folder stands for its text files: those that git
            tracks or would track, where it is a repository, else all that are not hidden.

    Raises:
        UsageError: nothing to read, no such file, or a file that is no text.
    """
    paths = [Path(source).expanduser() for source in sources]
    missing = [source for source, path in zip(sources, paths, strict=True) if not _exists(path)]
    # A word alone is rather a file's name with a slip in it than a prompt.
    if len(sources) == 1 and missing and any(c.isspace() for c in sources[0]):
        text: str | None = sources[0]
    elif missing:
        raise UsageError(f"{missing[0]}: no such file or folder")
    else:
        text = _files(paths) if paths else None
    whole = join_prompt(text, read_piped())
    if whole is None:
        raise UsageError("there is nothing to save: give a text, files or folders, or pipe it in")
    return whole


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a text can be too long for a path
        return False


def _files(paths: Sequence[Path]) -> str:
    if len(paths) == 1 and paths[0].is_file():
        return _text(paths[0])
    parts = []
    for path in paths:
        for file in _inside(path) if path.is_dir() else [path]:
            content = _text(file) if file == path else _text_or_none(file)
            if content is not None:
                parts.append(f"File {file}:\n\n{content}")
    if not parts:
        raise UsageError(f"{paths[0]}: no text files in it")
    return "\n\n".join(parts)


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not UTF-8 text (byte {error.start:,})") from None
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror})") from error


def _text_or_none(file: Path) -> str | None:
    """A file of a folder; None for what is no text."""
    try:
        if not file.is_file() or file.stat().st_size > MAX_FILE_BYTES:
            return None
        text = file.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    return None if "\0" in text or not text.strip() else text


def _inside(folder: Path) -> Iterator[Path]:
    """The files of a folder in a fixed order: another order would be another prompt."""
    tracked = _tracked(folder)
    if tracked:  # nothing of a folder that git ignores
        yield from (folder / name for name in sorted(tracked))
        return
    for path in sorted(folder.rglob("*")):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _tracked(folder: Path) -> list[str] | None:
    command = ["git", "-C", str(folder), "ls-files", "-z", "-co", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        return None
    if done.returncode:
        return None
    return [name for name in done.stdout.decode("utf-8", "replace").split("\0") if name]


def fingerprint_for(archive: Path, model: str | None) -> str:
    """What the model of this machine calls its KV, which an imported file must belong to.

    Args:
        archive: from `mlxkv kv export`.
        model: its name; None for the one that the file names.

    Raises:
        UsageError: no such file.
        ModelNotFound: the model is not here.
        CheckpointError: the file or the model is damaged.
    """
    from mlxkv.named_kv import open_archive
    from mlxkv.names import kv_dir
    from mlxkv.page_disk import fingerprint_in
    from mlxkv.store import resolve

    try:
        with open_archive(archive) as (named, _):
            path = resolve(model or named.model, fetch=False)
    except FileNotFoundError:
        raise UsageError(f"{archive}: no such file") from None
    return fingerprint_in(kv_dir(), path, named.dtype, named.kv_type)
