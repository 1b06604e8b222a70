"""The content of messages that may have pictures and sound among their texts.

A content is one text, or a list of parts: `{"type": "text", "text"}`, and for media
`{"type": "image", "image"}` or `{"type": "audio", "audio"}`. An API's messages hold a `Given` there
until `read.with_media` puts the file's bytes in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError

Content = str | list[dict[str, Any]]
Place = tuple[str | int, ...]
"""Where a field is in the body of a request, such as `("messages", 0, "content", 1, "image")`."""


@dataclass(frozen=True, slots=True)
class Given:
    """A picture or a piece of sound, as a request has it.

    Args:
        kind: `image` or `audio`.
        place: its field, for errors.
        data: a data URL, the URL of another server, or base64 without any.
        is_url: whether `data` has to be a URL.
        detail: of a picture: `low`, `high` or `auto`.
        is_result: whether a tool gave it: a note stands in for what the model cannot read.
    """

    kind: str
    place: Place
    data: str
    is_url: bool = False
    detail: str | None = None
    is_result: bool = False

    @property
    def part(self) -> dict[str, Any]:
        """It, as a part of a content."""
        return {"type": self.kind, self.kind: self}

    @property
    def field(self) -> str:
        """Its field without the indices of lists, as responses name what they ignore."""
        return ".".join(part for part in self.place if isinstance(part, str))

    @property
    def name(self) -> str:
        """What messages call it: its part of the request, such as `messages.0.content.1`."""
        is_item = isinstance(self.place[-1], int)
        return ".".join(map(str, self.place if is_item else self.place[:-1]))


def refused(place: Place, text: str) -> RequestValidationError:
    """The error of an invalid field."""
    return RequestValidationError([{"type": "media", "loc": ("body", *place), "msg": text}])


def content_of(parts: Iterable[str | Given], between: str) -> Content:
    """A content of texts and media: one text where there are no media.

    Args:
        parts: in order.
        between: separates two texts that follow each other.
    """
    made = ({"type": "text", "text": p} if isinstance(p, str) else p.part for p in parts)
    return merged(made, between)


def joined(first: Content, second: Content, between: str) -> Content:
    """Two contents as one; arguments as for `content_of`."""
    return merged((*parts_of(first), *parts_of(second)), between)


def merged(parts: Iterable[dict[str, Any]], between: str) -> Content:
    """A content of parts; arguments as for `content_of`."""
    made: list[dict[str, Any]] = []
    for part in parts:
        if is_text(part) and made and is_text(made[-1]):
            made[-1] = {**part, "text": between.join((made[-1]["text"], part["text"]))}
        else:
            made.append(part)
    if len(made) <= 1 and all(map(is_text, made)):
        return made[0]["text"] if made else ""
    return made


def parts_of(content: Content | None) -> list[dict[str, Any]]:
    """A content as a list of parts; none for an empty one."""
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": content}] if content else []


def with_texts(content: Any, change: Callable[[str], str]) -> Any:
    """A content with its texts changed; parts of which nothing is left are dropped."""
    if isinstance(content, str):
        return change(content)
    if not isinstance(content, list):
        return content
    made = [{**part, "text": change(part["text"])} if is_text(part) else part for part in content]
    return [part for part in made if not is_text(part) or part["text"]]


def is_text(part: Any) -> bool:
    """Whether a part of a content is a text."""
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def media_in(messages: Sequence[Mapping[str, Any]]) -> Iterator[Given]:
    """The media of a conversation that are not read yet."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            yield from filter(None, map(given_in, content))


def given_in(part: Any) -> Given | None:
    """What a part has that is not read yet."""
    value = part.get(part.get("type")) if isinstance(part, Mapping) else None
    return value if isinstance(value, Given) else None
