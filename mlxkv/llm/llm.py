"""The Python API: load a model, stream text, keep a conversation.

The way of a request: text -> tokens -> the session keeps the prefix it holds -> prefill in chunks
-> decode with one step in flight -> detokenizer -> stop texts -> chunks.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxkv.base import device
from mlxkv.engine import prompt as prompts
from mlxkv.engine.prompt import Head
from mlxkv.engine.runtime import _close_at_exit, keep_prefix, load_with
from mlxkv.errors import (
    CheckpointError,
    ContextExceeded,
    KVCacheFull,
    TemplateError,
    UsageError,
)
from mlxkv.generation.context_shift import Bound, decode_within
from mlxkv.generation.generation import Turn
from mlxkv.generation.outputs import Chunk, Result, Stats, join_parts
from mlxkv.generation.reader import AnswerReader
from mlxkv.generation.request import Message, Request
from mlxkv.generation.session import Session
from mlxkv.kv.types import first_kv_type
from mlxkv.llm import saved_prefix
from mlxkv.llm.conversation import Conversation
from mlxkv.memory import needs
from mlxkv.memory.budget import Budget, memory_stats
from mlxkv.memory.types import MemoryStats
from mlxkv.nn.model import CausalLM
from mlxkv.parsers.events import OutputParser
from mlxkv.parsers.formats import parser_for, thinks
from mlxkv.prefix.open import open_pages
from mlxkv.sampling.params import SamplingParams, recommended
from mlxkv.sampling.sampler import Sampler
from mlxkv.store.settings import Given, Settings, effective
from mlxkv.text.chat_template import thinking_options
from mlxkv.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mlxkv.saved_kv.manifest import NamedKV

_log = logging.getLogger(__name__)

Prompt = str | Sequence[Message] | Sequence[int]

__all__ = ["LLM", "Chunk", "Conversation", "Prompt", "Request", "Result", "Stats", "load"]


def load(
    model: str | Path,
    dtype: mx.Dtype | str = "auto",
    memory: str | int | None = None,
    kv_type: str | None = None,
    context: int | None = None,
    overflow: str | None = None,
    keep: int | None = None,
) -> LLM:
    """Load a model with its tokenizer.

    What is None comes from the environment (`MLXKV_CONTEXT`, `MLXKV_KV_TYPE`, `MLXKV_MEMORY`,
    `MLXKV_OVERFLOW`, `MLXKV_KEEP`), then from the model's own settings file, see `settings`.

    Args:
        model: a directory, a name that `mlxkv list` shows, or a Hugging Face repository.
        dtype: what to compute in: auto, float32, float16, bfloat16.
        memory: limit in bytes or like "16GiB"; else what the machine allows.
        kv_type: format of the KV cache: native, q8, q4, or auto, which is native and packed only
            where memory is short; else native.
        context: tokens that prompt and answer may have together; else the model's own.
        overflow: what happens there: `stop`, or `shift`, which drops the oldest tokens behind
            those that are kept and goes on; else stop.
        keep: leading tokens that are kept, besides the system prompt; else 0.

    Raises:
        UsageError: no such format, dtype or limit, or a context past the model's own.
        ModelNotFound: no such model.
        CheckpointError: its files are damaged or not supported.
        OutOfMemory: its weights are over the limit.
        DownloadError: it has to be fetched and cannot be.
    """
    from mlxkv.store.resolve import resolve

    given = Given(context, kv_type, memory, overflow, keep)
    path = resolve(str(model))
    return load_with(path, effective(path, given), dtype)


class LLM:
    """A model, its tokenizer and its chat template.

    Args:
        model: see `load_model`.
        tokenizer: its tokenizer.
        path: the directory it came from.
        kv_type: format of the KV cache.
        limit_bytes: what it may take in memory; None for what the machine allows.
        settings: context, overflow and where all of these come from; None finds them out.

    Attributes:
        budget: what it may take in memory, and what it does.
        pages: prefixes that were computed before; None where the model keeps something else than
            keys and values.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        path: Path,
        kv_type: str = "native",
        limit_bytes: int | None = None,
        settings: Settings | None = None,
    ):
        self.model, self.tokenizer, self.path, self.kv_type = model, tokenizer, path, kv_type
        self.config = model.config
        self.settings = settings or effective(path, Given(kv_type=kv_type, memory=limit_bytes))
        weights_bytes = sum(
            x.nbytes for _, x in tree_flatten(model.parameters()) if isinstance(x, mx.array)
        )
        limit_bytes = limit_bytes or device.memory_limit()
        room = needs.pages_bytes(limit_bytes, weights_bytes)
        self.pages = open_pages(model, path, first_kv_type(kv_type), room)
        self.budget = Budget(model, weights_bytes, limit_bytes, self.pages)
        self._at_exit = weakref.finalize(self, _close_at_exit, self.pages)
        self._unwire: Callable[[], object] | None = None

    def hold_wired(self) -> None:
        """Have Metal keep what this model may take resident, until it is closed or forgotten.

        For a model of its own: an engine does it for all of its models.
        """
        if self._unwire is None:
            release = device.hold_wired(self.budget.limit_bytes)
            self._unwire = weakref.finalize(self, release)

    def close(self) -> None:
        """Write prefixes to disk that are worth keeping, and forget them; also done at exit."""
        if self.pages is not None and self._at_exit.detach() is not None:
            self.pages.close()
        if self._unwire is not None:
            self._unwire()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.settings.context.value

    @cached_property
    def recommended(self) -> SamplingParams:
        """The sampling that the model's generation_config.json recommends."""
        return recommended(self.path)

    def stream(
        self, prompt: Prompt, *, kv_from: str | NamedKV | None = None, **options: Any
    ) -> Iterator[Chunk]:
        """Stream an answer.

        Args:
            prompt: a text (used as it is), messages (rendered by the chat template), or token ids.
            kv_from: name of saved KV that the prompt goes on from, see `save_kv`.
            **options: `max_tokens`, `stop`, `truncate`, `on_progress`, for messages `think` and
                `tools`, `context`, `overflow` and `keep` in place of the model's settings (see
                `Request`), and the fields of `SamplingParams`: `temperature` (0,
                greedy, by default), `top_k`, `top_p`, `min_p`, `repeat_penalty`, `repeat_last_n`,
                `seed`, `logit_bias`.

        Yields:
            One chunk per token; the last has `finish_reason` and `stats`. Answers to messages come
            as text, reasoning and tool calls; what follows a text or token ids is all text.

        Raises:
            UsageError: an empty prompt, or an option out of its range.
            ContextExceeded: the prompt is longer than the context.
            TemplateError: messages, and the model has no chat template or it fails.
        """
        turn, _ = self.prepare(prompt, Request.of(**options), self.session(), kv_from)
        return self._run(turn)

    def prepare(
        self,
        prompt: Prompt,
        request: Request,
        session: Session,
        kv_from: str | NamedKV | None = None,
    ) -> tuple[Turn, str | None]:
        """The answer to a prompt, of which nothing is computed yet, and what a template wrote.

        Arguments and errors as for `stream`.
        """
        saved = self.saved_kv(kv_from)
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            messages = prompts.with_saved(saved, prompt)  # pyright: ignore[reportArgumentType]
            template_options = self.template_options(request)
            text = self.render(messages, **template_options)
            tokens = prompts.encode(self, text, saved)
            head = Head(saved, messages, template_options)
            return self.turn(session, tokens, request, self.parser(text, request), head), text
        if request.think is not None or request.tools:
            raise UsageError("think and tools are for messages: a text goes to the model as it is")
        tokens = prompts.behind(self, saved, prompt)
        return self.turn(session, tokens, request, head=Head(saved)), None

    def generate(self, prompt: Prompt, **options: Any) -> Result:
        """The whole answer at once; arguments as for `stream`."""
        return self._collect(self.stream(prompt, **options))

    def chat(self, messages: Sequence[Message], **options: Any) -> Result:
        """The answer to messages of `role` and `content`; options as for `stream`."""
        if isinstance(messages, str):
            raise UsageError('messages must be a list like [{"role": "user", "content": "..."}]')
        return self.generate(messages, **options)

    def conversation(
        self, system: str | None = None, kv_from: str | NamedKV | None = None
    ) -> Conversation:
        """A chat that keeps its KV between turns.

        Args:
            system: system prompt.
            kv_from: name of saved KV whose messages come before it.
        """
        return Conversation(self, system, self.saved_kv(kv_from))

    def save_kv(
        self,
        name: str,
        prompt: Prompt,
        *,
        model: str | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> NamedKV:
        """Compute a prompt once and keep its KV on disk under a name.

        Many answers can then start from it (`kv_from`), also in other processes. The KV of a name
        is not given up for anonymous prefixes; `mlxkv kv pin` keeps it for good.

        Args:
            name: letters, digits, `.`, `_`, `-`; what it named before is replaced.
            prompt: a text, token ids, or messages (a codebase as the system message, say), which
                later ones are appended to.
            model: what to show as the model's name; None for its directory's.
            on_progress: called with (done, all) tokens.

        Raises:
            UsageError: an empty prompt, a bad name, or KV on disk is switched off.
            OutputError: it does not fit what the disk may take.
        """
        return saved_prefix.save(self, name, prompt, model, on_progress)

    def saved_kv(self, name: str | NamedKV | None) -> NamedKV | None:
        """Saved KV by its name.

        Raises:
            ModelNotFound: nothing of that name.
            UsageError: it was saved for another model, dtype or KV format.
        """
        return saved_prefix.find(self, name)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, of messages, or as given.

        Raises:
            UsageError: nothing in it, or an id that the model does not have.
        """
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt)
        elif prompt and isinstance(prompt[0], Mapping):
            tokens = self.encode_text(self.render(prompt))  # pyright: ignore[reportArgumentType]
        else:
            tokens = list(prompt)
        if not tokens:
            raise UsageError("the prompt is empty")
        self._check_ids(tokens)
        return tokens  # pyright: ignore[reportReturnType]

    def encode_text(self, text: str) -> list[int]:
        """Token ids of text that holds its own special tokens, such as a rendered template."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """A conversation as the chat template writes it, opened for the next answer.

        Raises:
            TemplateError: there is no template, or it fails.
        """
        template = self.tokenizer.chat_template
        if template is None:
            raise TemplateError(
                f"{self.path / 'tokenizer_config.json'}: key 'chat_template' is missing, so this "
                f"model completes text and does not chat; use --raw, or give a text"
            )
        return template.render(messages, **options)

    def template_options(self, request: Request) -> dict[str, Any]:
        """What a request sets of the chat template's variables.

        Raises:
            UsageError: it asks for reasoning in a way that the template has no switch for.
        """
        options: dict[str, Any] = {} if request.tools is None else {"tools": request.tools}
        template = self.tokenizer.chat_template
        if request.think is None or template is None:
            return options
        return options | thinking_options(template, request.think, thinks(self.tokenizer))

    def parser(self, prompt: str, request: Request) -> OutputParser:
        """A parser for the answer to a rendered prompt."""
        return parser_for(self.tokenizer, prompt=prompt, tools=request.tools)

    def _check_ids(self, tokens: Sequence[Any]) -> None:
        n = self.config.vocab_size
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < n:
                raise UsageError(f"token id {token!r} is out of range; this model has 0 to {n - 1}")

    def fit(self, tokens: list[int], request: Request, settings: Settings) -> list[int]:
        """A prompt that leaves room for an answer, or one that is shifted until it does.

        Raises:
            ContextExceeded: it does not, and `truncate` is off.
        """
        context = settings.context.value
        shifts = settings.overflow.value == "shift"
        if len(tokens) < context or (shifts and not request.truncate):
            return tokens
        if not request.truncate:
            raise ContextExceeded(len(tokens), context)
        room = min(request.max_tokens or context // 4, max(1, context // 2))
        bos = tokens[:1] if tokens[0] == self.tokenizer.bos_token_id else []
        return bos + tokens[len(tokens) - (context - room - len(bos)) :]

    def run(
        self,
        session: Session,
        tokens: list[int],
        request: Request,
        parser: OutputParser | None = None,
        head: Head | None = None,
    ) -> Iterator[Chunk]:
        """Stream the answer to token ids on a session's caches, keeping the prefix they hold.

        Args:
            session: for this sequence.
            tokens: the prompt.
            request: what is asked for.
            parser: of the answer; None for text alone.
            head: what the prompt begins with that is kept where the context is full.

        Raises:
            UsageError, ContextExceeded: as for `stream`.
        """
        return self._run(self.turn(session, tokens, request, parser, head))

    def turn(
        self,
        session: Session,
        tokens: list[int],
        request: Request,
        parser: OutputParser | None = None,
        head: Head | None = None,
    ) -> Turn:
        """An answer of which nothing is computed yet; arguments and errors as for `run`."""
        bound, tokens = self._bounded(tokens, request, head or Head())
        sampler = Sampler(request.sampling, self.config.vocab_size)
        reader = AnswerReader(self.tokenizer, parser, request.stop)
        return Turn(session, tokens, request, sampler, reader, bound, self.tokenizer)

    def _bounded(self, tokens: list[int], request: Request, head: Head) -> tuple[Bound, list[int]]:
        """A request's context, and its prompt; what is kept of it is counted when it is needed."""
        settings = self.settings.asked(request.context, request.overflow, request.keep)
        fitted = self.fit(tokens, request, settings)
        if settings.overflow.value == "stop":
            return Bound(settings.context.value), fitted
        keep = settings.keep.value
        # A prompt that was cut does not begin with its head any more.
        known = head if fitted is tokens else Head()
        bound = Bound(settings.context.value, lambda: max(keep, known.n_tokens(self, fitted)))
        bound.check(len(fitted), request.max_tokens, keep)
        return bound, fitted

    def _run(self, turn: Turn) -> Iterator[Chunk]:
        mx.reset_peak_memory()
        self.budget.begin()
        session = turn.session
        prompt = turn.begin()
        try:
            logits = session.prefill(prompt, on_progress=turn.request.on_progress)
            whole = list(turn.sequence)
            for token in decode_within(
                session, whole, logits, turn.sampler, turn.bound, turn.limit
            ):
                yield turn.took(token)
                if turn.over:
                    return
        except KVCacheFull as error:
            if turn.n_generated == 0:
                raise
            yield turn.ended("memory", error)
        except CheckpointError:
            session.discard()
            raise
        finally:
            # Also of an answer that was left early: what was computed is worth as much.
            keep_prefix(session)

    def session(self) -> Session:
        """Empty caches for one sequence, which share prefixes with all others of this model."""
        return Session(self.model, self.kv_type, self.pages, self.budget)

    def stats(self) -> MemoryStats:
        """Where the memory is, and where it was during the last request."""
        return memory_stats(self.budget)

    def _collect(self, chunks: Iterator[Chunk]) -> Result:
        parts = list(chunks)
        ends = self.tokenizer.eos_token_ids
        tokens = [c.token for c in parts if c.token is not None and c.token not in ends]
        text, reasoning, calls = join_parts(parts)
        last = parts[-1]
        assert last.finish_reason and last.stats
        return Result(
            text, tokens, last.finish_reason, last.stats, reasoning or None, calls, last.error
        )
