"""Tokens to content, reasoning, calls and stop strings."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence

from mlxkv.chat.replies import Recorder
from mlxkv.generation.outputs import Parts, join_parts
from mlxkv.parsers.events import Content, Event, OutputParser, Reasoning, ToolCall
from mlxkv.parsers.formats import PlainParser
from mlxkv.text.stop_strings import StopTexts
from mlxkv.text.tokenizer import Tokenizer


class AnswerReader:
    """Tokens to text, reasoning and tool calls.

    Stop texts are looked for in the text for the user alone: reasoning may hold them.

    Args:
        tokenizer: the model's.
        parser: of its output; None for a text that goes on with the prompt.
        stop: stop texts.
        min_tokens: tokens in whose text none of them begins.
        recorder: follows the answer.
        callable: names of functions; a call of another one is text. None for all.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        parser: OutputParser | None = None,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        recorder: Recorder | None = None,
        callable: Collection[str] | None = None,
    ):
        self._parser = PlainParser() if parser is None else parser
        self._words = tokenizer.stream(keep=self._parser.markers, continues=parser is None)
        self._ends = tokenizer.eos_token_ids
        self._shown_ends = {tokenizer.id_of(marker) for marker in self._parser.markers}
        self._stop = StopTexts(stop)
        _ = self._stop.tables  # here: a reader is not made between the steps of other answers
        self._n_unstopped = min_tokens + 1
        self._n_skipped = 0
        self._recorder, self._callable = recorder, callable
        self._call_ids: Iterator[str] = iter(())

    def skip(self, tokens: Iterable[int]) -> None:
        """Read the beginning of an answer that is known already: it is no part of what comes."""
        n = 0
        for token in tokens:
            text = self._words.add(token)
            n += len(text)
            n -= sum(len(event.text) for event in self._parser.add(text, token))
        # A parser may hold back the start of what can become a marker.
        self._n_skipped = n

    def expect_calls(self, ids: Sequence[str]) -> None:
        """The ids of the next calls, where they are known: others are made up by the parser."""
        self._call_ids = iter(ids)

    @property
    def stopped(self) -> bool:
        """Whether a stop text came."""
        return self._stop.stopped

    @property
    def stopped_by(self) -> str | None:
        """The stop text that came."""
        return self._stop.found

    def add(self, token: int) -> Parts:
        """The next token; an end token adds nothing, unless it is a marker of the format."""
        self._n_unstopped -= 1
        if token in self._ends and token not in self._shown_ends:
            return Parts()
        written = self._words.add(token)
        parts = self._parts(self._parser.add(written, token))
        self._record(token, written, parts)
        return parts

    def finish(self) -> Parts:
        """What was held back; nothing after a stop text."""
        if self.stopped:
            return Parts()
        written = self._words.finish()
        events = [*self._parser.add(written), *self._parser.finish()]
        parts = self._parts(events)
        self._record(None, written, parts)
        if self.stopped:
            return parts
        return dataclasses.replace(parts, text=parts.text + self._stop.finish())

    def _record(self, token: int | None, written: str, parts: Parts) -> None:
        if self._recorder is not None:
            self._recorder.add(token, written, parts.text, parts.reasoning, parts.tool_calls)

    def _parts(self, events: Iterable[Event]) -> Parts:
        text, reasoning, calls = "", None, []
        for event in events:
            if isinstance(event, ToolCall) and not self._is_call(event):
                event = Content(event.text)
            new = event.text[self._n_skipped :]
            self._n_skipped -= len(event.text) - len(new)
            match event:
                case Content():
                    if self._n_unstopped > 0:
                        text += new
                        continue
                    text += self._stop.add(new)
                    if self.stopped:
                        break
                case Reasoning():
                    reasoning = (reasoning or "") + new
                case ToolCall():
                    name = next(self._call_ids, event.id)
                    calls.append(dataclasses.replace(event, id=name))
        return Parts(text, reasoning, tuple(calls))

    def _is_call(self, call: ToolCall) -> bool:
        return self._callable is None or call.name in self._callable


def read_answer(
    tokenizer: Tokenizer, parser: OutputParser, tokens: Iterable[int]
) -> tuple[str, str, tuple[ToolCall, ...]]:
    """Text, reasoning and calls of a whole answer."""
    reader = AnswerReader(tokenizer, parser)
    parts = [*map(reader.add, tokens), reader.finish()]
    return join_parts(parts)
