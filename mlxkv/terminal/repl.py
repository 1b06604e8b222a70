"""The chat of `mlxkv run` on a terminal.

Invariants:
- While an answer is written, the first Ctrl-C ends it between two tokens, so that the KV of the
  conversation stays whole; before its first token it stops the prefill at once.
- At the prompt Ctrl-C clears the line, and on an empty line says how to leave; the second one in a
  row, or Ctrl-D, leaves.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, cast

from mlxkv.base.faults import log_fault
from mlxkv.errors import MlxkvError, TemplateError, one_line
from mlxkv.terminal import last_chat
from mlxkv.terminal.answer_options import options_of
from mlxkv.terminal.backend import ComputesAhead
from mlxkv.terminal.console import ProgressLine
from mlxkv.terminal.files import media_files
from mlxkv.terminal.files.attach_commands import attach
from mlxkv.terminal.files.attachments import Attachment, Content, content, text_of
from mlxkv.terminal.files.dropped import has_path, with_files
from mlxkv.terminal.one_shot import Printer, prefill_report
from mlxkv.terminal.slash_commands import (
    COMMANDS,
    PARAMETERS,
    Chat,
    Leave,
    content_of,
    execute,
    is_command,
    load_conversation,
)
from mlxkv.terminal.spelling import RUN
from mlxkv.terminal.start import Start
from mlxkv.terminal.stats_text import describe_rungs, describe_shift, describe_stats

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.eventloop import InputHookContext

    from mlxkv.generation.asleep import Asleep
    from mlxkv.generation.outputs import Chunk
    from mlxkv.terminal.backend import Speaker, Talk

PROMPT, CONTINUED = ">>> ", "... "
QUOTES = '"""'
REWRITES = (
    "(this model's chat template rewrites earlier answers: each turn computes again from the first "
    "token that changed)\n"
)

Ask = Callable[[str], str]
"""Reads one line; raises EOFError at the end and KeyboardInterrupt at Ctrl-C."""


def chat(
    speaker: Speaker, start: Start, *, resumes: bool = False, idle_compute: str | None = None
) -> int:
    """Run a chat until the user leaves; the exit code.

    Args:
        resumes: go on with the last chat, and with an answer that had begun.
        idle_compute: see `ComputesAhead.computing_ahead`.

    Raises:
        TemplateError: the model has no chat template.
        UsageError: there is no last chat, or the model cannot take what is attached.
    """
    if not speaker.can_chat:
        raise TemplateError(
            f"{speaker.name} has no chat template (it is a base model) and cannot chat: give it a "
            "PROMPT with --raw"
        )
    state = Chat(
        speaker, start.settings, start.verbose, start.kv_from, image_budget=start.image_budget
    )
    state.begin(start.system)
    shown = attach(speaker, state.attached, start.attached)
    print(f"{speaker.title}: /? for help, /bye or Ctrl-D to leave")
    print(shown, end="")
    if resumes:
        _resume(state)
    _take_turns(state, idle_compute)
    return 0


def _take_turns(state: Chat, idle_compute: str | None) -> None:
    """Answer message after message, until the user leaves."""
    idle = _Idle()
    ask = _line_reader(idle)
    interrupts = 0
    while True:
        try:
            text = read_message(ask)
            interrupts = 0
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            interrupts += 1
            if interrupts == 2:
                return
            print("Ctrl-C once more, Ctrl-D or /bye to leave")
            continue
        idle.end()
        try:
            _turn(state, text)
            idle.begin(state.conversation, idle_compute)
        except Leave:
            return
        except MlxkvError as error:
            # Parameters have the names of `/set`; other fields are options of `mlxkv run`.
            spelled = str(error) if error.field in PARAMETERS else error.spelled(RUN)
            print(f"mlxkv: {spelled}", file=sys.stderr)
        except Exception as error:  # a bug must not cost the conversation
            text = f"unexpected {type(error).__name__}: {one_line(error)}"
            print(f"mlxkv: {text}", file=sys.stderr)


def _resume(state: Chat) -> None:
    """Go on with the last chat; an answer that had begun comes whole."""
    shown: list[str] = []
    pending, begun = last_chat.resume(
        state, lambda chat, path: shown.append(load_conversation(chat, path))
    )
    gone = "".join(shown).splitlines()[1:]
    print(f"(the last chat goes on: {len(state.conversation.messages)} messages)")
    restored = media_files.Restored()
    content = None if pending is None else restored.content(pending)
    state.paths |= restored.paths
    print(*gone, *(f"({line})" for line in restored.gone), "", sep="\n")
    if content is not None:
        print(f"{PROMPT}{text_of(content)}")
        answer(state, content, None if restored.gone else begun)


