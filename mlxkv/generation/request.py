"""A typed request, from every front end to the scheduler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from mlxkv.chat.chat_template import PROTECTED, Message
from mlxkv.checkpoint import mlxkv_json
from mlxkv.errors import UsageError
from mlxkv.generation.rank import Rank
from mlxkv.sampling.params import SamplingParams
from mlxkv.saved_kv.manifest import NamedKV
from mlxkv.text.stop_strings import StopTexts

if TYPE_CHECKING:
    from mlxkv.sampling.grammar import Grammar

Prompt = str | Sequence[Message] | Sequence[int]
"""A text, which is used as it is; messages, which the chat template renders; or token ids."""
EFFORTS = ("low", "medium", "high")
MAX_LOGPROBS = 20
SAMPLING = frozenset(f.name for f in fields(SamplingParams))
"""Names of the sampling parameters."""


@dataclass(frozen=True, slots=True)
class Request:
    """Everything about an answer; None takes the default.

    Args:
        prompt: a text, messages or token ids.
        max_tokens: length of the answer; None for as long as the context allows.
        stop: texts that end the answer and are not part of it.
        truncate: cut the head of a prompt that is longer than the context.
        sampling: how tokens are chosen.
        recommended: whether what `sampling` does not set is what the model's generation_config.json
            recommends; else `sampling.params.DEFAULTS`.
        format: what the answer has to match.
        logprobs: None for none; else log-probabilities of the chosen tokens, and of so many of the
            likeliest at each place.
        prompt_logprobs: the same of the prompt's tokens; the first one has none.
        think: reason before the answer, as far as the chat template has a switch for it: True,
            False, or how much (low, medium, high); None leaves it to the model.
        best_effort: meet a wish for reasoning or context as far as the model goes, instead of an
            error: an effort where there is a plain switch, a context above the model's own.
        tools: JSON schemas of functions that the model may call.
        go_on: where the last message is an answer that calls nothing, go on from it; else it is
            closed, and another answer begins.
        template_options: more variables of the chat template, of JSON's values. One that `think`
            sets as well is theirs.
        callable: names of the tools that may be called, of all that the prompt lists; None for
            all, empty for none. A call of another one is text.
        context: tokens that prompt and answer may have together; None for the model's setting,
            and so for the two below and `draft`.
        overflow: what happens there: `stop`, or `shift`.
        keep: leading tokens that a shift keeps, besides the system prompt.
        draft: what proposes tokens (`auto`, `off`, `lookup`, `mtp`); it changes no answer.
        adapter: adapters that the model has for this answer, beside its own: each a path or a name,
            which may end in "=WEIGHT".
        saved: named KV that the prompt goes on from.
        rank: the pair that the prompt judges: the log-probabilities of both verdicts are told, and
            a model that was trained for it has a prompt of its own.
        on_progress: called with (done, all) tokens during a long prefill.
        min_tokens: tokens before which neither an end token may come nor a stop text ends the
            answer.
        ignore_eos: whether the answer goes on behind end tokens.
        moved_chars: characters of the client's messages that the server has moved behind what
            stays the same; for the answer's figures.
        parallel: whether the client gets calls after the first.

    Raises:
        UsageError: a value out of its range.
    """

    prompt: Prompt
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    truncate: bool = False
    sampling: SamplingParams = field(default_factory=SamplingParams)
    recommended: bool = False
    format: Grammar | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    think: bool | str | None = None
    best_effort: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    go_on: bool = True
    callable: tuple[str, ...] | None = None
    template_options: Mapping[str, Any] | None = None
    context: int | None = None
    overflow: str | None = None
    keep: int | None = None
    saved: NamedKV | None = None
    on_progress: Callable[[int, int], None] | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    moved_chars: int = 0
    parallel: bool = True
    draft: str | None = None
    adapter: tuple[str, ...] = ()
    rank: Rank | None = None

    def __post_init__(self) -> None:
        n = self.max_tokens
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise UsageError(f"must be at least 1; got {n!r}", field="max_tokens")
        if self.think not in (None, True, False, *EFFORTS):
            raise UsageError(
                f"must be on, off, {', '.join(EFFORTS)}; got {self.think!r}", field="think"
            )
        for field_name in ("logprobs", "prompt_logprobs"):
            n = getattr(self, field_name)
            if n is not None and (type(n) is not int or not 0 <= n <= MAX_LOGPROBS):
                raise UsageError(f"must be 0 to {MAX_LOGPROBS}; got {n!r}", field=field_name)
        n = self.min_tokens
        if type(n) is not int or n < 0 or (self.max_tokens is not None and n > self.max_tokens):
            raise UsageError(f"must be 0 to max_tokens; got {n!r}", field="min_tokens")
        if self.format is not None and (self.min_tokens or self.ignore_eos):
            raise UsageError("min_tokens and ignore_eos: a format says itself where an answer ends")
        if protected := sorted(PROTECTED & (self.template_options or {}).keys()):
            raise UsageError(f"cannot set {', '.join(protected)}", field="template_options")
        if self.callable is not None:
            object.__setattr__(self, "callable", _known(self.callable, self.tools))
        object.__setattr__(self, "stop", StopTexts(self.stop).texts)
        given = self.adapter
        each = given if isinstance(given, list | tuple) else (given,)
        object.__setattr__(self, "adapter", tuple([str(text) for text in each]))
        settings = ("context", "overflow", "keep", "draft")
        mlxkv_json.checked({name: getattr(self, name) for name in settings})

    @classmethod
    def of(cls, prompt: Prompt, *, format: Any = None, **options: Any) -> Request:
        """Build one from keywords: the fields above and those of `SamplingParams`.

        Args:
            prompt: a text, messages or token ids.
            format: anything that `Grammar.of` takes.
            **options: the other fields; one that is None is not set.

        Raises:
            UsageError: an unknown keyword, or a value out of its range.
        """
        known = {f.name for f in fields(cls)} - {"prompt", "sampling", "format"}
        if unknown := sorted(options.keys() - known - SAMPLING):
            allowed = ", ".join(sorted({*known, *SAMPLING, "format"}))
            raise UsageError(f"unknown option {unknown[0]!r}; allowed are {allowed}")
        options = {name: value for name, value in options.items() if value is not None}
        sampling = {name: options.pop(name) for name in SAMPLING & options.keys()}
        grammar = None if format is None else _grammar(format)
        return cls(prompt, sampling=SamplingParams(**sampling), format=grammar, **options)

    def nth(self, i: int) -> Request:
        """The request for the i-th of several answers: each seed is one more than the last."""
        seed = self.sampling.seed
        if seed is None or i == 0:
            return self
        return replace(self, sampling=replace(self.sampling, seed=(seed + i) % 2**64))


def _grammar(format: Any) -> Grammar:
    from mlxkv.sampling.grammar import Grammar  # few answers have one

    return Grammar.of(format)


def _known(names: Sequence[str], tools: Sequence[Mapping[str, Any]] | None) -> tuple[str, ...]:
    """Names of tools that the prompt lists.

    Raises:
        UsageError: one that it does not list.
    """
    listed = [tool.get("function", tool).get("name") for tool in tools or ()]
    for name in (names,) if isinstance(names, str) else names:
        if name not in listed:
            raise UsageError(f"names {name!r}, which is none of the tools", field="callable")
    return (names,) if isinstance(names, str) else tuple(names)


def is_messages(prompt: Prompt) -> bool:
    """Whether a prompt is chat messages, and not a text or token ids."""
    return not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)
