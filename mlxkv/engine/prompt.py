"""From a request's prompt to tokens, and the head that a context shift keeps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlxkv.chat.chat_template import thinking_options
from mlxkv.chat.prompt_writer import Begun, PromptWriter, is_begun
from mlxkv.chat.rendered import Rendered
from mlxkv.engine.runtime import Runtime, TextSide
from mlxkv.engine.tool_choice import choose_masker, without_calls
from mlxkv.errors import ContextExceeded, Hint, TemplateError, UsageError
from mlxkv.generation.context_shift import Bound
from mlxkv.generation.generation import Generation
from mlxkv.generation.reader import AnswerReader
from mlxkv.generation.request import Message, Prompt, Request, is_messages
from mlxkv.generation.session import Session, n_shared
from mlxkv.parsers.formats import parser_for, thinks
from mlxkv.prefix.layout import token_ids
from mlxkv.sampling.sampler import Sampler
from mlxkv.saved_kv.manifest import NamedKV
from mlxkv.store.settings import Settings
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
            texts = [_writer(runtime, self.owner).write(probe, **self.options) for probe in probes]
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
    """

    tokens: list[int]
    head: Head = field(default_factory=Head)
    rendered: Rendered | None = None
    begun: Begun | None = None
    owner: str = ""

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
    if not is_messages(prompt):
        if request.think is not None or request.tools:
            raise UsageError("think and tools need messages: a text uses no chat template")
        if request.template_options:
            raise UsageError("needs messages: a text uses no template", field="template_options")
        return Prepared(_after_saved(runtime, saved, prompt, most, owner), Head(saved), owner=owner)
    messages = with_saved(saved, prompt)  # pyright: ignore[reportArgumentType]
    options = template_options(runtime, request)
    head = Head(saved, messages, options, owner)
    if request.go_on and is_begun(messages):
        begun = _writer(runtime, owner).begin(messages, **options)
        tokens = encode_rendered(runtime, begun.rendered, saved, most)
        return Prepared(tokens, head, begun.rendered, begun, owner)
    rendered = _writer(runtime, owner).write(messages, **options)
    return Prepared(encode_rendered(runtime, rendered, saved, most), head, rendered, owner=owner)


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
    )


def _reader(runtime: TextSide, request: Request, prepared: Prepared) -> AnswerReader:
    """The reader of the answer; one that was begun is read already."""
    tokenizer, begun, parser, recorder = runtime.tokenizer, prepared.begun, None, None
    if prepared.rendered is not None:
        opening = prepared.rendered.text if begun is None else begun.opening
        parser = parser_for(tokenizer, prompt=opening, tools=request.tools)
        if begun is None:  # else its beginning is not the model's own
            recorder = _writer(runtime, prepared.owner).recorder(prepared.rendered)
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


def render(runtime: TextSide, messages: Sequence[Message], **options: Any) -> Rendered:
    """Render a conversation, up to where the next answer begins.

    Raises:
        TemplateError: there is no template, or it fails.
    """
    return _writer(runtime).write(messages, **options)


def _writer(runtime: TextSide, owner: str = "") -> PromptWriter:
    writer = runtime.tokenizer.prompt_writer
    if writer is None:
        raise TemplateError(
            f"{runtime.path / 'tokenizer_config.json'}: key 'chat_template' is missing, so this "
            f"model completes text and does not chat: give a text",
            hints=[Hint("raw", True)],
        )
    return writer.for_owner(owner)


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


def encode(
    runtime: TextSide, prompt: Prompt, most: int | None = None, owner: str = ""
) -> list[int]:
    """Token ids of a text or of messages; token ids are checked.

    Raises:
        UsageError: an empty prompt, or an id that the model does not have.
        TooManyTokens: a text of more than `most`, see `Tokenizer.encode`.
    """
    if isinstance(prompt, str):
        tokens = _encode_raw(runtime, prompt, most, owner)
    elif is_messages(prompt):
        rendered = render(runtime, prompt)  # pyright: ignore[reportArgumentType]
        tokens = runtime.tokenizer.encode_rendered(rendered)
    else:
        tokens = list(prompt)
    if not tokens:
        raise UsageError("the prompt is empty")
    n = runtime.config.vocab_size
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < n:
            raise UsageError(f"token id {token!r} is out of range; this model has 0 to {n - 1}")
    return tokens  # pyright: ignore[reportReturnType]


def encode_text(
    runtime: TextSide, text: str, most: int | None = None, owner: str = ""
) -> list[int]:
    """Token ids of text with its own special tokens, such as a rendered template."""
    return runtime.tokenizer.encode(text, add_special_tokens=False, owner=owner, most=most)


