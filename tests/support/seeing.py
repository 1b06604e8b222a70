"""A tiny model of text that is given eyes: a linear encoder, and a reader of arrays as pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import mlxkv
from mlxkv.engine.media.side import MediaSide
from mlxkv.llm.llm import LLM
from mlxkv.media.types import AUDIO, IMAGE, Medium
from tests.support.command_line import chat_model

ROWS = 20
"""Rows of a picture: a page of 256 tokens ends inside one now and then."""
VALUES = 6
SPECIAL = ("<image>", "<boi>", "<eoi>", "<sound>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% elif p['type'] == 'audio' %}<sound>"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def seeing_model(folder: Path, **options: Any) -> Path:
    """The checkpoint, see `chat_model`."""
    return chat_model(folder, template=TEMPLATE, special=SPECIAL, ascii=True, **options)


class Placeholder:
    """See `media.reader.Placeholder`."""

    def __init__(self, text: str, begin: int, end: int, token: int):
        self.text, self.begin, self.end, self.token = text, begin, end, token
        self.before = self.after = "\n"


class Reader:
    """Reads pictures, which are arrays `[ROWS, VALUES]` or files of their bytes."""

    kinds = frozenset({IMAGE, AUDIO})

    def __init__(self) -> None:
        first = 3  # behind the special tokens of every chat model
        self.placeholders = {
            IMAGE: Placeholder("<image>", first + 1, first + 2, first),
            AUDIO: Placeholder("<sound>", first + 1, first + 2, first + 3),
        }
        self.n_read = 0

    def image(self, source: Any, budget: int | None = None, name: str = "") -> Medium:
        self.n_read += 1
        if isinstance(source, str | Path):
            source = Path(source).read_bytes()
        if isinstance(source, bytes):
            source = np.frombuffer(source, np.float32).reshape(-1, VALUES)
        digest = hashlib.sha256(source.tobytes()).digest()
        return Medium(IMAGE, digest, len(source), 3, name, {"pixels": source})

    def audio(self, source: Any, name: str = "") -> list[Medium]:
        whole = self.image(source, name=name)
        assert whole.data is not None
        digest = hashlib.sha256(b"sound" + whole.digest).digest()
        return [Medium(AUDIO, digest, whole.n_tokens, 6, name, whole.data)]


def load_seeing(path: Path, two_way: bool = False) -> LLM:
    """The model with eyes."""
    llm = mlxkv.load(path)
    E = llm.config.hidden_size
    eyes = mx.array(np.random.RandomState(5).standard_normal((VALUES, E)).astype(np.float32))
    own = type(llm.model)

    class Seeing(own):
        @property
        def media_kinds(self) -> frozenset[str]:
            return Reader.kinds

        @property
        def two_way_kinds(self) -> frozenset[str]:
            return frozenset({IMAGE}) if two_way else frozenset()

        def media_rows(self, kind: str, data: Mapping[str, mx.array]) -> mx.array:
            return mx.tanh(data["pixels"] @ eyes) * (1 if kind == IMAGE else 2)

    llm.model.__class__ = Seeing
    llm.media = MediaSide(path, Reader.kinds)
    llm.media.reader = Reader()  # pyright: ignore[reportAttributeAccessIssue]
    return llm


def picture(seed: int, n_rows: int = ROWS) -> np.ndarray:
    """A picture that no other seed gives."""
    return np.random.RandomState(seed).standard_normal((n_rows, VALUES)).astype(np.float32)


def shown(*parts: Any) -> list[dict[str, Any]]:
    """A user's message of texts and pictures."""
    made = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": IMAGE, IMAGE: part.tobytes(), "name": f"{part[0, 0]:.3f}.png"}
        for part in parts
    ]
    return [{"role": "user", "content": made}]
