"""The last chat, for `mlxkv run --resume`: its messages, and an answer that has begun.

It lies beside the history of lines, readable by its user alone. It is written when a message is
sent, at each `EVERY` tokens of its answer and when that ends, so that a chat whose process or
terminal ended loses at most what is behind the last time. With `MLXKV_KV_KEY` set nothing is
written: it would be text in the clear.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxkv.base.durable import write_whole
from mlxkv.errors import UsageError
from mlxkv.terminal.files import media_files

if TYPE_CHECKING:
    from mlxkv.generation.asleep import Asleep
    from mlxkv.terminal.files.attachments import Content
    from mlxkv.terminal.slash_commands import Chat

EVERY = 256
"""Tokens of an answer after which the file is written again."""


def chat_file() -> Path:
    """Where the last chat is kept."""
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if state.startswith("/") else Path.home() / ".local" / "state"
    return base / "mlxkv" / "chat.json"


def keep(
    content: dict[str, Any], pending: Content | None = None, begun: Asleep | None = None
) -> None:
    """Write the chat; a failure loses no more than that.

    Args:
        content: as `/save` writes it.
        pending: the message that is being answered, as `media_files.stored_content` has it.
        begun: its answer so far, if that is known.
    """
    raw: dict[str, Any] = {**content, "pending": pending}
    if begun is not None:
        raw["begun"] = {
            "prompt": list(begun.prompt),
            "seed": begun.seed,
            "written": begun.written.to_json(),
        }
    path = chat_file()
    if os.environ.get("MLXKV_KV_KEY", "").strip():
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path, json.dumps(raw), mode=0o600)


def resume(chat: Chat, load: Any) -> tuple[Content | None, Asleep | None]:
    """Go on with the last chat.

    Args:
        chat: takes its messages and parameters.
        load: of `slash_commands`: reads a conversation's file into the chat.

    Returns:
        The message whose answer was not ended, as the file has it, and that answer so far; None
        for none.

    Raises:
        UsageError: there is no last chat, or its file is damaged.
    """
    path = chat_file()
    if not path.exists():
        raise UsageError("--resume: there is no last chat")
    load(chat, path)
    raw = json.loads(path.read_text("utf-8"))
    pending, begun = raw.get("pending"), None
    if not media_files.is_content(pending):
        return None, None
    if raw.get("model") != chat.speaker.name:
        return pending, None
    if "begun" in raw:
        from mlxkv.generation.asleep import Asleep, Written

        try:
            kept = raw["begun"]
            written = Written.from_json(kept["written"])
            begun = Asleep([int(token) for token in kept["prompt"]], int(kept["seed"]), written)
        except (ValueError, TypeError, KeyError):
            begun = None
    return pending, begun
