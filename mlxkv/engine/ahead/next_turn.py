"""The known part of a conversation's next prompt, computed while there are no requests.

The KV of an answer is that of the tokens which the model wrote. The next prompt holds the answer as
the chat template writes it: without reasoning, with calls in another notation, with white space
trimmed. From the first token that differs on, the next turn would have to be computed while its
client waits. So it is computed before, from the answer to where the next message begins, and kept
as pages.

Invariants:
- Requests go first: `pause` keeps what has been computed, as pages and in `kept`.
- No memory is freed for it: it begins only where its KV and a chunk fit beside everything else.
- For an answer at most `IdleCompute.limit` tokens are computed, and none where nothing differs.
- A token that was computed is counted as used once, by the first prompt that it is restored for.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from mlxkv.chat.template_probe import REASONING
from mlxkv.engine.ahead.choice import IdleCompute
from mlxkv.engine.ahead.kept import Kept
from mlxkv.engine.ahead.tally import Ahead, Records
from mlxkv.engine.clients import Clients
from mlxkv.engine.prompt import PROBES, prepare
from mlxkv.engine.queue.policy import Pace
from mlxkv.engine.queue.preparation import is_long
from mlxkv.engine.runtime import Runtime
from mlxkv.engine.tally import Tally
from mlxkv.engine.tasks import Prefilling, Task, keep_prefix, quietly
from mlxkv.errors import MlxkvError
from mlxkv.generation.generation import Generation
from mlxkv.generation.outputs import Chunk, reply_message
from mlxkv.generation.request import Message, Request, is_messages
from mlxkv.generation.session import Session, n_shared
from mlxkv.kv.types import STEP
from mlxkv.media.parts import content_bytes, is_same
from mlxkv.media.prompt import NO_MEDIA, PromptMedia
from mlxkv.memory.needs import MIN_CHUNK
from mlxkv.prefix.layout import Link

_log = logging.getLogger(__name__)

MAX_WAITING = 16
"""Answers that wait to be computed; the oldest is forgotten for another."""
STALL_S = 0.1
"""How long a chunk may delay a new request."""
MAX_CHARS = 1_000_000
"""Characters and values of a conversation that is rendered: it delays a new request as well."""
MAX_MEDIA_BYTES = 32 << 20
"""Bytes of pictures and sound that an answer which waits may hold."""


@dataclass(eq=False, slots=True)
class Answered:
    """An answer whose client may ask for the next turn.

    Args:
        request: what it answers.
        owner: owner of its pages.
        client: the program that asked; empty where that is not known.
        reply: the answer as a message, in the form in which it may come back.
        held: prompt and answer, as far as their KV was computed.
        context: tokens that a prompt may have.
        tokens: the beginning of the next prompt; None until it is rendered.
        media: among them.
        stop: how many of them are computed.
        ahead: what was computed of them.
    """

    request: Request
    owner: str
    client: str
    reply: Message
    held: list[int]
    context: int
    tokens: list[int] | None = None
    media: PromptMedia = NO_MEDIA
    stop: int | None = None
    ahead: Ahead | None = None

    @classmethod
    def of(cls, task: Task, generation: Generation, last: Chunk) -> list[Self]:
        """One for each form of the reply; none where nothing can be foreseen, or be kept."""
        prompt, session = task.request.prompt, generation.session
        if last.finish_reason != "stop" or not is_messages(prompt) or not session.gives_pages:
            return []
        if prompt[-1].get("role") == "assistant":  # pyright: ignore[reportAttributeAccessIssue]
            return []  # the answer goes on from the last message and is no message of its own
        if is_long(task.request, MAX_CHARS) or content_bytes(prompt) > MAX_MEDIA_BYTES:
            return []
        request = replace(task.request, prompt=list(prompt))  # the caller's list may grow
        held, context = session.tokens, generation.bound.context
        text, reasoning, calls = generation.reply()
        reply = reply_message(text, reasoning, calls if request.parallel else calls[:1])
        forms = reply_forms(request.prompt, reply)  # pyright: ignore[reportArgumentType]
        return [cls(request, task.owner, task.client, form, held, context) for form in forms]

    @property
    def messages(self) -> Sequence[Message]:
        """The conversation that was answered."""
        return self.request.prompt  # pyright: ignore[reportReturnType]


def reply_forms(messages: Sequence[Message], reply: Message) -> list[Message]:
    """The forms in which a client may send a reply back: as it did before, with reasoning or not.

    Both where it has sent no reply yet.
    """
    bare = {name: value for name, value in reply.items() if name not in REASONING}
    if bare == reply or any(message.get(name) for message in messages for name in REASONING):
        return [reply]
    is_known = any(message.get("role") == "assistant" for message in messages)
    return [bare] if is_known else [bare, reply]


def next_messages(messages: Sequence[Message], reply: Message, probe: str) -> list[Message]:
    """The conversation as its client will send it, with `probe` in place of what is not known.

    Behind calls a result comes next, else a message of the user.
    """
    following: Mapping[str, Any] = {"role": "user", "content": probe}
    if calls := reply.get("tool_calls"):
        name = calls[0]["function"]["name"]
        following = {"role": "tool", "tool_call_id": calls[0]["id"], "name": name, "content": probe}
    return [*messages, reply, following]


def rendering(runtime: Runtime, answered: Answered) -> Generator[None, None, list[int] | None]:
    """The tokens that every next prompt begins with, in two steps of about equal length.

    Returns:
        None where a next prompt goes on from what is held.

    Raises:
        MlxkvError: the template refuses the conversation, or it is too long.
    """
    request, held = answered.request, answered.held
    found: list[list[int]] = []
    for probe in PROBES:
        messages = next_messages(answered.messages, answered.reply, probe)
        prepared = prepare(runtime, replace(request, prompt=messages), answered.owner)
        answered.media = prepared.media
        found.append(prepared.tokens)
        if n_shared(held, found[0]) == len(held):
            return None
        yield
    return found[0][: n_shared(*found)]


class NextTurns:
    """The answers whose next turns are to be computed, and the one that is being computed.

    Args:
        runtime: the model.
        tally: its counters; tokens that are computed are counted there,
        clients: and here.
        idle: how much is computed; None for nothing.

    Attributes:
        kept: the caches of the sequence that was computed last.
    """

    def __init__(self, runtime: Runtime, tally: Tally, clients: Clients, idle: IdleCompute | None):
        self._runtime, self._tally, self._clients = runtime, tally, clients
        self._idle = idle or IdleCompute("off")
        self._records, self.kept = Records(), Kept()
        self._waiting: deque[Answered] = deque(maxlen=MAX_WAITING)
        self._steps: Generator[None, None, None] | None = None
        self._last: tuple[object, ...] = ()  # computed last: another form may render as the same
        self._pace = Pace(STALL_S, MIN_CHUNK, STEP)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not self._waiting

    def add(
        self, task: Task, generation: Generation, links: Sequence[Link], last: Chunk | None
    ) -> None:
        """Note an answer that has ended; its session still holds its KV.

        Args:
            task: its request.
            generation: the answer.
            links: its pages.
            last: its last chunk; None if it has failed, or was cancelled.
        """
        self.kept.used_again(generation.session, links)
        if last is not None and not self._idle.is_off:
            forms = Answered.of(task, generation, last)
            self._waiting += forms[:1] if self._idle.choice == "light" else forms

    def free(self, task: Task, generation: Generation, is_kept: bool) -> None:
        """Free the caches of a request that has ended, or keep them for its next turn.

        References to the task may outlive it.
        """
        if task.keeps_session:
            return
        if is_kept and not self._idle.is_off:
            self.kept.keep(generation.session, task.owner)
        else:
            generation.session.reset()

    def restore(self, task: Task, state: Prefilling) -> None:
        """Restore the prefix of a prompt, in the caches that are kept if it goes on from those."""
        quietly("handing caches over failed", lambda: self._hand_over(task, state.generation))
        state.tokens = state.generation.restore()
        quietly("counting a next turn failed", lambda: self._found(task, state))

    def _hand_over(self, task: Task, generation: Generation) -> None:
        session = generation.session
        if session.n_held or task.keeps_session:
            self.kept.let_go()
        else:
            kept = self.kept.take(task.owner, session.model, generation.remaining())
            generation.session = kept or session

    def _found(self, task: Task, state: Prefilling) -> None:
        """Note what a prompt, whose session was just restored, has of what was computed."""
        generation, tokens = state.generation, state.tokens
        n_held, adapter = generation.session.n_held, task.request.adapter
        n_tokens, saved_s = self._records.use(task.owner, tokens, n_held, adapter)
        generation.ahead_tokens += n_tokens
        generation.ahead_saved_s += saved_s

    def forget(self, task: Task) -> None:
        """Drop the conversations that a request goes on from: the next turn is here."""
        self.pause()
        owner, prompt = task.owner, task.request.prompt
        if not is_messages(prompt):
            return
        messages: Sequence[Message] = prompt  # pyright: ignore[reportAssignmentType]
        for answered in list(self._waiting):
            n = len(answered.messages)
            if answered.owner == owner and is_same([*messages[:n]], [*answered.messages]):
                self._waiting.remove(answered)

    def step(self) -> None:
        """Render a prompt, or compute one chunk."""
        if self._steps is None:
            self._steps = self._computing(self._waiting[0])
        try:
            next(self._steps)
            return
        except StopIteration:
            pass
        except MlxkvError as error:
            _log.debug("a next turn was not computed: %s", error)
        except Exception:
            _log.exception("computing a next turn failed")
        self._steps = None
        self._waiting.popleft()

    def pause(self) -> None:
        """Stop computing; what has been computed is kept, and `step` goes on from there."""
        steps, self._steps = self._steps, None
        if steps is not None:
            steps.close()

    def clear(self) -> None:
        """Forget all answers, and free all caches."""
        self.pause()
        self._waiting.clear()
        self.kept.let_go()

    def _computing(self, answered: Answered) -> Generator[None, None, None]:
        if answered.tokens is None:
            answered.tokens = yield from rendering(self._runtime, answered)
        tokens = answered.tokens
        adapter = answered.request.adapter
        this = answered.owner, adapter, tokens
        if tokens is None or len(tokens) >= answered.context or this == self._last:
            return
        shared = n_shared(answered.held, tokens)
        if adapter and self._runtime.adapted.find(adapter) is None:
            return  # its memory was needed
        session = self._runtime.session(answered.owner, adapter)
        session = self.kept.take(answered.owner, session.model, tokens) or session
        session.media = answered.media
        try:
            if not self._is_roomy(session, tokens):
                session.reset()
            if self._is_roomy(session, tokens):
                yield from self._prefilling(session, answered, tokens, shared)
                self._last = this
        finally:
            self.kept.keep(session, answered.owner)

    def _is_roomy(self, session: Session, tokens: Sequence[int]) -> bool:
        return self._runtime.budget.is_roomy(session, len(tokens), STEP)

    def _prefilling(
        self, session: Session, answered: Answered, tokens: list[int], shared: int
    ) -> Generator[None, None, None]:
        """Compute what is not held of the tokens, and keep it, also if the generator is closed."""
        n_restored = session.restore(tokens).n_tokens
        yield
        if answered.stop is None:
            n = min(len(tokens), n_restored + self._idle.limit)
            answered.stop = session.resumable(tokens, n)
        stop = answered.stop
        if stop <= shared or stop - n_restored <= 1:
            return
        if answered.ahead is None:
            adapter = answered.request.adapter
            answered.ahead = Ahead(answered.owner, tokens, n_restored, adapter=adapter)
        try:
            steps = session.prefilling(tokens[:stop], lambda: self._pace.n_tokens)
            yield from self._paced(session, steps, answered.ahead)
        finally:
            self._count(answered, answered.ahead, session.n_held - n_restored)
            self.kept.used_again(session, keep_prefix(session))

    def _count(self, answered: Answered, ahead: Ahead, n_tokens: int) -> None:
        ahead.n_computed += n_tokens
        self._records.add(ahead)
        self._tally.count(answered.owner, next_turn_tokens=n_tokens)
        self._clients.count_ahead(answered.owner, answered.client, n_tokens)

    def _paced(
        self, session: Session, steps: Generator[Any, None, Any], ahead: Ahead
    ) -> Generator[None]:
        while True:
            held, started = session.n_held, time.perf_counter()
            try:
                next(steps)
                is_last = False
            except StopIteration:
                is_last = True
            seconds = time.perf_counter() - started
            ahead.seconds += seconds
            ahead.stop = max(ahead.stop, session.n_held)
            if is_last:
                return
            self._pace.record(session.n_held - held, seconds)
            yield
