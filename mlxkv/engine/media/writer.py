"""Conversations with pictures and sound to prompts.

A chat template writes a placeholder for a part `{"type": "image"}`. The model was trained with more
in its place: text around it, a token that begins the picture, the picture's rows, a token that ends
it. What a user typed and spells a placeholder is ordinary text (`chat.control`) and stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlxkv.chat.control import overlapping
from mlxkv.chat.prompt_writer import Begun, PromptWriter
from mlxkv.chat.rendered import Rendered, Segment, Span
from mlxkv.chat.replies import Recorder
from mlxkv.engine.media.side import NAMES, MediaSide
from mlxkv.errors import MediaError
from mlxkv.media.parts import has_media, kind_of, without_content
from mlxkv.media.prompt import PromptMedia
from mlxkv.media.types import Medium
from mlxkv.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mlxkv.media.reader import Placeholder

Message = Mapping[str, Any]
Found = list[tuple[str, tuple[Medium, ...]]]
"""Kind and media of each part, in the order of the conversation."""


class MediaWriter:
    """Renders conversations with media. See `PromptWriter`.

    Args:
        inner: renders text.
        tokenizer: the model's.
        side: reads media.
        saved: media of which the KV is saved, to be named by their digests.
        owner: see `PromptWriter.for_owner`.
    """

    def __init__(
        self,
        inner: PromptWriter,
        tokenizer: Tokenizer,
        side: MediaSide,
        saved: Iterable[Medium] = (),
        owner: str = "",
    ):
        self._inner, self._tokenizer, self._side = inner, tokenizer, side
        self._saved = {medium.digest.hex(): medium for medium in saved}
        self._media: list[Medium] = []
        self._owner = owner

    @property
    def media(self) -> PromptMedia:
        """The media of all conversations that were rendered."""
        return PromptMedia(self._media)

    def for_owner(self, owner: str) -> MediaWriter:
        """See `PromptWriter`."""
        inner = self._inner.for_owner(owner)
        return MediaWriter(inner, self._tokenizer, self._side, self._saved.values(), owner)

    def recorder(self, prompt: Rendered) -> Recorder | None:
        """See `PromptWriter`."""
        return self._inner.recorder(prompt)

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """See `PromptWriter`."""
        return self.write(messages, **options).text

    def write(self, messages: Sequence[Message], **options: Any) -> Rendered:
        """See `PromptWriter`; media stand in it as known tokens.

        Raises:
            MediaError: a medium cannot be read, or the template has no place for it.
        """
        if not has_media(messages):
            return self._inner.write(messages, **options)
        plain, found = self._taken(messages)
        return self._placed(self._inner.write(plain, **options), found)

    def begin(self, messages: Sequence[Message], **options: Any) -> Begun:
        """See `PromptWriter`; raises as `write`."""
        if not has_media(messages):
            return self._inner.begin(messages, **options)
        plain, found = self._taken(messages)
        begun = self._inner.begin(plain, **options)
        n_behind = len(begun.rendered.text) - begun.n_opening
        placed = self._placed(begun.rendered, found)
        return replace(begun, rendered=placed, n_opening=len(placed.text) - n_behind)

    def _taken(self, messages: Sequence[Message]) -> tuple[list[Message], Found]:
        found: Found = []

        def take(kind: str, part: Mapping[str, Any]) -> None:
            found.append((kind, self._read(kind, part)))

        plain = without_content(messages, take)
        self._media += [medium for _, media in found for medium in media]
        return plain, found

    def _read(self, kind: str, part: Mapping[str, Any]) -> tuple[Medium, ...]:
        source = part[kind]
        if isinstance(source, Mapping):
            named = [self._saved.get(str(digest)) for digest in source.get("digests") or ()]
            media = tuple(medium for medium in named if medium is not None)
            if not named or len(media) < len(named):
                raise MediaError(f"{kind}: must be a path, bytes or an array; got a dict")
            return media
        return self._side.read(kind, part, self._owner)

    def without_content(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages as JSON, media by their digests: of saved KV, see `media.parts`."""

        def named(part: Any) -> Any:
            if (kind := kind_of(part)) is None:
                return part
            media = self._read(kind, part)
            digests = [medium.digest.hex() for medium in media]
            return {"type": kind, kind: {"digests": digests}, "name": media[0].name}

        made = [dict(message) for message in messages]
        for message in made if has_media(made) else ():
            if isinstance(content := message.get("content"), list | tuple):
                message["content"] = [named(part) for part in content]
        return made

    def _placed(self, rendered: Rendered, found: Found) -> Rendered:
        """The prompt with media in place of the template's placeholders."""
        assert self._side.reader is not None
        placeholders = self._side.reader.placeholders
        places = _places(rendered, {kind: placeholders[kind].text for kind, _ in found})
        segments: list[Segment] = []
        done = 0
        for (start, end, kind), media in zip(places, _in_order(places, found), strict=True):
            segments += rendered.before(start).behind(done).segments()
            segments += self._segments(placeholders[kind], media)
            done = end
        segments += rendered.behind(done).segments()
        return Rendered.of(segments, rendered.owner)

    def _segments(self, place: Placeholder, media: Sequence[Medium]) -> list[Segment]:
        """What stands for the media of one part."""
        ends = [] if place.end is None else [place.end]
        said = self._tokenizer.decode([place.begin, *ends], skip_special_tokens=False)
        known = [Segment(said, False, [place.begin, *m.ids, *ends]) for m in media]
        return [Segment(place.before, False), *known, Segment(place.after, False)]


def _places(rendered: Rendered, texts: Mapping[str, str]) -> list[tuple[int, int, str]]:
    """Where the template wrote the placeholders of these kinds."""
    kinds = {text: kind for kind, text in texts.items()}
    longest_first = sorted(kinds, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    spans: list[Span] = [match.span() for match in pattern.finditer(rendered.text)]
    typed = {*overlapping(spans, rendered.plain)}
    typed |= {*overlapping(spans, [(start, end) for start, end, _ in rendered.known])}
    return [(a, b, kinds[rendered.text[a:b]]) for a, b in spans if (a, b) not in typed]


def _in_order(places: Sequence[tuple[int, int, str]], found: Found) -> list[tuple[Medium, ...]]:
    """The media of each place.

    Raises:
        MediaError: the template wrote more or fewer places than there are media.
    """
    media = {kind: [m for k, m in found if k == kind] for kind, _ in found}
    for kind, listed in media.items():
        n = sum(kind == each for _, _, each in places)
        if n != len(listed):
            raise MediaError(
                f"this model's chat template has places for {n} of the {len(listed)} parts that "
                f"are {NAMES[kind]}: put them into messages of the user"
            )
    return [media[kind].pop(0) for _, _, kind in places]