def encode_rendered(
    runtime: TextSide, rendered: Rendered, saved: NamedKV | None, most: int | None = None
) -> list[int]:
    """Token ids of a rendered conversation; its saved beginning keeps the saved ids.

    Raises:
        TooManyTokens: more than `most`, see `Tokenizer.encode`.
    """
    if saved is None or not rendered.text.startswith(saved.text):
        return runtime.tokenizer.encode_rendered(rendered, most)
    behind, most = rendered.behind(len(saved.text)), _left(most, saved)
    return [*token_ids(saved.tokens), *runtime.tokenizer.encode_rendered(behind, most)]


def _left(most: int | None, saved: NamedKV) -> int | None:
    return None if most is None else most - saved.n_tokens


def _encode_raw(runtime: TextSide, text: str, most: int | None, owner: str) -> list[int]:
    """Token ids of a text for the model: with one first token, also where the text has its own."""
    tokenizer = runtime.tokenizer
    tokens = tokenizer.encode(text, owner=owner, most=most)
    bos = tokenizer.bos_token_id
    doubled = bos is not None and tokens[:2] == [bos, bos]
    if doubled and text.startswith(tokenizer.bos_token or ""):
        return tokens[1:]
    return tokens


def with_saved(saved: NamedKV | None, messages: Sequence[Message]) -> list[Any]:
    """Append messages to the saved ones; a second system message joins the saved one.

    Raises:
        UsageError: the saved prompt is a text.
    """
    if saved is None:
        return list(messages)
    if saved.messages is None:
        raise UsageError(
            f"{saved.name} is a saved text, not messages: give a text", hints=[Hint("raw", True)]
        )
    head, rest = [dict(message) for message in saved.messages], [dict(m) for m in messages]
    if head[0]["role"] == "system" and rest and rest[0].get("role") == "system":
        head[0]["content"] = f"{head[0]['content']}\n\n{rest.pop(0)['content']}"
    return head + rest


def _after_saved(
    runtime: TextSide, saved: NamedKV | None, prompt: Prompt, most: int | None, owner: str
) -> list[int]:
    """Token ids of saved KV and of a text or token ids after it."""
    if saved is None:
        return encode(runtime, prompt, most, owner)
    if isinstance(prompt, str):
        new = encode_text(runtime, prompt, _left(most, saved), owner)
    else:
        new = encode(runtime, prompt)
    return [*token_ids(saved.tokens), *new]


def fit_context(runtime: TextSide, request: Request, prepared: Prepared) -> tuple[Bound, list[int]]:
    """A request's context, and its prompt; what is kept of it is counted when it is needed.

    Raises:
        UsageError, ContextExceeded: as `start`.
    """
    settings, tokens = _settings(runtime, request), prepared.tokens
    fitted = _fit(runtime, tokens, request, settings)
    context = settings.context.value
    if settings.overflow.value == "stop":
        return Bound(context), fitted
    keep = settings.keep.value
    # A prompt that was cut does not begin with its head.
    head = prepared.head if fitted is tokens else Head()
    bound = Bound(context, lambda: max(keep, head.n_tokens(runtime, fitted)))
    bound.check(len(fitted), request.max_tokens, keep)
    return bound, fitted


def _settings(runtime: TextSide, request: Request) -> Settings:
    """The model's settings with those of a request."""
    context, most = request.context, runtime.settings.own_context
    if context is not None and request.best_effort:
        context = min(context, most)
    return runtime.settings.asked(context, request.overflow, request.keep)


def _takes_any_length(request: Request, settings: Settings) -> bool:
    """Whether a prompt that is longer than the context is cut or shifted."""
    shifts = settings.overflow.value == "shift"
    return (shifts or request.truncate) and request.prompt_logprobs is None


def _fit(runtime: TextSide, tokens: list[int], request: Request, settings: Settings) -> list[int]:
    """Cut a prompt so that an answer fits, unless a shift will drop tokens instead."""
    context = settings.context.value
    takes_any = _takes_any_length(request, settings)
    if len(tokens) < context or (takes_any and not request.truncate):
        return tokens
    if not takes_any:
        raise ContextExceeded(len(tokens), context)
    room = min(request.max_tokens or context // 4, max(1, context // 2))
    bos = tokens[:1] if tokens[0] == runtime.tokenizer.bos_token_id else []
    return bos + tokens[len(tokens) - (context - room - len(bos)) :]
