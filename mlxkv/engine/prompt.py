"""From a request's prompt to tokens, and the head that a context shift keeps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlxkv.chat.chat_template import thinking_options
from mlxkv.chat.prompt_writer import Begun, is_begun
from mlxkv.chat.rendered import Rendered
from mlxkv.engine import ranking
from mlxkv.engine.encoding import (
    after_saved,
    encode_rendered,
    saved_media,
    with_saved,
    writer,
)
from mlxkv.engine.runtime import Runtime, TextSide
from mlxkv.engine.tool_choice import choose_masker, without_calls
from mlxkv.errors import ContextExceeded, TemplateError, UsageError
from mlxkv.generation.context_shift import Bound
from mlxkv.generation.drafts.drafting import AnswerDrafting
from mlxkv.generation.generation import Generation
from mlxkv.generation.reader import AnswerReader
from mlxkv.generation.request import Message, Request, is_messages
from mlxkv.generation.session import Session, n_shared
from mlxkv.media.prompt import NO_MEDIA, PromptMedia
from mlxkv.parsers.formats import parser_for, thinks
from mlxkv.prefix.layout import token_ids
from mlxkv.sampling.sampler import Sampler
from mlxkv.saved_kv.manifest import NamedKV
from mlxkv.store.settings import Settings, draft_model
from mlxkv.text.growing import TooManyTokens

if TYPE_CHECKING:
    from mlxkv.sampling.grammar import Masker

PROBES = ("A", "7 z")  # begin differently: text before them is part of no user message
_SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of a prompt, which a context shift must not drop.

    Args:
        saved: saved KV that the prompt continues.
        messages: the rendered messages; none for a text.
        options: the chat template's other variables.
        owner: of the request.
    """

    saved: NamedKV | None = None
    messages: Sequence[Message] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    owner: str = ""

    def n_tokens(self, runtime: TextSide, tokens: Sequence[int]) -> int:
        """Number of leading tokens that are saved KV, system prompt or beginning-of-text token."""
        n = int(tokens[0] == runtime.tokenizer.bos_token_id)
        if self.saved is not None:
            n = max(n, n_shared(tokens, token_ids(self.saved.tokens)))
        return max(n, self._n_system(runtime, tokens))

    def _n_system(self, runtime: TextSide, tokens: Sequence[int]) -> int:
        """Leading tokens that every prompt with the same system messages shares."""
        if not self.messages:
            return 0
        head = list(itertools.takewhile(lambda m: m.get("role") in _SYSTEM_ROLES, self.messages))
        probes = [[*head, {"role": "user", "content": probe}] for probe in PROBES]
        try:
            write = writer(runtime, self.owner, self.saved).write
            texts = [write(probe, **self.options) for probe in probes]
        except TemplateError:  # the template needs more than one message
            return 0
        return min(n_shared(tokens, encode_rendered(runtime, text, self.saved)) for text in texts)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt as token ids.

    Args:
        tokens: the whole prompt.
        head: its beginning.
        rendered: the conversation; None for a text or token ids.
        begun: the answer that its messages end in; None if they end in none.
        owner: of the request, whose earlier answers the prompt may hold.
        media: among the tokens.
    """

    tokens: list[int]
    head: Head = field(default_factory=Head)
    rendered: Rendered | None = None
    begun: Begun | None = None
    owner: str = ""
    media: PromptMedia = NO_MEDIA

    @property
    def text(self) -> str | None:
        """The rendered conversation as text."""
        return None if self.rendered is None else self.rendered.text


def prepare(runtime: TextSide, request: Request, owner: str = "") -> Prepared:
    """Render and encode a request's prompt.

    Args:
        runtime: of the model.
        request: what is asked.
        owner: see `Prepared`.

    Raises:
        UsageError: an empty prompt, or an option that such prompts do not have.
        TemplateError: messages, and the model has no chat template or it fails.
        ContextExceeded: a prompt far past the context, found before all of it was encoded.
    """
    runtime.must_write()
    settings = _settings(runtime, request)
    most = None if _takes_any_length(request, settings) else settings.context.value
    try:
        prepared = _prepared(runtime, request, owner, most)
    except TooManyTokens as error:
        assert most is not None
        raise ContextExceeded(max(error.n_tokens, most + 1), most, at_least=True) from None
    if not prepared.tokens:
        raise UsageError("the prompt is empty: the chat template writes nothing")
    return prepared


def _prepared(runtime: TextSide, request: Request, owner: str, most: int | None) -> Prepared:
    prompt, saved = request.prompt, request.saved
    if request.rank is not None:
        own, prompt = ranking.prompt_of(runtime, request.rank, owner)
        if own is not None:
            tokens = runtime.tokenizer.encode_rendered(own, most)
            return Prepared(tokens, Head(saved), owner=owner)
    if not is_messages(prompt):
        if request.think is not None or request.tools:
            raise UsageError("think and tools need messages: a text uses no chat template")
        if request.template_options:
            raise UsageError("needs messages: a text uses no template", field="template_options")
        tokens = after_saved(runtime, saved, prompt, most, owner)
        return Prepared(tokens, Head(saved), owner=owner, media=saved_media(saved))
    messages = with_saved(saved, prompt)  # pyright: ignore[reportArgumentType]
    options = template_options(runtime, request)
    head = Head(saved, messages, options, owner)
    made, begun = writer(runtime, owner, saved), None
    if request.go_on and is_begun(messages):
        begun = made.begin(messages, **options)
        rendered = begun.rendered
    else:
        rendered = made.write(messages, **options)
    tokens = encode_rendered(runtime, rendered, saved, most)
    return Prepared(tokens, head, rendered, begun, owner, made.media | saved_media(saved))


@dataclass(frozen=True, slots=True)
class Ready:
    """All of an answer that is made of text; none of it uses MLX.

    Args:
        prepared: its prompt.
        bound: its context.
        tokens: of the prompt, cut where the request wants that.
        reader: of the answer.
    """

    prepared: Prepared
    bound: Bound
    tokens: list[int]
    reader: AnswerReader


def make_ready(runtime: TextSide, request: Request, owner: str = "") -> Ready:
    """Prepare a request as far as that takes no MLX: on any thread.

    Raises:
        UsageError, TemplateError: as `prepare`.
        UsageError, ContextExceeded: as `start`.
    """
    return _ready(runtime, request, prepare(runtime, request, owner))


def _ready(runtime: TextSide, request: Request, prepared: Prepared) -> Ready:
    bound, tokens = fit_context(runtime, request, prepared)
    return Ready(prepared, bound, tokens, _reader(runtime, request, prepared))


def start(runtime: Runtime, request: Request, prepared: Prepared, session: Session) -> Generation:
    """Make an answer; nothing is computed yet.

    Raises:
        UsageError: a setting out of its range, or a shift must keep more than the context allows.
        ContextExceeded: the prompt is longer than the context.
    """
    return begin(runtime, request, _ready(runtime, request, prepared), session)


def begin(runtime: Runtime, request: Request, ready: Ready, session: Session) -> Generation:
    """`start` with what is ready.

    Raises:
        UsageError: a setting out of its range.
    """
    sampling = request.sampling
    if request.recommended:
        sampling = sampling.merged(runtime.recommended)
    sampling = without_calls(runtime, request, sampling)
    return Generation(
        session,
        ready.tokens,
        request,
        Sampler(sampling, runtime.config.vocab_size, runtime.suppressed),
        ready.reader,
        ready.bound,
        runtime.tokenizer,
        _masker(runtime, request, ready.prepared),
        ready.prepared.media,
        _drafting(runtime, request, ready.prepared.owner),
        () if request.rank is None else ranking.verdicts(runtime),
    )


def _drafting(runtime: Runtime, request: Request, owner: str) -> AnswerDrafting | None:
    """Makes the answer's drafts; None where it shall have none."""
    name = _settings(runtime, request).draft.value
    if name == "off":
        return None
    small = draft_model(name)
    found = None if small is None else runtime.draft_model(small)
    return runtime.drafting.of_answer(owner, name, found)


