"""A chat that keeps its KV between turns."""

from __future__ import annotations

import itertools
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from mlxkv.base.power import Power
from mlxkv.chat.chat_template import append_only_suffix
from mlxkv.chat.control import Written
from mlxkv.chat.prompt_writer import PromptWriter
from mlxkv.chat.rendered import Rendered
from mlxkv.engine import encoding
from mlxkv.engine import prompt as prompts
from mlxkv.engine.ahead.choice import IdleCompute
from mlxkv.engine.ahead.tally import Records
from mlxkv.engine.driver import stream
from mlxkv.engine.prompt import PROBES, Head, Prepared
from mlxkv.engine.runtime import Runtime
from mlxkv.errors import MlxkvError, TemplateError, UsageError
from mlxkv.generation.asleep import Asleep, seeded
from mlxkv.generation.generation import Generation
from mlxkv.generation.outputs import Chunk, join_parts, reply_message
from mlxkv.generation.reader import read_answer
from mlxkv.generation.request import Message, Request
from mlxkv.generation.session import n_shared
from mlxkv.llm.ahead import computing
from mlxkv.media.prompt import NO_MEDIA, PromptMedia
from mlxkv.parsers.formats import parser_for
from mlxkv.saved_kv.manifest import NamedKV

# Switches of templates that would drop the reasoning of earlier turns: GLM-4.7's, Qwen's.
_KEEP_REASONING = {"clear_thinking": False, "preserve_thinking": True}


