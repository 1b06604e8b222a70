"""Who answers in `mlxkv run`: a model in this process (`local`) or a server's (`remote`).

What is here is all that `run` and the chat know of it, and none of it needs MLX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from mlxkv.generation.outputs import Chunk
    from mlxkv.memory.types import MemoryStats
    from mlxkv.sampling.params import SamplingParams
    from mlxkv.saved_kv.manifest import NamedKV
    from mlxkv.terminal.answer_options import AnswerOptions

Progress = Callable[[int, int], None]
"""Called with (done, all) tokens of a long prompt, and with (0, 0) where that is not known."""


class Talk(Protocol):
    """A conversation; see `mlxkv.llm.conversation.Conversation`.

    Attributes:
        append_only: whether the chat template left earlier answers alone; None where that did not
            come up, or is not known.
    """

    append_only: bool | None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The system prompt and all turns."""
        ...

    def set_system(self, text: str | None) -> None: ...

    def clear(self) -> None: ...

    def restore_turns(self, turns: Sequence[dict[str, Any]]) -> None: ...

    def send(self, text: str, **options: Any) -> Iterator[Chunk]: ...


class Speaker(Protocol):
    """A model that answers.

    Attributes:
        name: as the user named it.
    """

    name: str

    @property
    def title(self) -> str:
        """Its name, and where it is unless that is here."""
        ...

    @property
    def can_chat(self) -> bool:
        """Whether it has a chat template."""
        ...

    @property
    def context(self) -> int | None:
        """Tokens that prompt and answer may have together; None where that is not known."""
        ...

    @property
    def recommended(self) -> SamplingParams:
        """How its makers would sample."""
        ...

    def about(self) -> list[tuple[str, str]]:
        """What it is and runs with, in rows for people."""
        ...

    def memory(self) -> MemoryStats | None:
        """Where its memory is; None where that is another process's."""
        ...

    def check_thinking(self, think: bool | str) -> None:
        """Refuses what the chat template has no switch for.

        Raises:
            UsageError: it has none.
        """
        ...

    def stream(
        self,
        prompt: str | Sequence[dict[str, Any]],
        settings: AnswerOptions,
        on_progress: Progress | None = None,
        kv_from: NamedKV | None = None,
    ) -> Iterator[Chunk]:
        """The answer to messages, or to a text that goes to the model as it is.

        Args:
            prompt: either.
            settings: how to answer; what they leave open, the model's makers recommend.
            on_progress: told how far a long prompt is.
            kv_from: saved KV that it goes on from; only in this process.

        Raises:
            TemplateError: messages, and it has no chat template.
        """
        ...

    def conversation(self, system: str | None, kv_from: NamedKV | None = None) -> Talk:
        """A new conversation; arguments as for `stream`."""
        ...

    def other(self, name: str) -> Speaker:
        """Another model where this one is, with the same settings.

        Raises:
            ModelNotFound: there is none of that name.
        """
        ...

    def close(self) -> None:
        """It is needed no more."""
        ...