def _reader(runtime: TextSide, request: Request, prepared: Prepared) -> AnswerReader:
    """The reader of the answer; one that was begun is read already."""
    tokenizer, begun, parser, recorder = runtime.tokenizer, prepared.begun, None, None
    if prepared.rendered is not None:
        opening = prepared.rendered.text if begun is None else begun.opening
        parser = parser_for(tokenizer, prompt=opening, tools=request.tools)
        if begun is None:  # else its beginning is not the model's own
            recorder = writer(runtime, prepared.owner).recorder(prepared.rendered)
    reader = AnswerReader(
        tokenizer, parser, request.stop, request.min_tokens, recorder, request.callable
    )
    if begun is not None:
        reader.skip(tokenizer.encode_rendered(begun.answer))
    return reader


def _masker(runtime: Runtime, request: Request, prepared: Prepared) -> Masker | None:
    """The masker of the answer, which the begun part is part of if it can begin one."""
    tokenizer, begun = runtime.tokenizer, prepared.begun
    opening = prepared.text if begun is None else begun.opening
    masker = choose_masker(runtime, request, opening, prepared.owner)
    if masker is None or begun is None:
        return masker
    text = tokenizer.encode(begun.text, add_special_tokens=False, owner=prepared.owner)
    masker.follow(tokenizer.encode_rendered(begun.answer), text)
    return masker


