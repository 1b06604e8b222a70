"""The parts of messages that are pictures or sound.

    {"type": "image", "image": path | bytes | PIL image | array, "budget": int, "name": str}
    {"type": "audio", "audio": path | bytes | (array, sample rate), "name": str}

`budget` and `name` may be left out. In messages of saved KV the content is `{"digests": [hex]}`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

from mlxkv.errors import MediaError
from mlxkv.media.types import KINDS

OTHERS = {"image_url", "input_image", "input_audio", "video", "video_url"}
"""Types of other interfaces, which a template would drop silently."""


def kind_of(part: Any) -> str | None:
    """The kind of a part that is a medium; None for any other.

    Raises:
        MediaError: a part of another interface, or one without content.
    """
    if not isinstance(part, Mapping) or (kind := part.get("type")) == "text":
        return None
    if kind in OTHERS:
        raise MediaError(
            f'a part of type {kind!r} cannot be read here: give {{"type": "image", "image": ...}} '
            'or {"type": "audio", "audio": ...}, a path or bytes'
        )
    if kind not in KINDS:
        return None
    if part.get(kind) is None:
        raise MediaError(f"a part of type {kind!r} needs {kind!r}: a path, bytes or an array")
    return kind


def has_media(messages: Any) -> bool:
    """Whether a prompt has a message with a picture or with sound, or with what may be meant so."""
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        return False
    types = {*KINDS, *OTHERS}
    return any(isinstance(p, Mapping) and p.get("type") in types for p in _parts(messages))


def _parts(messages: Sequence[Any]) -> Iterator[Any]:
    for message in messages:
        if not isinstance(message, Mapping):
            return
        content = message.get("content")
        if isinstance(content, list | tuple):
            yield from content


def without_content(
    messages: Sequence[Mapping[str, Any]], take: Callable[[str, Mapping[str, Any]], None]
) -> list[Mapping[str, Any]]:
    """Messages whose media are parts of a type and no content, as chat templates know them.

    What a tool's result shows goes into a user message behind the results: templates write the
    text of results alone.

    Args:
        messages: the conversation.
        take: called with the kind and the part of each medium, in the order of the result.
    """
    made: list[Mapping[str, Any]] = []
    shown: list[Any] = []
    for i, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list | tuple) and any(map(kind_of, content)):
            if message.get("role") == "tool":
                shown += [part for part in content if kind_of(part)]
                content = [part for part in content if not kind_of(part)]
            else:
                content = [_bare(part, take) for part in content]
            message = {**message, "content": content}
        made.append(message)
        following = messages[i + 1].get("role") if i + 1 < len(messages) else ""
        if shown and following != "tool":
            made.append({"role": "user", "content": [_bare(part, take) for part in shown]})
            shown = []
    return made


def _bare(part: Any, take: Callable[[str, Mapping[str, Any]], None]) -> Any:
    kind = kind_of(part)
    if kind is None:
        return part
    take(kind, part)
    return {"type": kind}


def mapped(prompt: Any, change: Callable[[Any], Any]) -> Any:
    """A prompt with the content of its media changed; the same object if it has none."""
    if not has_media(prompt):
        return prompt

    def changed(part: Any) -> Any:
        kind = part.get("type") if isinstance(part, Mapping) else None
        return {**part, kind: change(part.get(kind))} if kind in KINDS else part

    return [
        {**message, "content": [changed(part) for part in content]}
        if isinstance(content := message.get("content"), list | tuple)
        else message
        for message in prompt
    ]


def content_bytes(prompt: Any) -> int:
    """Bytes of files and of arrays that a prompt holds."""
    found: list[int] = []
    mapped(prompt, lambda source: found.append(_n_bytes(source)))
    return sum(found)


def _n_bytes(source: Any) -> int:
    if isinstance(source, bytes | bytearray | memoryview):
        return memoryview(source).nbytes
    array = source[0] if isinstance(source, tuple) and source else source
    return getattr(array, "nbytes", 0)


def is_same(a: Any, b: Any) -> bool:
    """Whether two messages, or values in them, are equal; arrays and pictures by identity: their
    own comparison has no single answer, or takes long.
    """
    if a is b:
        return True
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    return isinstance(a, _PLAIN) and isinstance(b, _PLAIN) and a == b


_PLAIN = (str, bytes, int, float, PathLike)
