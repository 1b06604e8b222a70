"""From a request's prompt to tokens, and the head that a context shift keeps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxkv.engine.runtime import Runtime
from mlxkv.errors import ContextExceeded, Hint, TemplateError, UsageError
from mlxkv.generation.context_shift import Bound
from mlxkv.generation.generation import Generation
from mlxkv.generation.reader import AnswerReader
from mlxkv.generation.request import Message, Prompt, Request
from mlxkv.generation.session import Session, n_shared
from mlxkv.parsers.formats import parser_for, thinks
from mlxkv.prefix.layout import token_ids
from mlxkv.sampling.sampler import Sampler
from mlxkv.saved_kv.manifest import NamedKV
from mlxkv.store.settings import Settings
from mlxkv.text.chat_template import thinking_options

PROBES = ("A", "7 z")
"""Two messages that begin differently: text before them is part of no user message."""
_SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of a prompt, which a context shift must not drop.

    Args:
        saved: saved KV that the prompt continues.
        messages: the rendered messages; none for a text.
        options: the chat template's other variables.
    """

    saved: NamedKV | None = None
    messages: Sequence[Message] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def n_tokens(self, runtime: Runtime, tokens: Sequence[int]) -> int:
        """Number of leading tokens that are saved KV, system prompt or beginning-of-text token."""
        n = int(tokens[0] == runtime.tokenizer.bos_token_id)
        if self.saved is not None:
            n = max(n, n_shared(tokens, token_ids(self.saved.tokens)))
        return max(n, self._n_system(runtime, tokens))

    def _n_system(self, runtime: Runtime, tokens: Sequence[int]) -> int:
        """Leading tokens that every prompt with the same system messages shares."""
        if not self.messages:
            return 0
        head = list(itertools.takewhile(lambda m: m.get("role") in _SYSTEM_ROLES, self.messages))
        probes = [[*head, {"role": "user", "content": probe}] for probe in PROBES]
        try:
            texts = [render(runtime, probe, **self.options) for probe in probes]
        except TemplateError:  # the template needs more than one message
            return 0
        return min(n_shared(tokens, encode_rendered(runtime, text, self.saved)) for text in texts)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt as token ids.

    Args:
        tokens: the whole prompt.
        head: its beginning.
        text: the rendered chat template; None for a text or token ids.
    """

    tokens: list[int]
    head: Head = field(default_factory=Head)
    text: str | None = None


def prepare(runtime: Runtime, request: Request) -> Prepared:
    """Render and encode a request's prompt.

    Raises:
        UsageError: an empty prompt, or an option that such prompts do not have.
        TemplateError: messages, and the model has no chat template or it fails.
    """
    prompt, saved = request.prompt, request.saved
    if not is_messages(prompt):
        if request.think is not None or request.tools:
            raise UsageError("think and tools need messages: a text uses no chat template")
        return Prepared(_after_saved(runtime, saved, prompt), Head(saved))
    messages = with_saved(saved, prompt)  # pyright: ignore[reportArgumentType]
    options = template_options(runtime, request)
    text = render(runtime, messages, **options)
    tokens = encode_rendered(runtime, text, saved)
    return Prepared(tokens, Head(saved, messages, options), text)


def start(runtime: Runtime, request: Request, prepared: Prepared, session: Session) -> Generation:
    """Make an answer; nothing is computed yet.

    Raises:
        UsageError: a setting out of its range, or a shift must keep more than the context allows.
        ContextExceeded: the prompt is longer than the context.
    """
    bound, tokens = fit_context(runtime, request, prepared)
    sampling = request.sampling
    if request.recommended:
        sampling = sampling.merged(runtime.recommended)
    parser = None
    if prepared.text is not None:
        parser = parser_for(runtime.tokenizer, prompt=prepared.text, tools=request.tools)
    masker = None
    if request.format is not None:
        masker = runtime.maskers.masker(request.format, prepared.text)
    return Generation(
        session,
        tokens,
        request,
        Sampler(sampling, runtime.config.vocab_size),
        AnswerReader(runtime.tokenizer, parser, request.stop, request.min_tokens),
        bound,
        runtime.tokenizer,
        masker,
    )


def is_messages(prompt: Prompt) -> bool:
    """Whether a prompt is chat messages, and not a text or token ids."""
    return not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)


def render(runtime: Runtime, messages: Sequence[Message], **options: Any) -> str:
    """Render a conversation with the chat template, up to where the next answer begins.

    Raises:
        TemplateError: there is no template, or it fails.
    """
    template = runtime.tokenizer.chat_template
    if template is None:
        raise TemplateError(
            f"{runtime.path / 'tokenizer_config.json'}: key 'chat_template' is missing, so this "
            f"model completes text and does not chat: give a text",
            hints=[Hint("raw", True)],
        )
    return template.render(messages, **options)


def template_options(runtime: Runtime, request: Request) -> dict[str, Any]:
    """The chat template's variables that a request sets.

    Raises:
        UsageError: a value of `think` that the template does not support.
    """
    options: dict[str, Any] = {} if request.tools is None else {"tools": request.tools}
    template = runtime.tokenizer.chat_template
    if request.think is None or template is None:
        return options
    has_reasoning = thinks(runtime.tokenizer)
    wish = request.think
    return options | thinking_options(template, wish, has_reasoning, request.best_effort)


def encode(runtime: Runtime, prompt: Prompt) -> list[int]:
    """Token ids of a text or of messages; token ids are checked.

    Raises:
        UsageError: an empty prompt, or an id that the model does not have.
    """
    if isinstance(prompt, str):
        tokens = runtime.tokenizer.encode(prompt)
    elif is_messages(prompt):
        tokens = encode_text(runtime, render(runtime, prompt))  # pyright: ignore[reportArgumentType]
    else:
        tokens = list(prompt)
    if not tokens:
        raise UsageError("the prompt is empty")
    n = runtime.config.vocab_size
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < n:
            raise UsageError(f"token id {token!r} is out of range; this model has 0 to {n - 1}")
    return tokens  # pyright: ignore[reportReturnType]


def encode_text(runtime: Runtime, text: str) -> list[int]:
    """Token ids of text with its own special tokens, such as a rendered template."""
    return runtime.tokenizer.encode(text, add_special_tokens=False)


def encode_rendered(runtime: Runtime, text: str, saved: NamedKV | None) -> list[int]:
    """Token ids of a rendered conversation; its saved beginning keeps the saved ids."""
    if saved is None or not text.startswith(saved.text):
        return encode_text(runtime, text)
    return [*token_ids(saved.tokens), *encode_text(runtime, text[len(saved.text) :])]


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


def _after_saved(runtime: Runtime, saved: NamedKV | None, prompt: Prompt) -> list[int]:
    """Token ids of saved KV and of a text or token ids after it."""
    if saved is None:
        return encode(runtime, prompt)
    is_text = isinstance(prompt, str)
    new = encode_text(runtime, prompt) if is_text else encode(runtime, prompt)
    return [*token_ids(saved.tokens), *new]


def fit_context(runtime: Runtime, request: Request, prepared: Prepared) -> tuple[Bound, list[int]]:
    """A request's context, and its prompt; what is kept of it is counted when it is needed.

    Raises:
        UsageError, ContextExceeded: as `start`.
    """
    context, most = request.context, runtime.settings.own_context
    if context is not None and request.best_effort:
        context = min(context, most)
    settings = runtime.settings.asked(context, request.overflow, request.keep)
    tokens = prepared.tokens
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


def _fit(runtime: Runtime, tokens: list[int], request: Request, settings: Settings) -> list[int]:
    """Cut a prompt so that an answer fits, unless a shift will drop tokens instead."""
    context = settings.context.value
    shifts = settings.overflow.value == "shift"
    if len(tokens) < context or (shifts and not request.truncate):
        return tokens
    if not request.truncate:
        raise ContextExceeded(len(tokens), context)
    room = min(request.max_tokens or context // 4, max(1, context // 2))
    bos = tokens[:1] if tokens[0] == runtime.tokenizer.bos_token_id else []
    return bos + tokens[len(tokens) - (context - room - len(bos)) :]
