"""The commands of the chat. Each returns the text to print."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxkv.base import durable, regular
from mlxkv.errors import OutputError, UsageError
from mlxkv.terminal.answer_options import SAMPLING, AnswerOptions, with_defaults
from mlxkv.terminal.files import attach_commands, media_files
from mlxkv.terminal.files.attachments import AUDIO, IMAGE, Attachment
from mlxkv.terminal.stats_text import describe_memory

if TYPE_CHECKING:
    from mlxkv.saved_kv.manifest import NamedKV
    from mlxkv.terminal.backend import Speaker, Talk

FORMAT = "mlxkv conversation"
PARAMETERS: dict[str, Callable[[str], Any]] = {
    **{name: parameter.kind for name, parameter in SAMPLING.items()},
    "max_tokens": int,
    "stop": lambda text: (text,) if text else (),
}
THINK: dict[str, bool | str | None] = {
    "on": True,
    "off": False,
    "low": "low",
    "medium": "medium",
    "high": "high",
    "default": None,
}
# Small models repeat themselves without one; Ollama's default is the same.
CHAT_REPEAT_PENALTY = 1.1
HELP = '''\
/set                          show the settings
/set parameter NAME VALUE     {names}
/set system "TEXT"            set the system prompt and start a new conversation
/set think HOW                reason before an answer: on, off, low, medium, high,
                              default
/set verbose, /set quiet      print speed and memory after an answer, or not
/show [model|system|parameters|memory]
/save FILE                    write the conversation
/load FILE or MODEL           continue a saved conversation, or change the model
/image FILE, /audio FILE      give the next message a picture or a recording, as a path
                              does that is dropped on the terminal, or pasted
/mic                          record the next message, or a part of it (macOS)
/clear                        forget the conversation
/bye                          leave (so does Ctrl-D)
/?                            this

"""                           begins a message of several lines, and ends it
Alt-Enter                     a new line in a message
Tab                           completes a command, or the path of its file
Ctrl-C                        stops an answer; clears the line
'''


class Leave(Exception):
    """The user wants to leave."""


@dataclass
class Chat:
    """The state of a chat.

    Attributes:
        settings: options of answers that the user has set.
        verbose: print figures after an answer.
        kv_from: saved KV that conversations start from.
        told: it was printed that the template rewrites earlier answers.
        dropped: tokens dropped at the context, as last printed.
        attached: pictures and recordings of the next message.
        image_budget: most tokens of each picture; None for the model's own choice.
        paths: SHA-256 of the files that messages have -> their paths.
    """

    speaker: Speaker
    settings: AnswerOptions
    verbose: bool = False
    kv_from: NamedKV | None = None
    conversation: Talk = field(init=False)
    system: str | None = field(default=None, init=False)
    told: bool = field(default=False, init=False)
    dropped: int = field(default=0, init=False)
    attached: list[Attachment] = field(default_factory=list, init=False)
    image_budget: int | None = None
    paths: dict[str, str] = field(default_factory=dict, init=False)

    @property
    def effective(self) -> AnswerOptions:
        """The settings, with defaults for unset ones."""
        return with_defaults(self.settings, self.speaker.recommended, CHAT_REPEAT_PENALTY)

    def begin(self, system: str | None) -> None:
        """Start a conversation."""
        self.system, self.told = system, False
        self.conversation = self.speaker.conversation(system, self.kv_from)


def is_command(line: str) -> bool:
    """Whether a line that starts with a slash is one, and not a path."""
    return line.partition(" ")[0] in COMMANDS


def execute(chat: Chat, line: str) -> str:
    """Run a line that starts with a slash; the text to print, newline included.

    Raises:
        Leave: the user wants to leave.
        UsageError: no such command, or not what it takes.
    """
    name, _, rest = line.partition(" ")
    action = COMMANDS.get(name)
    if action is None:
        raise UsageError(f"no command {name!r}; /? lists what there is")
    text = action(chat, rest.strip())
    return f"{text}\n" if text and not text.endswith("\n") else text


def _leave(chat: Chat, rest: str) -> str:
    raise Leave


def _help(chat: Chat, rest: str) -> str:
    names = textwrap.fill(", ".join(PARAMETERS), 48).replace("\n", "\n" + " " * 30)
    return HELP.format(names=names)


def _clear(chat: Chat, rest: str) -> str:
    chat.conversation.clear()
    chat.attached.clear()
    return "the conversation is forgotten"


def _image(chat: Chat, rest: str) -> str:
    return attach_commands.file(chat.speaker, chat.attached, rest, IMAGE)


def _audio(chat: Chat, rest: str) -> str:
    return attach_commands.file(chat.speaker, chat.attached, rest, AUDIO)


def _mic(chat: Chat, rest: str) -> str:
    return attach_commands.mic(chat.speaker, chat.attached)


def _set(chat: Chat, rest: str) -> str:
    what, _, value = rest.partition(" ")
    value = value.strip()
    match what:
        case "":
            return _show_parameters(chat)
        case "verbose" | "quiet":
            chat.verbose = what == "verbose"
            return "figures after each answer" if chat.verbose else "no figures"
        case "think" | "nothink":
            return _set_think(chat, value if what == "think" else "off")
        case "system":
            if not value:
                raise UsageError('/set system takes the text: /set system "You are brief."')
            chat.system = _unquoted(value)
            chat.conversation.set_system(chat.system)
            chat.conversation.clear()
            return "the system prompt is set; a new conversation starts"
        case "parameter":
            what, _, value = value.partition(" ")
    return _set_parameter(chat, what, value.strip())


def _set_think(chat: Chat, value: str) -> str:
    if value not in ("", *THINK):
        raise UsageError(f"/set think takes {', '.join(THINK)}; got {value!r}")
    think = THINK[value or "on"]
    if think is not None:
        chat.speaker.check_thinking(think)
    chat.settings = replace(chat.settings, think=think)
    return f"think = {value or 'on'}"


def _set_parameter(chat: Chat, name: str, value: str) -> str:
    parse = PARAMETERS.get(name)
    if parse is None:
        raise UsageError(
            f"/set knows parameter, system, think, verbose and quiet, and the parameters "
            f"{', '.join(PARAMETERS)}; got {name!r}"
        )
    try:
        parsed = None if value in ("", "none", "default") else parse(_unquoted(value))
    except ValueError:
        raise UsageError(f"{name} takes a number; got {value!r}") from None
    if name == "stop" and parsed is None:
        parsed = ()
    chat.settings = replace(chat.settings, **{name: parsed})
    return f"{name} = {'default' if parsed is None else parsed}"


def _unquoted(text: str) -> str:
    """The text without the quotes around it; with escapes read as a shell reads them."""
    if len(text) >= 6 and text.startswith('"""') and text.endswith('"""'):
        return text[3:-3]
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return text


def _show(chat: Chat, rest: str) -> str:
    parts = {
        "model": _show_model,
        "system": lambda c: c.system or "no system prompt",
        "parameters": _show_parameters,
        "memory": _show_memory,
    }
    if rest in parts:
        return parts[rest](chat)
    if rest:
        raise UsageError(f"/show takes {', '.join(parts)} or nothing; got {rest!r}")
    return "\n".join((_show_model(chat), _show_parameters(chat), _show_memory(chat)))


def _show_model(chat: Chat) -> str:
    return "\n".join(f"{name:<16} {value}" for name, value in chat.speaker.about())


def _show_parameters(chat: Chat) -> str:
    lines = []
    for name in PARAMETERS:
        value = getattr(chat.settings, name)
        if value in (None, ()):
            default = getattr(chat.effective, name)
            shown = "default" if default in (None, ()) else f"{default} (default)"
        else:
            shown = ", ".join(map(repr, value)) if isinstance(value, tuple) else value
        lines.append(f"{name:<16} {shown}")
    lines.append(f"{'system':<16} {chat.system or 'none'}")
    lines.append(f"{'think':<16} {next(k for k, v in THINK.items() if v == chat.settings.think)}")
    lines.append(f"{'verbose':<16} {'yes' if chat.verbose else 'no'}")
    return "\n".join(lines)


def _show_memory(chat: Chat) -> str:
    memory = chat.speaker.memory()
    if memory is None:
        return "the memory is the server's: `mlxkv ps` shows it"
    return describe_memory(memory)


def _save(chat: Chat, rest: str) -> str:
    path = _file(rest, "/save")
    if path.exists():
        _read(path)  # only a conversation may be written over
    content = content_of(chat)
    try:
        durable.write_whole(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from error
    return f"{len(chat.conversation.messages)} messages in {path}"


def content_of(chat: Chat) -> dict[str, Any]:
    """A chat as `/save` writes it."""
    messages = chat.conversation.messages
    return {
        "format": FORMAT,
        "version": media_files.VERSION if media_files.has_media(messages) else 1,
        "model": chat.speaker.name,
        "parameters": {name: getattr(chat.settings, name) for name in PARAMETERS},
        "messages": media_files.stored(messages, chat.paths),
    }


def _load(chat: Chat, rest: str) -> str:
    path = _file(rest, "/load")
    if path.is_file() and path.suffix != ".gguf":
        return load_conversation(chat, path)
    # Without such a file it may be a model's name, but not with this ending.
    if path.suffix == ".json":
        raise UsageError(f"{path}: no such file")
    speaker = chat.speaker.other(rest)
    if not speaker.can_chat:
        speaker.close()
        raise UsageError(f"{rest} has no chat template (it is a base model) and cannot chat")
    chat.speaker.close()
    chat.speaker, chat.kv_from = speaker, None
    chat.begin(chat.system)
    return f"{rest} is loaded; a new conversation starts"


def load_conversation(chat: Chat, path: Path) -> str:
    """Continue a conversation that `/save` wrote; what to print."""
    content, restored = _read(path), media_files.Restored()
    settings, (system, turns) = _parameters_of(content, path), _messages_of(content, path)
    turns = [{**turn, "content": restored.content(turn["content"])} for turn in turns]
    settings = replace(settings, think=chat.settings.think, format=chat.settings.format)
    chat.settings, chat.kv_from = settings, None  # the file has all messages
    chat.begin(system)
    chat.conversation.restore_turns(turns)
    chat.paths |= restored.paths
    text = f"{len(chat.conversation.messages)} messages"
    model = content.get("model")
    if model != chat.speaker.name:
        text += f"; they were made with {model}, this is {chat.speaker.name}"
    return "\n".join([text, *(f"({line})" for line in restored.gone)])


def _read(path: Path) -> dict[str, Any]:
    """The JSON of a saved conversation; UsageError for another file."""
    try:
        content = json.loads(regular.read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise UsageError(f"{path} is not a conversation that /save wrote ({reason})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"{path} is not a conversation that /save wrote")
    if content.get("version") not in (1, media_files.VERSION):
        raise UsageError(f"{path}: version {content.get('version')!r} is not known; 1 and 2 are")
    return content


def _parameters_of(content: dict[str, Any], path: Path) -> AnswerOptions:
    raw = content.get("parameters", {})
    if not isinstance(raw, dict) or not raw.keys() <= PARAMETERS.keys():
        raise UsageError(f"{path}: key 'parameters' must hold only {', '.join(PARAMETERS)}")
    stop = raw.get("stop") or ()
    if not isinstance(stop, list | tuple) or not all(isinstance(text, str) for text in stop):
        raise UsageError(f"{path}: key 'stop' must be a list of texts")
    n = raw.get("max_tokens")
    if n is not None and type(n) is not int:
        raise UsageError(f"{path}: key 'max_tokens' must be a whole number; got {n!r}")
    return AnswerOptions(**{**raw, "stop": tuple(stop)})


def _messages_of(content: dict[str, Any], path: Path) -> tuple[str | None, list[dict[str, Any]]]:
    """The system prompt, and the turns of user and assistant."""
    messages = content.get("messages")
    if not isinstance(messages, list):
        raise UsageError(f"{path}: key 'messages' must be a list")
    turns = []
    for i, message in enumerate(messages):
        known = isinstance(message, dict) and message.get("role") in ("system", "user", "assistant")
        if not known or not media_files.is_content(message.get("content")):
            raise UsageError(
                f"{path}: messages[{i}] must have a role (system, user, assistant) and a text "
                "as content, or parts: texts and files"
            )
        if message["role"] != "user" and not isinstance(message["content"], str):
            raise UsageError(f"{path}: messages[{i}]: only the user's messages may have files")
        if message["role"] == "system" and i > 0:
            raise UsageError(f"{path}: messages[{i}]: only the first message may be the system's")
        turn = {"role": message["role"], "content": message["content"]}
        if isinstance(message.get("reasoning_content"), str):
            turn["reasoning_content"] = message["reasoning_content"]
        turns.append(turn)
    if turns and turns[0]["role"] == "system":
        return turns[0]["content"], turns[1:]
    return None, turns


def _file(text: str, command: str) -> Path:
    try:
        words = shlex.split(text)
    except ValueError:
        words = [text]
    if len(words) != 1:
        raise UsageError(f"{command} takes one name; got {text!r}")
    return Path(words[0]).expanduser()


COMMANDS: dict[str, Callable[[Chat, str], str]] = {
    "/?": _help,
    "/help": _help,
    "/bye": _leave,
    "/exit": _leave,
    "/quit": _leave,
    "/clear": _clear,
    "/image": _image,
    "/audio": _audio,
    "/mic": _mic,
    "/set": _set,
    "/show": _show,
    "/save": _save,
    "/load": _load,
}
