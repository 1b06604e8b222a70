"""`mlxkv run`: its options, and the choice between a local and a server's model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxkv.commands import inputs
from mlxkv.commands.options import Context, DType, KVType, Memory, with_sampling
from mlxkv.commands.serve import Key
from mlxkv.errors import UsageError

if TYPE_CHECKING:
    from mlxkv.server.client import Server
    from mlxkv.store.settings import Given
    from mlxkv.terminal.backend import Speaker
    from mlxkv.terminal.files.attachments import Attachment


@with_sampling
def run(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [PROMPT]",
            help="A single argument is a MODEL if it is a model's name, a path, org/name or "
            "name:tag; otherwise it is the PROMPT for the default model (smollm2:135m).",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model; all arguments are the prompt.")
    ] = None,
    *,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-n", help="Stop after this many tokens.")
    ] = None,
    sampling: Mapping[str, Any],
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this text; may be repeated.")
    ] = None,
    think: Annotated[
        bool | None,
        typer.Option(
            "--think/--no-think",
            help="Reason before the answer, or not, if the chat template has a switch for it; "
            "reasoning goes to stderr.",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="json|FILE",
            help="The answer is JSON, or matches the JSON schema in FILE.",
        ),
    ] = None,
    files: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            "--audio",
            metavar="FILE",
            help="A picture or a recording for the model; may be repeated, the order is kept.",
        ),
    ] = None,
    mic: Annotated[
        bool, typer.Option("--mic", help="Record from the microphone first (macOS).")
    ] = False,
    image_budget: Annotated[
        int | None,
        typer.Option(
            "--image-budget",
            help="Most tokens of each picture, for Gemma 4: 70, 140, 280, 560 or 1120.",
        ),
    ] = None,
    kv_from: Annotated[
        str | None,
        typer.Option(
            "--kv-from",
            metavar="NAME",
            help="Start from KV of `mlxkv kv save NAME`, in its format.",
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue PROMPT.")] = False,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut the start of a prompt that is too long.")
    ] = False,
    context: Context = None,
    overflow: Annotated[
        str | None,
        typer.Option(help="At the context: stop, or shift: drop the oldest tokens and continue."),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(help="First tokens that a shift keeps, besides the system prompt."),
    ] = None,
    dtype: DType = "auto",
    memory: Memory = None,
    kv_type: KVType = None,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run on that server, such as 127.0.0.1:11434; load no model in this process.",
        ),
    ] = None,
    use_server: Annotated[
        bool,
        typer.Option(
            "--use-server", help="Run on the server of MLXKV_SERVER, or on this machine's."
        ),
    ] = False,
    api_key: Key = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the last chat, and an answer that had begun."),
    ] = False,
    idle_compute: Annotated[
        str | None,
        typer.Option(
            metavar="off|light|full",
            help="In a chat, compute what is known of the next prompt while you read: nothing, 256 "
            "tokens, or all; default: full, on battery light.",
        ),
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Print tokens/s, reuse and memory to stderr."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Answer PROMPT; without one, start a chat.

    Piped text is the prompt, or is appended to PROMPT.
    """
    from mlxkv.terminal import one_shot
    from mlxkv.terminal.answer_options import AnswerOptions

    asked = _asked_server(server, use_server, api_key)
    if asked is not None:
        _refuse_local(dtype, memory, kv_type, kv_from, image_budget)
    if idle_compute is not None:
        from mlxkv.engine.ahead.choice import IdleCompute

        IdleCompute(idle_compute)  # raises for a word that is none of them
    settings = AnswerOptions(
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
        truncate=truncate,
        think=think,
        format=inputs.answer_format(format),
        **sampling,
    )
    saved = inputs.saved_kv(kv_from)
    kv_type = kv_type or (saved.kv_type if saved else None)
    from mlxkv.store.settings import COMMAND_LINE, Given

    given = Given(context, kv_type, memory, overflow, keep, COMMAND_LINE)
    name, prompt = inputs.split_words(words or [], model, saved, _names_model(asked))
    piped = inputs.read_piped()
    text = inputs.join_prompt(prompt, piped)
    chat = text is None
    if chat and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError('there is no prompt: mlxkv run "PROMPT", or pipe it in')
    if resume and not chat:
        raise UsageError("--resume goes on with a chat: give no PROMPT")
    if chat and (raw or as_json):
        raise UsageError(f"{'--raw' if raw else '--json'} needs a PROMPT")
    attached = _attached(files or [], mic, asked)
    with closing(_speaker(asked, name, given, dtype)) as speaker:
        if text is None:
            from mlxkv.terminal.repl import chat as start_chat

            return start_chat(
                speaker,
                settings,
                system=system,
                verbose=verbose,
                kv_from=saved,
                resumes=resume,
                idle_compute=idle_compute,
                attached=attached,
                image_budget=image_budget,
            )
        return one_shot.one_answer(
            speaker,
            text,
            system=system,
            settings=settings,
            raw=raw,
            as_json=as_json,
            verbose=verbose,
            kv_from=saved,
            attached=attached,
            image_budget=image_budget,
        )


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


def _asked_server(address: str | None, use_server: bool, key: str | None) -> Server | None:
    """The server to run on; None for a model in this process.

    MLXKV_SERVER alone chooses no server: a variable that was set for `ps` must not send a prompt to
    another machine.

    Raises:
        UsageError: a wrong address, or a key without a server.
    """
    if address is None and not use_server:
        if key is not None:
            raise UsageError("--api-key is for a server: add --use-server, or --server ADDRESS")
        return None
    from mlxkv.server.client import Server

    return Server.at(address, key)


def _refuse_local(
    dtype: str,
    memory: str | None,
    kv_type: str | None,
    kv_from: str | None,
    image_budget: int | None,
) -> None:
    """Refuse options that a server sets when it loads its models, or that requests cannot have."""
    if image_budget is not None:
        raise UsageError("--image-budget is for a model in this process: a server's is its own")
    decided = {"--dtype": dtype != "auto", "--memory": memory, "--kv-type": kv_type}
    for option, value in decided.items():
        if value:
            raise UsageError(
                f"{option} applies when a model is loaded, which the server does: "
                f"give it to `mlxkv serve`"
            )
    if kv_from is not None:
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


def _speaker(server: Server | None, name: str, given: Given, dtype: str) -> Speaker:
    if server is None:
        from mlxkv.terminal.local import LocalSpeaker

        return LocalSpeaker.load(name, given, dtype)
    from mlxkv.terminal.remote import RemoteSpeaker

    return RemoteSpeaker(server, name, given)
