"""Speech to text with a model in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from mlxkv.errors import UsageError
from mlxkv.generation.speech.transcripts import Heard, longest_window, transcribing
from mlxkv.media.sound import RATE, decoded
from mlxkv.media.source import name_of
from mlxkv.media.types import AUDIO

if TYPE_CHECKING:
    from mlxkv.engine.media.side import MediaSide
    from mlxkv.generation.outputs import Chunk
    from mlxkv.media.sound import SoundSource


class Listener(Protocol):
    """What is needed of an `LLM`."""

    @property
    def media(self) -> MediaSide: ...

    @property
    def stream(self) -> Callable[..., Iterator[Chunk]]: ...


def transcript(
    llm: Listener,
    sound: SoundSource,
    *,
    language: str | None,
    prompt: str | None,
    format: str,
    name: str,
    options: Mapping[str, Any],
) -> Iterator[Heard]:
    """See `LLM.stream_transcript`; the recording is decoded before the first step.

    Raises:
        UsageError: the model takes no sound, there is no such format, or the recording cannot be
            read.
    """
    longest_s = longest_window(format)
    if AUDIO not in llm.media.kinds:
        raise UsageError("this model takes no sound: Gemma 3n and Gemma 4 (E2B, E4B, 12B) do")

    def ask(messages: list[dict[str, Any]], n_tokens: int) -> Iterator[Chunk]:
        return llm.stream(messages, **{"max_tokens": n_tokens, **options})

    name = name_of(sound, name, "")
    return transcribing(
        ask,
        decoded(sound, name),
        RATE,
        language=language,
        hint=prompt,
        longest_s=longest_s,
        name=name,
    )
