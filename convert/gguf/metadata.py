"""A GGUF file's metadata, read with type checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlxkv.errors import ConfigError

from .file import GGUFFile


def short_number(value: float) -> float:
    """The shortest decimal of a float32: 1e-05 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of special tokens, under config.json's keys."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    ids = {ours: metadata.get(f"tokenizer.ggml.{name}_token_id") for ours, name in names.items()}
    return {f"{ours}_token_id": i for ours, i in ids.items() if isinstance(i, int)}


class Metadata:
    """A typed reader of the keys of one architecture, which notes those that were read."""

    def __init__(self, file: GGUFFile):
        self.file = file
        self.prefix = f"{file.architecture}."
        self._read: set[str] = set()

    def error(self, key: str, message: str) -> ConfigError:
        return ConfigError(f"{self.file.path}: {self.prefix}{key} {message}")

    def any(self, key: str) -> Any:
        self._read.add(key)
        return self.file.metadata.get(self.prefix + key)

    def opt_number(self, key: str) -> float | None:
        """A number; an array is one if all its values are the same."""
        value = self.any(key)
        if isinstance(value, np.ndarray) and value.size and value.dtype.kind in "iuf":
            if (value != value[0]).any():
                shown = value[:8].tolist()
                raise self.error(key, f"differs by layer, which is not supported; got {shown}")
            value = value[0].item()
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise self.error(key, f"must be a number; got {value!r}")
        return value

    def each(self, key: str, n_layers: int) -> list[Any]:
        """A whole number, or true or false, of each layer; one for all stands for each."""
        value = self.any(key)
        if not isinstance(value, np.ndarray):
            return [self.int(key)] * n_layers
        if len(value) != n_layers or value.dtype.kind not in "iub":
            raise self.error(key, f"must be {n_layers} whole numbers; got {value[:8].tolist()}")
        return value.tolist()

    def opt_int(self, key: str) -> int | None:
        value = self.opt_number(key)
        if value is None:
            return None
        if value != int(value) or value < 0:
            raise self.error(key, f"must be a whole number; got {value!r}")
        return int(value)

    def int(self, key: str, default: int | None = None) -> int:
        value = self.opt_int(key)
        value = default if value is None else value
        if not value:
            raise self.error(key, f"must be a whole number of at least 1; got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.opt_number(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing and has no default")
        return value

    def ignore(self, *keys: str) -> None:
        """Accept keys that do not change the mathematics."""
        self._read.update(keys)

    def finish(self) -> None:
        """Refuse keys that were not read, unless they are zero.

        Raises:
            ConfigError: names the first of them.
        """
        for key, value in sorted(self.file.metadata.items()):
            name = key.removeprefix(self.prefix)
            is_zero = isinstance(value, int | float) and not value
            if name != key and name not in self._read and not is_zero:
                raise self.error(
                    name,
                    f"is not understood for architecture {self.file.architecture!r}; "
                    f"got {repr(value)[:40]}",
                )