def template_options(runtime: TextSide, request: Request) -> dict[str, Any]:
    """The chat template's variables that a request sets.

    Raises:
        UsageError: a value of `think` that the template does not support.
    """
    options: dict[str, Any] = {} if request.tools is None else {"tools": request.tools}
    template = runtime.tokenizer.chat_template
    if request.think is not None and template is not None:
        wish, has_reasoning = request.think, thinks(runtime.tokenizer)
        options |= thinking_options(template, wish, has_reasoning, request.best_effort)
    return {**options, **(request.template_options or {})}


def fit_context(runtime: TextSide, request: Request, prepared: Prepared) -> tuple[Bound, list[int]]:
    """A request's context, and its prompt; what is kept of it is counted when it is needed.

    Raises:
        UsageError, ContextExceeded: as `start`.
    """
    settings, tokens = _settings(runtime, request), prepared.tokens
    fitted = _fit(runtime, prepared, request, settings)
    context = settings.context.value
    if settings.overflow.value == "stop":
        return Bound(context), fitted
    keep = settings.keep.value
    # A prompt that was cut does not begin with its head.
    head = prepared.head if fitted is tokens else Head()
    whole = [(start, stop) for start, stop, _ in prepared.media.spans(fitted)]
    bound = Bound(context, lambda: max(keep, head.n_tokens(runtime, fitted)), whole)
    bound.check(len(fitted), request.max_tokens, keep)
    return bound, fitted


def _settings(runtime: TextSide, request: Request) -> Settings:
    """The model's settings with those of a request."""
    context, most = request.context, runtime.settings.own_context
    if context is not None and request.best_effort:
        context = min(context, most)
    return runtime.settings.asked(context, request.overflow, request.keep, request.draft)


def _takes_any_length(request: Request, settings: Settings) -> bool:
    """Whether a prompt that is longer than the context is cut or shifted."""
    shifts = settings.overflow.value == "shift"
    return (shifts or request.truncate) and request.prompt_logprobs is None


def _fit(runtime: TextSide, prepared: Prepared, request: Request, settings: Settings) -> list[int]:
    """Cut a prompt so that an answer fits, unless a shift will drop tokens instead."""
    context, tokens = settings.context.value, prepared.tokens
    takes_any = _takes_any_length(request, settings)
    if len(tokens) < context or (takes_any and not request.truncate):
        return tokens
    if not takes_any:
        raise ContextExceeded(len(tokens), context)
    room = min(request.max_tokens or context // 4, max(1, context // 2))
    bos = tokens[:1] if tokens[0] == runtime.tokenizer.bos_token_id else []
    first = len(tokens) - (context - room - len(bos))
    return bos + tokens[prepared.media.behind(tokens, first) :]
