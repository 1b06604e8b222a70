"""A model on a server, for `mlxkv run --server` and its chat, through the Ollama API.

Invariants:
- Nothing here needs MLX, and no model is loaded in this process.
- An answer that is closed before its end closes its connection, which cancels it on the server.
- Unset options are left out of a request: the server's settings decide, not this machine's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mlxkv.errors import MlxkvError, OutOfMemory, UsageError
from mlxkv.generation.outputs import Chunk, DraftStats, Miss, Stats, join_parts
from mlxkv.memory.types import Rung
from mlxkv.sampling.params import GENERATION_CONFIG, SamplingParams
from mlxkv.server.client import Server
from mlxkv.store.refs import looks_like_model
from mlxkv.store.settings import COMMAND_LINE, Given, Setting
from mlxkv.terminal.answer_options import AnswerOptions

if TYPE_CHECKING:
    from mlxkv.saved_kv.manifest import NamedKV
    from mlxkv.terminal.backend import Progress
    from mlxkv.terminal.files.attachments import Content

_OPTIONS = {"max_tokens": "num_predict"} | {
    field.name: field.name for field in fields(SamplingParams) if field.name != "logit_bias"
}
"""Option of an answer -> Ollama's name for it."""
_GIVEN = ("context", "overflow", "keep", "draft")


def names_model(server: Server) -> Callable[[str], bool]:
    """A test of whether an argument names a model: by its form, or because the server has it."""

    def test(word: str) -> bool:
        if looks_like_model(word):
            return True
        known = {
            model.get("name")
            for path in ("/api/tags", "/api/ps")
            for model in server.ask("GET", path).get("models", ())
        }
        return not known.isdisjoint({word, f"{word}:latest"})

    return test


class RemoteSpeaker:
    """See `mlxkv.terminal.backend.Speaker`.

    Context, overflow, keep and draft of `given` go with every request.
    """

    def __init__(self, server: Server, name: str, given: Given):
        self.server, self.name, self.given = server, name, given

    @property
    def title(self) -> str:
        return f"{self.name} on {self.server}"

    @property
    def can_chat(self) -> bool:
        return bool(self._shown.get("template"))

    @property
    def media_kinds(self) -> frozenset[str]:
        names = {"vision": "image", "audio": "audio"}
        told = self._shown.get("capabilities") or ()
        return frozenset(kind for name, kind in names.items() if name in told)

    @property
    def context(self) -> int | None:
        if self.given.context is not None:
            return self.given.context
        try:
            loaded = self.server.ask("GET", "/api/ps").get("models", ())
        except MlxkvError:
            return None
        lengths = {model.get("name"): model.get("context_length") for model in loaded}
        spellings = (self.name, f"{self.name}:latest", self.name.removesuffix(":latest"))
        return next((lengths[name] for name in spellings if name in lengths), None)

    @property
    def recommended(self) -> SamplingParams:
        advised = GENERATION_CONFIG.values()
        lines = str(self._shown.get("parameters", "")).splitlines()
        pairs = (line.split(None, 1) for line in lines if len(line.split(None, 1)) == 2)
        return SamplingParams(**{name: json.loads(x) for name, x in pairs if name in advised})

    @cached_property
    def _shown(self) -> dict[str, Any]:
        """The server's description of the model; ModelNotFound if it has none of that name."""
        return self.server.ask("POST", "/api/show", {"model": self.name})

    def about(self) -> list[tuple[str, str]]:
        family = self._shown.get("details", {}).get("family", "?")
        context = self._shown.get("model_info", {}).get(f"{family}.context_length")
        known = f", context {context:,}" if isinstance(context, int) else ""
        given = {name: getattr(self.given, name) for name in _GIVEN}
        return [
            ("model", f"{self.name} ({family}{known})"),
            ("server", str(self.server)),
            *(
                (name, str(Setting(name, value, COMMAND_LINE)))
                for name, value in given.items()
                if value is not None
            ),
        ]

    def memory(self) -> None:
        return None

    def check_thinking(self, think: bool | str) -> None:
        # The server knows the kinds of switches, and refuses a wrong value with the next answer.
        if think and "thinking" not in self._shown.get("capabilities", ()):
            raise UsageError(f"{self.name} has no switch for reasoning in its chat template")

    def stream(
        self,
        prompt: str | Sequence[dict[str, Any]],
        settings: AnswerOptions,
        on_progress: Progress | None = None,
        kv_from: NamedKV | None = None,
    ) -> Generator[Chunk]:
        if kv_from is not None:
            raise UsageError("KV that is kept under a name is this machine's, not a server's")
        if isinstance(prompt, str):
            return self._answer(
                "/api/generate", {"prompt": prompt, "raw": True}, settings, on_progress
            )
        messages = [_message(turn) for turn in prompt]
        return self._answer("/api/chat", {"messages": messages}, settings, on_progress)

    def conversation(self, system: str | None, kv_from: NamedKV | None = None) -> RemoteTalk:
        return RemoteTalk(self, system)

    def other(self, name: str) -> RemoteSpeaker:
        made = RemoteSpeaker(self.server, name, self.given)
        _ = made._shown
        return made

    def close(self) -> None:
        """The server unloads its models itself."""

    def _answer(
        self,
        path: str,
        asked: dict[str, Any],
        settings: AnswerOptions,
        on_progress: Progress | None,
    ) -> Generator[Chunk]:
        started, first_s = time.perf_counter(), None
        if on_progress is not None:
            on_progress(0, 0)
        with closing(self.server.lines(path, self._body(asked, settings))) as lines:
            for line in lines:
                first_s = first_s or time.perf_counter() - started
                yield _chunk(line, first_s)
                if line.get("done"):
                    return
        raise self.server.incomplete()

    def _body(self, asked: dict[str, Any], settings: AnswerOptions) -> dict[str, Any]:
        given = self.given
        options = {theirs: getattr(settings, ours) for ours, theirs in _OPTIONS.items()}
        options |= {"num_ctx": given.context, "num_keep": given.keep}
        options |= {"stop": list(settings.stop) or None}
        body = {
            "model": self.name,
            "stream": True,
            "think": settings.think,
            "format": settings.format,
            "truncate": settings.truncate or None,
            "shift": None if given.overflow is None else given.overflow == "shift",
            "draft": given.draft,
            "options": {name: value for name, value in options.items() if value is not None},
        }
        return {**asked, **{name: value for name, value in body.items() if value is not None}}