class Conversation:
    """A chat with one model that computes only the new tokens of each turn.

    The KV of the whole conversation stays in the caches. Prompt and answers keep their token ids,
    and only the text that the template adds behind them is encoded: the prefix stays the same where
    the answer's text would tokenize differently, or the template trims it.

    Reasoning stays in the history in a form that the template leaves in place: as
    `reasoning_content`, or inside the answer's text. If the template drops both, the prompt is
    rendered again and computed from the first token that changed.

    Args:
        llm: the model.
        system: system prompt.
        saved: named KV to continue from.
        adapter: of all its answers, see `Request`.

    Attributes:
        append_only: whether the last prompt only appended to the one before it; None before the
            second turn.
    """

    def __init__(
        self,
        llm: Runtime,
        system: str | None = None,
        saved: NamedKV | None = None,
        adapter: str | Sequence[str] = (),
    ):
        self.llm = llm
        self.system = system
        self.saved = saved
        self.turns: list[dict[str, Any]] = []
        self.append_only: bool | None = None
        self._session, self._media = llm.session("", adapter), NO_MEDIA
        self._generation: Generation | None = None
        self._prompt: str | None = None
        self._tokens: list[int] = []
        self._answer = ""
        # Index -> turn, where the template gets another form than that in `turns`.
        self._inline: dict[int, dict[str, Any]] = {}
        self._options: dict[str, Any] = {}
        self._records, self._power = Records(), Power()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Messages of the saved KV, the system prompt and all turns."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return encoding.with_saved(self.saved, head + self.turns)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the conversation's caches."""
        return self._session.nbytes

    @property
    def kv_tokens(self) -> int:
        """Tokens in the conversation's caches."""
        return len(self._session.tokens)

    def set_system(self, text: str | None) -> None:
        """Change the system prompt; the next turn computes the conversation again from there."""
        self.system = text or None
        self._prompt = None

    def clear(self) -> None:
        """Forget all turns; the next prompt reuses the KV of their common prefix."""
        self.turns = []
        self._prompt, self._inline = None, {}

    def restore_turns(self, turns: Sequence[Message]) -> None:
        """Continue from saved turns.

        Raises:
            UsageError: one of them is not a message.
        """
        for turn in turns:
            if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
                raise UsageError(f"a message needs 'role' and 'content'; got {turn!r}")
        self.turns = [dict(turn) for turn in turns]
        self._prompt, self._inline = None, {}

    @property
    def begun(self) -> Asleep | None:
        """The answer that is being written, to give `send` later; None for none."""
        generation = self._generation
        if generation is None or generation.is_over:
            return None
        return Asleep(list(generation.prompt), generation.sampler.seed, generation.written())

    def send(
        self,
        text: str | Sequence[Mapping[str, Any]],
        *,
        asleep: Asleep | None = None,
        **options: Any,
    ) -> Iterator[Chunk]:
        """Stream the answer to the user's next message; options as for `LLM.stream`.

        An answer that is interrupted stays in the history as far as it was streamed.

        Args:
            text: the message, or its parts: texts, pictures and sound, see `media.parts`.
            asleep: what `begun` was of its answer, also in another process: that comes first, and
                then the rest, as with the same options it would have come.
            **options: see above.

        Raises:
            UsageError, ContextExceeded, TemplateError: as for `LLM.stream`; the history is
                unchanged then.
        """
        if not (text.strip() if isinstance(text, str) else text):
            raise UsageError("the prompt is empty")
        user = {"role": "user", "content": text}
        request = Request.of([user], **options)
        if request.adapter:
            raise UsageError(
                "is for a whole conversation: give it to LLM.conversation", field="adapter"
            )
        prompt, tokens = self._next_prompt(user, self._template_options(request))
        head = Head(self.saved, [*self._history(), user], self._options)
        if asleep is not None:
            tokens, request = list(asleep.prompt), seeded(request, asleep.seed)
        prepared = Prepared(tokens, head, Rendered(prompt), media=self._media)
        used = self._records.use("", tokens, n_shared(self._session.tokens, tokens))
        generation = prompts.start(self.llm, request, prepared, self._session)
        generation.ahead_tokens, generation.ahead_saved_s = used
        begun = [] if asleep is None else generation.replay(asleep)
        self._generation = generation
        chunks = itertools.chain(begun, stream(self.llm, generation))
        return self._send(user, prompt, tokens, request, chunks)

    def computing_ahead(self, idle_compute: str | None = None) -> Generator[None, None, None]:
        """Compute what is known of the next prompt, a chunk of a tenth of a second a step.

        Close it before `send`. Nothing is computed where the next prompt goes on from what is held.

        Args:
            idle_compute: how much, `off`, `light` or `full`; see `engine.idle`.

        Raises:
            UsageError: another value.
        """
        idle = IdleCompute(idle_compute, self._power)
        return self._computing_ahead(idle)

    def _computing_ahead(self, idle: IdleCompute) -> Generator[None, None, None]:
        if idle.is_off or not self.turns:
            return
        tokens, self._session.media = self._known()
        yield
        held = self._session.tokens
        if tokens and n_shared(held, tokens) < min(len(held), len(tokens)):
            yield from computing(self.llm, self._session, tokens, idle.limit, self._records)

    def _known(self) -> tuple[list[int], PromptMedia]:
        """The tokens that every next prompt begins with, and the media among them.

        None of both if that cannot be told.
        """
        kept = self._options, self.append_only, dict(self._inline), self._media
        try:
            found = [
                self._next_prompt({"role": "user", "content": probe}, self._options)[1]
                for probe in PROBES
            ]
            media = self._media
        except MlxkvError:
            return [], NO_MEDIA
        finally:
            self._options, self.append_only, self._inline, self._media = kept
        return found[0][: n_shared(*found)], media

    def _template_options(self, request: Request) -> dict[str, Any]:
        template = self.llm.tokenizer.chat_template
        known = frozenset() if template is None else template.variables
        kept = {name: value for name, value in _KEEP_REASONING.items() if name in known}
        return kept | prompts.template_options(self.llm, request)

    def _history(self) -> list[dict[str, Any]]:
        """The messages as the template gets them."""
        n_head = len(self.messages) - len(self.turns)
        turns = [self._inline.get(i, turn) for i, turn in enumerate(self.turns)]
        return [*self.messages[:n_head], *turns]

    def _next_prompt(self, user: dict[str, Any], options: dict[str, Any]) -> tuple[str, list[int]]:
        writer = encoding.writer(self.llm, saved=self.saved)
        same_options, self._options = options == self._options, options
        if self._prompt is not None:
            suffix = self._suffix(writer, self._prompt, user, options)
            if suffix is not None:
                self.append_only = True
                self._media |= writer.media
                tokens = self.llm.tokenizer.encode_rendered(suffix)
                return self._prompt + self._answer + suffix.text, self._tokens + tokens
            if same_options:
                self.append_only = False
        prompt = writer.write([*self._history(), user], **options)
        self._media = writer.media
        return prompt.text, encoding.encode_rendered(self.llm, prompt, self.saved)

    def _suffix(
        self, writer: PromptWriter, prompt: str, user: dict[str, Any], options: dict[str, Any]
    ) -> Rendered | None:
        """The template's text after the last answer, in the first form that it does not change."""
        last = len(self.turns) - 1
        forms = [self.turns[last]]
        if "reasoning_content" in self.turns[last]:
            opened = re.search(r"<think>\s*\Z", prompt)
            for start in ("", opened[0] if opened else ""):
                content = Written(start + self._answer)
                forms.append({"role": "assistant", "content": content})
        *earlier, _ = self._history()
        for form in forms:
            try:
                suffix = append_only_suffix(
                    writer,
                    [*earlier, form],
                    [user],
                    answer=self._answer,
                    prompt=prompt,
                    **options,
                )
            except TemplateError:  # some templates refuse reasoning inside the text
                continue
            if suffix is not None:
                self._inline[last] = form
                whole = writer.write([*earlier, form, user], **options)
                return whole.behind(len(whole.text) - len(suffix))
        return None

    def _send(
        self,
        user: dict[str, Any],
        prompt: str,
        tokens: list[int],
        request: Request,
        chunks: Iterator[Chunk],
    ) -> Iterator[Chunk]:
        shown: list[Chunk] = []
        try:
            for chunk in chunks:
                shown.append(chunk)
                yield chunk
        finally:
            if shown:
                self._remember(user, prompt, tokens, request, shown)

    def _remember(
        self,
        user: dict[str, Any],
        prompt: str,
        tokens: list[int],
        request: Request,
        shown: Sequence[Chunk],
    ) -> None:
        tokenizer = self.llm.tokenizer
        text, reasoning, calls = join_parts(shown)
        self.turns += [user, reply_message(text, reasoning, calls)]
        ends = tokenizer.eos_token_ids
        answer = [c.token for c in shown if c.token is not None and c.token not in ends]
        self._answer = tokenizer.decode(answer, skip_special_tokens=False)
        self._tokens = tokens + answer
        # A stop text, half a character or half a marker is in the KV and not in the history: the
        # next prompt is rendered again then.
        written = read_answer(
            tokenizer, parser_for(tokenizer, prompt=prompt, tools=request.tools), answer
        )
        same = [part.strip() for part in written[:2]] == [text.strip(), reasoning.strip()]
        self._prompt = prompt if same and len(written[2]) == len(calls) else None
