"""The interface of a model in `mlxkv run`: in this process (`local`) or on a server (`remote`).

`run` and the chat use nothing else of a model. Nothing here needs MLX.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from mlxkv.generation.asleep import Asleep
    from mlxkv.generation.outputs import Chunk
    from mlxkv.memory.types import MemoryStats
    from mlxkv.sampling.params import SamplingParams
    from mlxkv.saved_kv.manifest import NamedKV
    from mlxkv.terminal.answer_options import AnswerOptions

Progress = Callable[[int, int], None]
"""Called with (done, all) tokens of a long prompt, and with (0, 0) if that is not known."""


class Talk(Protocol):
    """A conversation; see `mlxkv.llm.conversation.Conversation`.

    Attributes:
        append_only: whether the chat template left earlier answers unchanged; None if not known.
    """

    append_only: bool | None

    @property
    def begun(self) -> Asleep | None:
        """The answer that is being written, to go on with later; None if that is not known."""
        ...

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The system prompt and all turns."""
        ...

    def set_system(self, text: str | None) -> None: ...

    def clear(self) -> None: ...

    def restore_turns(self, turns: Sequence[dict[str, Any]]) -> None: ...

    def send(self, text: Any, **options: Any) -> Iterator[Chunk]:
        """The answer to a message, see `attachments.Content`."""
        ...


@runtime_checkable
class ComputesAhead(Protocol):
    """A conversation in this process, whose next prompt can be computed before it is asked."""

    def computing_ahead(self, idle_compute: str | None = None) -> Generator[None, None, None]: ...


class Speaker(Protocol):
    """A model that answers.

    Attributes:
        name: as the user named it.
    """

    name: str

    @property
    def title(self) -> str:
        """Its name, and the server's address if it is on one."""
        ...

    @property
    def can_chat(self) -> bool:
        """Whether it has a chat template."""
        ...

    @property
    def media_kinds(self) -> frozenset[str]:
        """What it takes beside text: of `image` and `audio`."""
        ...

    @property
    def context(self) -> int | None:
        """Tokens that prompt and answer may have together; None if not known."""
        ...

    @property
    def recommended(self) -> SamplingParams:
        """The sampling that its makers recommend."""
        ...

    def about(self) -> list[tuple[str, str]]:
        """Facts and settings as (name, value) rows."""
        ...

    def memory(self) -> MemoryStats | None:
        """Its memory; None if it is another process's."""
        ...

    def check_thinking(self, think: bool | str) -> None:
        """Raise UsageError if the chat template has no switch for that."""
        ...

    def stream(
        self,
        prompt: str | Sequence[dict[str, Any]],
        settings: AnswerOptions,
        on_progress: Progress | None = None,
        kv_from: NamedKV | None = None,
    ) -> Iterator[Chunk]:
        """The answer to messages, or the continuation of a text.

        Args:
            settings: unset ones are what the model's makers recommend.
            kv_from: saved KV to start from; only in this process.

        Raises:
            TemplateError: messages, and it has no chat template.
        """
        ...

    def conversation(self, system: str | None, kv_from: NamedKV | None = None) -> Talk:
        """A new conversation; arguments as for `stream`."""
        ...

    def other(self, name: str) -> Speaker:
        """Another model in the same place, with the same settings.

        Raises:
            ModelNotFound: there is none of that name.
        """
        ...

    def close(self) -> None:
        """Release its memory."""
        ...
