"""A model in this process, for `mlxkv run` and its chat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

from mlxkv.base.startup import collecting_later
from mlxkv.errors import TemplateError
from mlxkv.terminal.answer_options import AnswerOptions, options_of

if TYPE_CHECKING:
    from mlxkv.generation.outputs import Chunk
    from mlxkv.llm.conversation import Conversation
    from mlxkv.llm.llm import LLM
    from mlxkv.memory.types import MemoryStats
    from mlxkv.sampling.params import SamplingParams
    from mlxkv.saved_kv.manifest import NamedKV
    from mlxkv.store.settings import Given
    from mlxkv.terminal.backend import Progress


def load_model(name: str, dtype: str, given: Given, adapters: Sequence[str] = ()) -> LLM:
    """Load the model of that name, with adapters, and with progress on stderr."""
    from mlxkv.store import resolve
    from mlxkv.store.adapter_names import split
    from mlxkv.store.adapters import adapter_refs
    from mlxkv.terminal.console import ProgressLine

    progress = ProgressLine(plain=True)
    try:
        model, own = split(name)
        path = resolve.resolve(model, report=progress)
        refs = adapter_refs([*own, *adapters])
        progress(f"loading {name}")
        with collecting_later():
            from mlxkv.llm.llm import LLM
            from mlxkv.store.settings import effective

            return LLM.load(path, effective(path, given), dtype, refs)
    finally:
        progress.clear()


class LocalSpeaker:
    """See `mlxkv.terminal.backend.Speaker`. `other` loads with the same settings and dtype, and
    without adapters, which belong to their model."""

    def __init__(self, llm: LLM, name: str, given: Given, dtype: str = "auto"):
        self.llm, self.name, self.given, self.dtype = llm, name, given, dtype

    @classmethod
    def load(cls, name: str, given: Given, dtype: str, adapters: Sequence[str] = ()) -> Self:
        """Load the model of that name, with adapters."""
        from mlxkv.store import last_model

        llm = load_model(name, dtype, given, adapters)
        last_model.remember(name)
        return cls(llm, name, given, dtype)

    @property
    def title(self) -> str:
        return self.name

    @property
    def can_chat(self) -> bool:
        return self.llm.tokenizer.chat_template is not None

    @property
    def media_kinds(self) -> frozenset[str]:
        return self.llm.model.media_kinds

    @property
    def context(self) -> int:
        return self.llm.context

    @property
    def recommended(self) -> SamplingParams:
        return self.llm.recommended

    def about(self) -> list[tuple[str, str]]:
        config = self.llm.config
        return [
            ("model", f"{self.name} ({config.model_type}, context {config.context:,})"),
            ("path", str(self.llm.path)),
            *(("adapter", f"{each.path} ({each.weight:g})") for each in self.llm.adapters),
            *((setting.name, str(setting)) for setting in self.llm.settings),
        ]

    def memory(self) -> MemoryStats:
        return self.llm.stats()

    def check_thinking(self, think: bool | str) -> None:
        from mlxkv.chat.chat_template import thinking_options
        from mlxkv.parsers.formats import thinks

        template = self.llm.tokenizer.chat_template
        if template is not None:
            thinking_options(template, think, thinks(self.llm.tokenizer))

    def stream(
        self,
        prompt: str | Sequence[dict[str, Any]],
        settings: AnswerOptions,
        on_progress: Progress | None = None,
        kv_from: NamedKV | None = None,
    ) -> Iterator[Chunk]:
        if not isinstance(prompt, str) and not self.can_chat:
            raise TemplateError(
                f"{self.name} has no chat template (it is a base model): add --raw to have it "
                "continue the prompt as it is"
            )
        return self.llm.stream(
            prompt,
            kv_from=kv_from,
            on_progress=on_progress,
            recommended=True,
            **options_of(settings),
        )

    def conversation(self, system: str | None, kv_from: NamedKV | None = None) -> Conversation:
        return self.llm.conversation(system=system, kv_from=kv_from)

    def other(self, name: str) -> LocalSpeaker:
        return LocalSpeaker.load(name, self.given, self.dtype)

    def close(self) -> None:
        self.llm.close()