class _Idle:
    """Computes the next prompt ahead while a line is read, a step at a time between keys."""

    def __init__(self) -> None:
        self._steps: Generator[None, None, None] | None = None

    def begin(self, talk: Talk, idle_compute: str | None) -> None:
        """Have it begin at the next prompt for a line."""
        if isinstance(talk, ComputesAhead):
            self._steps = talk.computing_ahead(idle_compute)

    def end(self) -> None:
        """A line has come."""
        steps, self._steps = self._steps, None
        if steps is not None:
            steps.close()

    def __call__(self, context: InputHookContext) -> None:
        """Compute until a key is pressed, or all is done."""
        while self._steps is not None and not context.input_is_ready():
            try:
                next(self._steps)
            except StopIteration:
                self._steps = None
            except Exception as error:  # must not end the chat
                log_fault("computing the next turn failed", error)
                self._steps = None


def _turn(state: Chat, text: str) -> None:
    """Run a command, or answer a message."""
    if not text.strip():
        return
    line = text.strip()
    if line.startswith("/") and "\n" not in line and (is_command(line) or not has_path(line)):
        print(execute(state, line), end="")
        return
    message = state.attached + with_files(state.speaker, text)
    attached = [part for part in message if isinstance(part, Attachment)]
    for part in attached:
        print(f"(with {part})")
    state.attached = []
    state.paths |= {part.digest: part.path for part in attached if part.path}
    answer(state, content(message, state.image_budget))


def answer(state: Chat, text: Content, begun: Asleep | None = None) -> None:
    """Stream the answer to one message, or the whole of one that had begun."""
    stats, error, printer = None, None, Printer()
    progress, options = ProgressLine(), options_of(state.effective)
    if begun is not None:
        options["asleep"] = begun
    chat_so_far, n_tokens = content_of(state), 0
    pending = media_files.stored_content(text, state.paths)
    last_chat.keep(chat_so_far, pending, begun)
    chunks = state.conversation.send(text, on_progress=prefill_report(progress), **options)
    # Closed at once, not when it is collected: that adds the answer so far to the conversation.
    with _interrupts() as interrupted, closing(cast("Generator[Chunk]", chunks)):
        try:
            for chunk in chunks:
                progress.clear()
                printer(chunk)
                stats, error = chunk.stats or stats, chunk.error
                n_tokens += 1
                if n_tokens % last_chat.EVERY == 0:
                    last_chat.keep(chat_so_far, pending, state.conversation.begun)
                interrupted.in_decode = True
                if interrupted.seen:
                    break
        except KeyboardInterrupt:
            interrupted.seen = True
        finally:
            progress.clear()
            printer.end()
    last_chat.keep(content_of(state))
    print("\n" if printer.wrote else "")
    if state.conversation.append_only is False and not state.told:
        state.told = True
        print(REWRITES, file=sys.stderr)
    if stats is not None and stats.shifted_tokens != state.dropped:
        state.dropped = stats.shifted_tokens
        if state.dropped:
            print(f"({describe_shift(stats, state.speaker.context)})\n", file=sys.stderr)
    for line in describe_rungs(stats.rungs) if stats is not None else ():
        print(f"({line})\n", file=sys.stderr)
    if error is not None:
        print(f"(the answer ends here: {error.spelled(RUN)})\n", file=sys.stderr)
    if interrupted.seen:
        print("(stopped)\n")
    elif state.verbose and stats is not None:
        print(f"{describe_stats(stats)}\n", file=sys.stderr)


class _Interrupted:
    """Whether Ctrl-C was pressed, and whether the answer has begun."""

    seen = False
    in_decode = False


@contextmanager
def _interrupts() -> Iterator[_Interrupted]:
    """Turn Ctrl-C into a flag once the answer has begun; the second one raises."""
    state = _Interrupted()

    def handle(number: int, frame: FrameType | None) -> None:
        if state.seen or not state.in_decode:
            raise KeyboardInterrupt
        state.seen = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield state
    finally:
        signal.signal(signal.SIGINT, before)


def read_message(ask: Ask) -> str:
    '''One message: a line, or the lines between `"""` and `"""`.'''
    line = ask(PROMPT)
    start = line.lstrip()
    if not start.startswith(QUOTES):
        return line
    rest = start[len(QUOTES) :]
    if rest.rstrip().endswith(QUOTES):
        return rest.rstrip()[: -len(QUOTES)]
    lines = [rest]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(ask(CONTINUED))
    lines[-1] = lines[-1].rstrip()[: -len(QUOTES)]
    return "\n".join(lines).strip("\n")


def history_file() -> Path | None:
    """The file with the lines of earlier chats; None if it cannot be written."""
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if state.startswith("/") else Path.home() / ".local" / "state"
    path = base / "mlxkv" / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return None
    return path if os.access(path, os.W_OK) else None


def _line_reader(idle: _Idle) -> Ask:
    """prompt_toolkit's editor, or plain input on a terminal that cannot do more."""
    if os.environ.get("TERM", "dumb") in ("dumb", "unknown", ""):
        return input
    session = _editor()
    return lambda prompt: session.prompt(prompt, inputhook=idle)


def _editor() -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    from mlxkv.terminal.completion import Completions

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    path = history_file()
    return PromptSession(
        history=FileHistory(str(path)) if path else InMemoryHistory(),
        key_bindings=keys,
        prompt_continuation=CONTINUED,
        enable_history_search=False,
        completer=Completions(COMMANDS),
        complete_while_typing=False,
    )
