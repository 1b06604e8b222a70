"""`mlxkv run`: its options, and the choice between a local and a server's model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mlxkv.commands import inputs
from mlxkv.commands.options import Adapters, Context, Draft, DType, Key, KVType, Memory, takes
from mlxkv.errors import UsageError
from mlxkv.terminal.answer_options import AnswerOptions
from mlxkv.terminal.start import Start

if TYPE_CHECKING:
    from mlxkv.saved_kv.manifest import NamedKV
    from mlxkv.server.client import Server
    from mlxkv.store.settings import Given
    from mlxkv.terminal.backend import Speaker
    from mlxkv.terminal.files.attachments import Attachment


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Of the command line; made by `takes`."""

    words: list[str] | None = typer.Argument(
        None,
        metavar="[MODEL] [PROMPT]",
        help="A single argument is a MODEL if it is a model's name, a path, org/name or "
        "name:tag; otherwise it is the PROMPT for the default model (smollm2:135m).",
    )
    model: str | None = typer.Option(
        None, "--model", "-m", help="The model; all arguments are the prompt."
    )
    max_tokens: int | None = typer.Option(
        None, "--max-tokens", "-n", help="Stop after this many tokens."
    )
    sampling: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = typer.Option(None, help="The system prompt.")
    stop: list[str] | None = typer.Option(None, help="Stop before this text; may be repeated.")
    think: bool | None = typer.Option(
        None,
        "--think/--no-think",
        help="Reason before the answer, or not, if the chat template has a switch for it; "
        "reasoning goes to stderr.",
    )
    format: str | None = typer.Option(
        None,
        "--format",
        metavar="json|FILE",
        help="The answer is JSON, or matches the JSON schema in FILE.",
    )
    files: list[str] | None = typer.Option(
        None,
        "--image",
        "--audio",
        metavar="FILE",
        help="A picture or a recording for the model; may be repeated, the order is kept.",
    )
    mic: bool = typer.Option(False, "--mic", help="Record from the microphone first (macOS).")
    image_budget: int | None = typer.Option(
        None,
        "--image-budget",
        help="Most tokens of each picture, for Gemma 4: 70, 140, 280, 560 or 1120.",
    )
    kv_from: str | None = typer.Option(
        None,
        "--kv-from",
        metavar="NAME",
        help="Start from KV of `mlxkv kv save NAME`, in its format.",
    )
    raw: bool = typer.Option(False, "--raw", help="No chat template: continue PROMPT.")
    truncate: bool = typer.Option(
        False, "--truncate", help="Cut the start of a prompt that is too long."
    )
    context: Context = None
    overflow: str | None = typer.Option(
        None, help="At the context: stop, or shift: drop the oldest tokens and continue."
    )
    keep: int | None = typer.Option(
        None, help="First tokens that a shift keeps, besides the system prompt."
    )
    dtype: DType = "auto"
    memory: Memory = None
    kv_type: KVType = None
    draft: Draft = None
    adapter: Adapters = None
    server: str | None = typer.Option(
        None,
        metavar="ADDRESS",
        help="Run on that server, such as 127.0.0.1:11434; load no model in this process.",
    )
    use_server: bool = typer.Option(
        False, "--use-server", help="Run on the server of MLXKV_SERVER, or on this machine's."
    )
    api_key: Key = None
    resume: bool = typer.Option(
        False, "--resume", help="Go on with the last chat, and an answer that had begun."
    )
    idle_compute: str | None = typer.Option(
        None,
        metavar="off|light|full",
        help="In a chat, compute what is known of the next prompt while you read: nothing, 256 "
        "tokens, or all; default: full, on battery light.",
    )
    verbose: bool = typer.Option(
        False, "--verbose", "-v", help="Print tokens/s, reuse and memory to stderr."
    )
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object.")