class RemoteTalk:
    """A conversation with KV on the server, which restores the prefix of each message."""

    append_only: bool | None = None
    begun = None
    """The server keeps it: the same request gets the whole answer."""

    def __init__(self, speaker: RemoteSpeaker, system: str | None):
        self._speaker, self.system = speaker, system
        self.turns: list[dict[str, Any]] = []

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The system prompt and all turns."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.turns

    def set_system(self, text: str | None) -> None:
        """Change the system prompt."""
        self.system = text or None

    def clear(self) -> None:
        """Forget all turns."""
        self.turns = []

    def restore_turns(self, turns: Sequence[dict[str, Any]]) -> None:
        """Continue from saved turns."""
        self.turns = [dict(turn) for turn in turns]

    def send(
        self, text: Content, on_progress: Progress | None = None, **options: Any
    ) -> Iterator[Chunk]:
        """Stream the answer to the user's next message; options are the fields of `AnswerOptions`.

        Of an answer that is left early the part so far stays in the history.
        """
        user = {"role": "user", "content": text}
        shown: list[Chunk] = []
        asked = [*self.messages, user]
        try:
            with closing(
                self._speaker.stream(asked, AnswerOptions(**options), on_progress)
            ) as chunks:
                for chunk in chunks:
                    shown.append(chunk)
                    yield chunk
        finally:
            if shown:
                content, reasoning, _ = join_parts(shown)
                turn = {"role": "assistant", "content": content}
                self.turns += [user, turn | ({"reasoning_content": reasoning} if reasoning else {})]


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn as Ollama's API has it: pictures and sound before the text, in base64."""
    made, content = {"role": turn["role"], "content": turn["content"]}, turn["content"]
    if isinstance(content, list):
        from base64 import b64encode

        files = [part[part["type"]] for part in content if part["type"] != "text"]
        texts = [part["text"] for part in content if part["type"] == "text"]
        made["content"] = "\n".join(texts)
        made |= {"images": [b64encode(data).decode() for data in files]} if files else {}
    thinking = turn.get("reasoning_content")
    return made | ({"thinking": thinking} if thinking else {})


def _chunk(line: Mapping[str, Any], first_s: float) -> Chunk:
    """A line of an answer."""
    said = line.get("message")
    if not isinstance(said, dict):
        said = {"content": line.get("response"), "thinking": line.get("thinking")}
    text, thinking = said.get("content") or "", said.get("thinking") or None
    if not line.get("done"):
        return Chunk(text, reasoning=thinking)
    reason, error = line.get("done_reason"), None
    if reason == "memory":
        why = (line.get("memory") or {}).get("message")
        error = OutOfMemory(why or "the server's memory allows no longer answer")
    return Chunk(text, None, reason, _stats(line, first_s), thinking, error=error)


def _stats(line: Mapping[str, Any], first_s: float) -> Stats | None:
    """The figures of the last line; None from another server, which sends fewer."""
    try:
        cache, memory, miss = line["prompt_cache"], line["memory"], line["prompt_cache"]["miss"]
        return Stats(
            prompt_tokens=cache["prompt_tokens"],
            restored_tokens=cache["restored_ram_tokens"] + cache["restored_ssd_tokens"],
            restored_ram_tokens=cache["restored_ram_tokens"],
            restored_ssd_tokens=cache["restored_ssd_tokens"],
            computed_tokens=cache["computed_tokens"],
            generated_tokens=line["eval_count"],
            prefill_s=line["prompt_eval_duration"] / 1e9,
            decode_s=line["eval_duration"] / 1e9,
            first_token_s=first_s,
            peak_bytes=None,
            kv_bytes=memory["kv_bytes"],
            diverged_at=cache["diverged_at"],
            miss=Miss(**miss) if miss else None,
            shifted_tokens=cache["shifted_tokens"],
            ahead_tokens=cache.get("ahead_tokens", 0),
            ahead_saved_s=cache.get("ahead_saved_s", 0.0),
            rungs=tuple(Rung(**rung) for rung in memory["gave_way"]),
            drafts=_drafts(cache.get("drafts")),
            upper_tokens=cache.get("upper_tokens", 0),
        )
    except (KeyError, TypeError):
        return None


def _drafts(drafts: Mapping[str, Any] | None) -> DraftStats | None:
    if drafts is None:
        return None
    by = {name: (each["proposed"], each["accepted"]) for name, each in drafts["by"].items()}
    return DraftStats(drafts["passes"], drafts["proposed"], drafts["accepted"], by)
