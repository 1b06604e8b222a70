"""Arguments and piped text as prompts: texts, files, folders, MODEL and PROMPT, formats."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxkv.base import regular
from mlxkv.errors import UsageError
from mlxkv.store import catalog
from mlxkv.store.refs import looks_like_model

if TYPE_CHECKING:
    from mlxkv.saved_kv.manifest import NamedKV

PIPED = "-"
"""An argument that stands for piped text."""
MAX_FILE_BYTES = 4 << 20
"""A larger file in a folder is data, not something to read."""


Content = str | list[dict[str, Any]]
"""A text, or texts and media as parts of a message, see `media.parts`."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of what is read.

    Args:
        text: of it; of a medium its file's name.
        file: of a medium.
        kind: `image` or `audio`; None for text.
        is_named: whether the arguments name this file.
    """

    text: str
    file: Path | None = None
    kind: str | None = None
    is_named: bool = False


def read(sources: Sequence[str], kinds: Collection[str] = ()) -> Content:
    """The prompt that the arguments and the piped text make; see `pieces` and `content`."""
    return content(pieces(sources), kinds)


def pieces(sources: Sequence[str]) -> list[Piece]:
    """The parts of the prompt that the arguments and the piped text make.

    Args:
        sources: files and folders, or one text. A folder means its text files, pictures and
            recordings: in a repository those that git does not ignore, else all that are not
            hidden.

    Raises:
        UsageError: nothing to read, no such file, or a file that is neither text nor a medium.
    """
    paths = [Path(source).expanduser() for source in sources]
    missing = [source for source, path in zip(sources, paths, strict=True) if not _exists(path)]
    # A single word is more likely a misspelled file name than a prompt.
    if len(sources) == 1 and missing and any(c.isspace() for c in sources[0]):
        found = [Piece(sources[0])]
    elif missing:
        raise UsageError(f"{missing[0]}: no such file or folder")
    else:
        found = _files(paths) if paths else []
    if (piped := read_piped()) is not None:
        found.append(Piece(piped))
    if not found:
        raise UsageError("there is nothing to save: give a text, files or folders, or pipe it in")
    return found


def content(found: Sequence[Piece], kinds: Collection[str]) -> Content:
    """What a model can read of some pieces: a text, unless there are media among them.

    Args:
        found: from `pieces`.
        kinds: of media that the model takes; in folders others are left out, as all data is.

    Raises:
        UsageError: nothing of it can be read.
    """
    taken = [each for each in found if each.kind is None or each.is_named or each.kind in kinds]
    if not taken:
        raise UsageError(f"{found[0].file}: the model can read no file beside it in its folder")
    texts, parts = list[str](), list[dict[str, Any]]()
    for each in taken:
        texts.append(each.text)
        if each.kind is not None:
            named = {"type": each.kind, each.kind: each.file, "name": Path(each.text).name}
            parts += [
                {"type": "text", "text": "\n\n".join([*texts[:-1], f"File {each.text}:"])},
                named,
            ]
            texts = []
    whole = "\n\n".join(texts)
    if not parts and not whole.strip():
        raise UsageError("the prompt is empty")
    return [*parts, *([{"type": "text", "text": whole}] if texts else [])] if parts else whole


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a text can be too long for a path
        return False


def _files(paths: Sequence[Path]) -> list[Piece]:
    if len(paths) == 1 and not paths[0].is_dir():
        kind = _kind_of(paths[0])
        return [
            Piece(_text(paths[0])) if kind is None else Piece(str(paths[0]), paths[0], kind, True)
        ]
    found = []
    for path in paths:
        for file in _inside(path) if path.is_dir() else [path]:
            if (kind := _kind_of(file, read_alone=file != path)) is not None:
                found.append(Piece(str(file), file, kind, file == path))
                continue
            text = _text(file) if file == path else _text_or_none(file)
            if text is not None:
                found.append(Piece(f"File {file}:\n\n{text}"))
    if not found:
        raise UsageError(f"{paths[0]}: no text files in it")
    return found


def _kind_of(file: Path, *, read_alone: bool = False) -> str | None:
    """Whether a file is a picture or a recording, by its first bytes; None for neither."""
    from mlxkv.media.kinds import HEAD, kind_of

    try:
        if not file.is_file():
            return None
        with regular.open_file(file) as opened:
            kind = kind_of(opened.read(HEAD), read_alone=read_alone)
    except OSError:
        return None
    # A text can begin as a file of another kind does: BMP files with "BM".
    return None if kind is None or _text_or_none(file) is not None else kind


def _text(file: Path) -> str:
    try:
        return regular.read_given(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not UTF-8 text (byte {error.start:,})") from None
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror})") from error


def _text_or_none(file: Path) -> str | None:
    """A file of a folder; None for what is no text."""
    try:
        if not file.is_file() or file.stat().st_size > MAX_FILE_BYTES:
            return None
        text = regular.read_bytes(file).decode("utf-8")
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


def split_words(
    words: Sequence[str],
    model: str | None,
    saved: NamedKV | None = None,
    names_model: Callable[[str], bool] = looks_like_model,
) -> tuple[str, str | None]:
    """MODEL and PROMPT out of the arguments of `run`.

    A single argument is the MODEL if `names_model` says so, else the PROMPT for the default
    model; of two the first is the MODEL. With `--model` all are the PROMPT, and so with saved KV,
    which has a model, unless the first of two names one.

    Raises:
        UsageError: more than two arguments: a prompt without quotes.
    """
    if model is None and saved is not None and not (len(words) == 2 and names_model(words[0])):
        model = saved.model
    if model is not None:
        return model, " ".join(words) if words else None
    if not words:
        return catalog.DEFAULT.name, None
    if len(words) > 2:
        raise UsageError(
            f"run takes a model and a prompt; got {len(words)} words. Put the prompt in quotes: "
            f'mlxkv run "{" ".join(words)}"'
        )
    if len(words) == 2:
        return words[0], words[1]
    if names_model(words[0]):
        return words[0], None
    return catalog.DEFAULT.name, words[0]


def saved_kv(name: str | None) -> NamedKV | None:
    """Saved KV by its name, before its model is loaded.

    Raises:
        UsageError: nothing of that name.
    """
    if name is None:
        return None
    from mlxkv.base.paths import kv_dir
    from mlxkv.saved_kv.registry import KVNames

    return KVNames(kv_dir()).load(name)


def answer_format(text: str | None) -> str | dict[str, Any] | None:
    """The value of `--format`: "json", or the JSON schema in a file.

    Raises:
        UsageError: no such file, or it holds no JSON object.
    """
    if text is None or text == "json":
        return text
    file = Path(text).expanduser()
    if not _exists(file):
        raise UsageError(
            f"must be json, or a file with a JSON schema; got {text!r}", field="format"
        )
    try:
        schema = json.loads(_text(file))
    except ValueError as error:
        raise UsageError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(schema, dict):
        raise UsageError(f"{file}: a JSON schema must be an object; got {schema!r:.60}")
    return schema


def read_piped() -> str | None:
    """Text piped or redirected into stdin, without one final newline; None if there is none.

    Raises:
        UsageError: it is not UTF-8 text.
    """
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # closed
        return None
    if stat.S_ISCHR(mode):  # a terminal, or /dev/null
        return None
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"the piped prompt is not UTF-8 text (byte {error.start:,})") from None
    return text.removesuffix("\n") or None


def texts_or_lines(texts: list[str] | None, nothing: str) -> list[str]:
    """Texts of the command line; for `-` or none, one of each line that is piped in.

    Only a line feed ends a line: other separators are characters of a text.

    Raises:
        UsageError: there are none; it begins with `nothing`.
    """
    if texts is not None and texts != [PIPED]:
        return texts
    if sys.stdin.isatty():
        raise UsageError(f"there is {nothing}: give texts, or {PIPED} and pipe lines in")
    piped = sys.stdin.read()
    if not piped:
        raise UsageError(f"there is {nothing}: no lines are piped in")
    return piped.removesuffix("\n").split("\n")


def join_prompt(prompt: str | None, piped: str | None) -> str | None:
    """The prompt followed by the piped text; None if there is neither.

    Raises:
        UsageError: it is empty.
    """
    text = "\n\n".join(part for part in (prompt, piped) if part is not None)
    if not text.strip() and (prompt, piped) != (None, None):
        raise UsageError("the prompt is empty")
    return text or None