@takes(RunOptions)
def run(options: RunOptions) -> int:
    """Answer PROMPT; without one, start a chat.

    Piped text is the prompt, or is appended to PROMPT.
    """
    asked = _asked_server(options)
    if asked is not None:
        _refuse_local(options)
    settings = _settings(options)
    saved = inputs.saved_kv(options.kv_from)
    wanted, names_model = options.model, _names_model(asked)
    name, prompt = inputs.split_words(options.words or [], wanted, saved, names_model)
    text = inputs.join_prompt(prompt, inputs.read_piped())
    _check_prompt(options, text)
    attached = _attached(options.files or [], options.mic, asked)
    start = Start(settings, options.system, options.verbose, saved, attached, options.image_budget)
    given = _given(options, saved)
    with closing(_speaker(asked, name, given, options.dtype, options.adapter)) as speaker:
        if text is None:
            from mlxkv.terminal.repl import chat

            return chat(speaker, start, resumes=options.resume, idle_compute=options.idle_compute)
        from mlxkv.terminal.one_shot import one_answer

        return one_answer(speaker, text, start, raw=options.raw, as_json=options.as_json)


def _settings(options: RunOptions) -> AnswerOptions:
    if options.idle_compute is not None:
        from mlxkv.engine.ahead.choice import IdleCompute

        IdleCompute(options.idle_compute)  # raises for a word that is none of them
    return AnswerOptions(
        max_tokens=options.max_tokens,
        stop=tuple(options.stop or ()),
        truncate=options.truncate,
        think=options.think,
        format=inputs.answer_format(options.format),
        **options.sampling,
    )


def _given(options: RunOptions, saved: NamedKV | None) -> Given:
    from mlxkv.store.settings import COMMAND_LINE, Given

    kv_type = options.kv_type or (saved.kv_type if saved else None)
    o = options
    return Given(o.context, kv_type, o.memory, o.overflow, o.keep, COMMAND_LINE, o.draft)


def _check_prompt(options: RunOptions, text: str | None) -> None:
    """Refuse a chat that no person can lead, and options that need a prompt, or none."""
    if text is not None:
        if options.resume:
            raise UsageError("--resume goes on with a chat: give no PROMPT")
        return
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError('there is no prompt: mlxkv run "PROMPT", or pipe it in')
    if options.raw or options.as_json:
        raise UsageError(f"{'--raw' if options.raw else '--json'} needs a PROMPT")


def _attached(files: Sequence[str], mic: bool, server: Server | None) -> list[Attachment]:
    """Pictures and recordings, read before a model is loaded for them.

    Before they are sent to a server they are decoded: its errors have no names of files.
    """
    if not (files or mic):
        return []
    from mlxkv.terminal.files import attachments

    recorded = [attachments.recorded()] if mic else []
    read = attachments.read if server is None else attachments.checked
    return [*(read(Path(file)) for file in files), *recorded]


def _asked_server(options: RunOptions) -> Server | None:
    """The server to run on; None for a model in this process.

    MLXKV_SERVER alone chooses no server: a variable that was set for `ps` must not send a prompt to
    another machine.

    Raises:
        UsageError: a wrong address, or a key without a server.
    """
    if options.server is None and not options.use_server:
        if options.api_key is not None:
            raise UsageError("--api-key is for a server: add --use-server, or --server ADDRESS")
        return None
    from mlxkv.server.client import Server

    return Server.at(options.server, options.api_key)


def _refuse_local(options: RunOptions) -> None:
    """Refuse options that a server sets when it loads its models, or that requests cannot have."""
    if options.image_budget is not None:
        raise UsageError("--image-budget is for a model in this process: a server's is its own")
    o = options
    decided = {"--dtype": o.dtype != "auto", "--memory": o.memory, "--kv-type": o.kv_type}
    for option, value in decided.items():
        if value:
            raise UsageError(
                f"{option} applies when a model is loaded, which the server does: "
                f"give it to `mlxkv serve`"
            )
    if options.adapter:
        raise UsageError("--adapter is for a model in this process: a server loads its own")
    if options.kv_from is not None:
        raise UsageError(
            "--kv-from is KV on this machine, which a server cannot use; a server restores shared "
            "prefixes without names"
        )


def _names_model(server: Server | None) -> Callable[[str], bool]:
    if server is None:
        from mlxkv.store.refs import looks_like_model

        return looks_like_model
    from mlxkv.terminal.remote import names_model

    return names_model(server)


def _speaker(
    server: Server | None,
    name: str,
    given: Given,
    dtype: str,
    adapters: Sequence[str] | None,
) -> Speaker:
    if server is None:
        from mlxkv.terminal.local import LocalSpeaker

        return LocalSpeaker.load(name, given, dtype, adapters or ())
    from mlxkv.terminal.remote import RemoteSpeaker

    return RemoteSpeaker(server, name, given)
