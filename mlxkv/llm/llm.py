"""The Python API: load a model, stream text, keep a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

import mlx.core as mx

from mlxkv.base.stepwise import finished
from mlxkv.engine import encoding
from mlxkv.engine import prompt as prompts
from mlxkv.engine.driver import run, stream
from mlxkv.engine.prompt import Prepared
from mlxkv.engine.runtime import Runtime
from mlxkv.errors import UsageError
from mlxkv.generation.drafts.small_model import SmallModel
from mlxkv.generation.generation import Generation
from mlxkv.generation.outputs import Chunk, Result, Stats, join_parts
from mlxkv.generation.request import Message, Prompt, Request
from mlxkv.llm import saved_prefix
from mlxkv.llm.conversation import Conversation
from mlxkv.memory.figures import memory_stats
from mlxkv.memory.types import MemoryStats
from mlxkv.saved_kv.manifest import NamedKV
from mlxkv.store.adapter_names import split
from mlxkv.store.adapters import AdapterRef, adapter_refs
from mlxkv.store.resolve import resolve
from mlxkv.store.settings import Given, Settings, draft_model, effective, own_context

if TYPE_CHECKING:
    from mlxkv.generation.kv_check import KVReport
    from mlxkv.generation.rank import Ranked
    from mlxkv.generation.speech.transcripts import Heard, Transcript
    from mlxkv.media.sound import SoundSource

__all__ = ["LLM", "Chunk", "Conversation", "Prompt", "Request", "Result", "Stats", "load"]


def load(
    model: str | Path,
    dtype: mx.Dtype | str = "auto",
    memory: str | int | None = None,
    kv_type: str | Mapping[str, str] | None = None,
    context: int | None = None,
    overflow: str | None = None,
    keep: int | None = None,
    draft: str | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
) -> LLM:
    """Load a model with its tokenizer.

    Arguments that are None come from the environment (`MLXKV_CONTEXT`, `MLXKV_KV_TYPE`,
    `MLXKV_MEMORY`, `MLXKV_OVERFLOW`, `MLXKV_KEEP`, `MLXKV_DRAFT`), then from the
    model's settings file, see `settings`, then from the defaults here.

    Args:
        model: a directory, a name of `mlxkv list` or a Hugging Face repository; or `MODEL+ADAPTER`.
        dtype: to compute in: auto, float32, float16, bfloat16.
        memory: limit in bytes or like "16GiB"; default: what the machine allows.
        kv_type: format of the KV cache: native (default), q8, k8v4 (keys in 8 bits, values in 4),
            q4, or auto: native until memory is short, then quantized. By layer as in "k8v4,0=q8"
            or {"default": "k8v4", "0": "q8"}.
        context: tokens of prompt and answer together; default: the model's own.
        overflow: at the context's end `stop` (default), or `shift`: drop the oldest tokens behind
            those that are kept, and continue.
        keep: leading tokens that a shift keeps, besides the system prompt; default: 0.
        draft: what proposes tokens, of which several are checked in one step: lookup (default:
            what followed the same tokens before), mtp (the model's own next-token layer, or the
            assistant beside it, loaded for this), auto (both), off, or a smaller model with the
            same tokens, by a name as above, beside lookup. The answer stays the same.
        adapter: a LoRA or DoRA adapter for the model, or several: a directory or .gguf file, or a
            Hugging Face repository; each may end in "=WEIGHT", by which its change is multiplied.

    Raises:
        UsageError: no such format, dtype or limit, a context past the model's own, or a model to
            draft that has other tokens.
        ModelNotFound: no such model.
        CheckpointError: its files are damaged or not supported.
        OutOfMemory: its weights are over the limit.
        DownloadError: it cannot be downloaded.
    """
    given = Given(context, kv_type, memory, overflow, keep, draft=draft)
    name, own = split(str(model))
    path = resolve(name)
    return LLM.load(path, effective(path, given), dtype, adapter_refs(own) + adapter_refs(adapter))


class LLM(Runtime):
    """A model, its tokenizer and its chat template; see `Runtime` for the attributes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @classmethod
    def load(
        cls,
        path: Path,
        settings: Settings,
        dtype: mx.Dtype | str = "auto",
        adapters: Sequence[AdapterRef] = (),
    ) -> Self:
        """Load a model's directory with adapters, and the model that drafts for it; raises as
        `mlxkv.load`."""
        llm = super().load(path, settings, dtype, adapters)
        if (name := draft_model(settings.draft.value)) is not None:
            llm.draft_model(name)
        return llm

    def draft_model(self, name: str) -> SmallModel | None:
        """The smaller model of this name, loaded where it is not; raises as `mlxkv.load`."""
        if self.draft_models.runtime(name) is None:
            path = resolve(name)
            used = self.budget.weights_bytes + self.draft_models.used_bytes
            given = Given(own_context(path), memory=max(1, self.memory_limit - used))
            self.draft_models.attach(name, finished(Runtime.loading(path, effective(path, given))))
            self.share_memory()
        return super().draft_model(name)

    def close(self) -> None:
        """Write prefixes to disk and drop them from RAM, of models that draft too."""
        super().close()
        for runtime in self.draft_models.runtimes:
            runtime.close()

    def stream(
        self, prompt: Prompt, *, kv_from: str | NamedKV | None = None, **options: Any
    ) -> Iterator[Chunk]:
        """Stream an answer.

        Args:
            prompt: a text (used as it is), messages (rendered by the chat template), or token ids.
            kv_from: name of saved KV that the prompt continues, see `save_kv`.
            **options: `max_tokens`, `min_tokens`, `ignore_eos`, `stop`, `truncate`, `format`,
                `logprobs`, `prompt_logprobs`, `on_progress`, for messages `think`, `tools`,
                `callable` and `template_options`, `context`, `overflow`, `keep` and `draft` in
                place of the model's settings, `adapter` as for `load`, for this answer and beside
                the model's own (see `Request`), and the fields of `SamplingParams`, such as
                `temperature` (0, greedy, by default). `format` is a JSON schema, a pydantic model,
                a compiled regex, "json" or a `Grammar`. With `recommended` fields that are not set
                come from the model's generation_config.json.

        Yields:
            One chunk per token; the last has `finish_reason` and `stats`. Answers to messages come
            as text, reasoning and tool calls, those to a text or token ids as text.

        Raises:
            UsageError: an empty prompt, or an option out of its range.
            ContextExceeded: the prompt is longer than the context.
            TemplateError: messages, and the model has no chat template or it fails.
        """
        if _is_batch(prompt):
            raise UsageError("stream answers one prompt: give a list of prompts to generate")
        request = Request.of(prompt, saved=self.saved_kv(kv_from), **options)
        return stream(self, self._generation(request, prompts.prepare(self, request)))

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        n: None = None,
        kv_from: str | NamedKV | None = None,
        **options: Any,
    ) -> Result: ...

    @overload
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        n: int | None = None,
        kv_from: str | NamedKV | None = None,
        **options: Any,
    ) -> Any: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        n: int | None = None,
        kv_from: str | NamedKV | None = None,
        **options: Any,
    ) -> Any:
        """The whole answer at once.

        Args:
            prompt: as for `stream`, or a list of such prompts, which are answered as one batch.
            n: answers for each prompt; a `seed` grows by one with each.
            kv_from: as for `stream`, and so are the options and errors.

        Returns:
            A `Result`. With a list of prompts or with `n` a list of them: those of the first
            prompt, then those of the second.
        """
        if n is not None and (type(n) is not int or n < 1):
            raise UsageError(f"n must be a whole number, 1 or more; got {n!r}")
        is_batch, saved = _is_batch(prompt), self.saved_kv(kv_from)
        generations = []
        for each in prompt if is_batch else [prompt]:
            request = Request.of(each, saved=saved, **options)  # pyright: ignore[reportArgumentType]
            prepared = prompts.prepare(self, request)
            generations += [self._generation(request.nth(i), prepared) for i in range(n or 1)]
        one = len(generations) == 1
        answers: list[list[Chunk]] = [[] for _ in generations]
        for i, chunk in run(self, generations, keep_sessions=one):
            answers[i].append(chunk)
        results = [self._collected(chunks) for chunks in answers]
        return results if is_batch or n is not None else results[0]

    def chat(self, messages: Sequence[Message], **options: Any) -> Result:
        """The answer to messages of `role` and `content`; options as for `generate`."""
        if isinstance(messages, str):
            raise UsageError('messages must be a list like [{"role": "user", "content": "..."}]')
        return self.generate(messages, **options)

    def embed(self, texts: str | Sequence[str], **options: Any) -> mx.array:
        """Vectors of texts, float32 `[N, D]`, `[D]` for one text; see `llm.vectors.embed`."""
        from mlxkv.llm.vectors import embed

        return embed(self, texts, **options)

    def rerank(self, query: str, documents: Sequence[str], **options: Any) -> list[Ranked]:
        """Documents by how well they fit a query, the best first; see `llm.rank.rerank`."""
        from mlxkv.llm.rank import rerank

        return rerank(self, query, documents, **options)

    def transcribe(self, sound: SoundSource, **options: Any) -> Transcript:
        """The text of a recording; arguments and errors as for `stream_transcript`."""
        *_, last = self.stream_transcript(sound, **options)
        assert last.transcript is not None
        return last.transcript

    def stream_transcript(
        self,
        sound: SoundSource,
        *,
        language: str | None = None,
        prompt: str | None = None,
        format: str = "text",
        name: str = "",
        **options: Any,
    ) -> Iterator[Heard]:
        """Stream the text of a recording, in windows of at most 30 seconds.

        Args:
            sound: a path, the bytes of a file, or (mono samples, samples a second).
            language: what is spoken, such as "German"; default: the model tells.
            prompt: names and words that occur, or a style.
            format: what `Transcript.formatted` is to make of it: `text` and `json` have windows of
                30 seconds, `srt`, `vtt` and `verbose_json` of 10, for their times.
            name: for messages.
            **options: as for `stream`.

        Yields:
            Text as it comes; the last step has the whole `transcript`.

        Raises:
            UsageError: the model takes no sound, or an option out of its range.
            MediaError: the sound cannot be read.
            OutOfMemory: a window's answer ended for want of memory.
        """
        from mlxkv.llm.transcribe import transcript

        return transcript(
            self,
            sound,
            language=language,
            prompt=prompt,
            format=format,
            name=name,
            options=options,
        )

    def conversation(
        self,
        system: str | None = None,
        kv_from: str | NamedKV | None = None,
        adapter: str | Sequence[str] = (),
    ) -> Conversation:
        """A chat that keeps its KV between turns, with a system prompt, behind the messages of
        saved KV; `kv_from` and `adapter` are as for `stream`."""
        return Conversation(self, system, self.saved_kv(kv_from), adapter)

    def save_kv(
        self,
        name: str,
        prompt: Prompt,
        *,
        model: str | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> NamedKV:
        """Compute a prompt once and keep its KV on disk under a name.

        Many answers can then start from it (`kv_from`), also in other processes. KV without a name
        is evicted before it; `mlxkv kv pin` protects it from eviction.

        Args:
            name: letters, digits, `.`, `_`, `-`; replaces KV of the same name.
            prompt: a text, token ids, or messages, such as a codebase as the system message, that
                later messages are appended to.
            model: the model's name to show; None for its directory's.
            on_progress: called with (done, all) tokens.

        Raises:
            UsageError: an empty prompt, a bad name, or KV on disk is switched off.
            OutputError: it does not fit the disk limit.
        """
        return saved_prefix.save(self, name, prompt, model, on_progress)

    def verify_kv(
        self,
        name: str,
        *,
        full: bool = True,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> KVReport:
        """Compute saved KV again and compare it with what is on disk.

        An import that passes is trusted: its pages serve every prompt that begins like its text.

        Args:
            name: saved for this model, in its dtype and KV format.
            full: compute the whole prompt; False: the first, the last and two other pages.
            on_progress: called with (done, all) tokens.

        Raises:
            UsageError: there is no such name, or it is of another model, dtype or KV format.
        """
        from mlxkv.llm import imported_kv

        return imported_kv.verify(self, name, full=full, on_progress=on_progress)

    def saved_kv(self, name: str | NamedKV | None) -> NamedKV | None:
        """Saved KV by its name. Of an import a sample is computed first, until it is trusted.

        Raises:
            UsageError: there is none, or it was saved for another model, dtype or KV format.
            CheckpointError: an import is not what the model computes.
        """
        return saved_prefix.find(self, name)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, of messages, or as given.

        Raises:
            UsageError: it is empty, or has an id that the model does not have.
        """
        return encoding.encode(self, prompt)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of text that holds its own special tokens, such as a rendered template."""
        return encoding.encode_text(self, text)

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """A conversation as the chat template writes it, opened for the next answer.

        Raises:
            TemplateError: there is no template, or it fails.
        """
        return encoding.render(self, messages, **options).text

    def stats(self) -> MemoryStats:
        """Memory now, and during the last request."""
        return memory_stats(self.budget, self.draft_models.used_bytes)

    def _generation(self, request: Request, prepared: Prepared) -> Generation:
        return prompts.start(self, request, prepared, self.session("", request.adapter))

    def _collected(self, chunks: Sequence[Chunk]) -> Result:
        last, tokens = chunks[-1], [c.token for c in chunks if c.token is not None]
        ended = last.finish_reason == "stop"
        if ended and tokens and tokens[-1] in self.tokenizer.eos_token_ids:
            tokens.pop()
        text, reasoning, calls = join_parts(chunks)
        assert last.finish_reason and last.stats
        return Result(
            text,
            tokens,
            last.finish_reason,
            last.stats,
            reasoning or None,
            calls,
            last.error,
            tuple(chunk.logprobs for chunk in chunks if chunk.logprobs is not None),
            chunks[0].prompt_logprobs or (),
        )


def _is_batch(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Whether it is a list of prompts: texts, or lists of messages or of ids."""
    first = None if isinstance(prompt, str) or not prompt else prompt[0]
    return isinstance(first, str | list | tuple)
