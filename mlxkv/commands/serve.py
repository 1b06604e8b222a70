"""`mlxkv serve`, and the commands about a running server: `mlxkv ps`, `mlxkv stop`."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxkv.commands.alias import run_aliases
from mlxkv.commands.options import (
    Adapters,
    Address,
    AsJson,
    Context,
    Draft,
    DType,
    Key,
    KVType,
    takes,
)
from mlxkv.errors import InternalError, ModelNotFound, UsageError
from mlxkv.server.config import HOST, PORT

if TYPE_CHECKING:
    from mlxkv.server.client import Server
    from mlxkv.server.config import ServerConfig
    from mlxkv.store.adapters import ModelAdapters

SWITCH_S = 0.001
"""How long a thread of a server computes in Python while another one waits to; Python's own: 5 ms.
The engine's thread lets the others in some dozen times a step, and waits as often."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Of the command line; made by `takes`."""

    host: str = typer.Option(HOST, help="Address to listen on.")
    port: int = typer.Option(PORT, help="Port to listen on; 0 for a free one.")
    models: list[str] | None = typer.Option(
        None, "--model", "-m", help="Load this model at once and keep it; may be repeated."
    )
    api_keys: list[str] | None = typer.Option(
        None, "--api-key", help="Clients must send one of these; may be repeated (MLXKV_API_KEY)."
    )
    api_key_file: Path | None = typer.Option(
        None,
        metavar="FILE",
        help="A file of keys, one a line: unlike options, `ps` does not show them.",
    )
    origins: list[str] | None = typer.Option(
        None, "--origin", help="Origin of a web page that may send requests; repeatable."
    )
    hosts: list[str] | None = typer.Option(
        None, "--allow-host", help="Another name of this server; may be repeated."
    )
    media_hosts: list[str] | None = typer.Option(
        None,
        "--allow-media-from",
        metavar="HOST",
        help="Fetch pictures and sound from URLs of HOST or *.HOST; may be repeated.",
    )
    pull_hosts: list[str] | None = typer.Option(
        None,
        "--pull-host",
        metavar="HOST:PORT",
        help="Address inside the network that downloads may be redirected to; repeatable.",
    )
    strict: bool = typer.Option(
        False, "--strict", help="Refuse fields without effect here; else they are named."
    )
    aliases: list[str] | None = typer.Option(
        None, "--alias", metavar="NAME=MODEL", help="A further name of a model; may be repeated."
    )
    agent_prompts: bool = typer.Option(
        False, "--agent-prompts", help="Move what agents change behind what stays."
    )
    keep_alive: float = typer.Option(
        300.0, help="Seconds before an unused model is unloaded; negative: never."
    )
    max_queue: int = typer.Option(64, help="Requests in the queue of each API key, at most.")
    max_running: int = typer.Option(16, help="Answers of a model at a time, at most.")
    until_input_ends: bool = typer.Option(
        False, "--until-input-ends", hidden=True, help="End when stdin does."
    )
    next_turns: bool = typer.Option(
        True,
        "--next-turns/--no-next-turns",
        hidden=True,
        help="--no-next-turns is --idle-compute off.",
    )
    idle_compute: str | None = typer.Option(
        None,
        metavar="off|light|full",
        help="When idle, compute what is known of next prompts: nothing, 256 tokens an answer, "
        "or all; default: full, on battery light.",
    )
    dtype: DType = "auto"
    context: Context = None
    memory: str | None = typer.Option(
        None, help="Memory limit of all models together, such as 16GiB."
    )
    kv_type: KVType = None
    draft: Draft = None
    adapter: Adapters = None


@takes(ServeOptions)
def serve(options: ServeOptions) -> int:
    """Serve models over HTTP: the APIs of OpenAI, Ollama and Anthropic."""
    from mlxkv.base import device
    from mlxkv.base.paths import asleep_dir
    from mlxkv.base.seal import seal_of_environment
    from mlxkv.base.units import parse_bytes
    from mlxkv.engine.engine import ThreadedEngine
    from mlxkv.store.outgoing import only_public
    from mlxkv.store.resolve import resolve
    from mlxkv.store.settings import COMMAND_LINE, Given, draft_model

    device.keep_one_heap()
    o = options
    limit_bytes = parse_bytes(o.memory or os.environ.get("MLXKV_MEMORY"))
    config = _config(options, limit_bytes)
    only_public(o.pull_hosts or ())
    seal_of_environment()  # a bad key ends the command, not a request
    if (name := draft_model(o.draft)) is not None:
        resolve(name, fetch=False)
    engine = ThreadedEngine(
        memory=limit_bytes,
        dtype=o.dtype,
        given=Given(context=o.context, kv_type=o.kv_type, draft=o.draft, origin=COMMAND_LINE),
        keep_alive_s=o.keep_alive,
        max_queue=o.max_queue,
        max_running=o.max_running,
        next_turns=o.next_turns,
        asleep=asleep_dir(),
        idle_compute=o.idle_compute,
        adapters=_adapters(o.adapter or (), config.models),
    )
    if o.until_input_ends:
        _end_with_input()
    return _run(engine, config)


def _adapters(given: Sequence[str], models: Sequence[str]) -> ModelAdapters:
    """The adapters of the one model that is loaded at once, by its directory."""
    if not given:
        return {}
    from mlxkv.store.adapters import adapter_refs
    from mlxkv.store.resolve import resolve

    if len(models) != 1:
        raise UsageError(
            f"--adapter belongs to one model: give one --model with it; got {len(models)}"
        )
    return {str(resolve(models[0], fetch=False)): adapter_refs(given)}


def _config(options: ServeOptions, limit_bytes: int | None) -> ServerConfig:
    from mlxkv.base import device
    from mlxkv.server.config import ServerConfig, bodies_bytes

    o = options
    names = run_aliases(o.aliases or ())
    key = os.environ.get("MLXKV_API_KEY") if o.api_key_file is None else None
    return ServerConfig(
        host=o.host,
        port=o.port,
        api_keys=tuple(o.api_keys or filter(None, [key])),
        api_key_file=o.api_key_file,
        origins=tuple(o.origins or ()),
        hosts=tuple(o.hosts or ()),
        media_hosts=tuple(o.media_hosts or ()),
        strict=o.strict,
        agent_prompts=o.agent_prompts,
        agent_file=_agent_file() if o.agent_prompts else None,
        models=tuple(_unaliased(model, dict(names)) for model in o.models or ()),
        aliases=names,
        context=o.context,
        max_bodies_bytes=bodies_bytes(limit_bytes or device.memory_limit()),
    )


def _end_with_input() -> None:
    """End this process, as Ctrl-C does, when the process that started it has ended or wants it."""
    import threading

    def wait() -> None:
        while os.read(0, 4096):  # sys.stdin's lock, held here, would abort the exit
            pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, name="input", daemon=True).start()


def _unaliased(model: str, names: Mapping[str, str]) -> str:
    """The name of a model that may be given by an alias of this run, or a stored one."""
    from mlxkv.store.refs import unaliased

    return names.get(model) or unaliased(model)


def _agent_file() -> Path | None:
    """Where it is kept what agents' conversations were told; with the KV, or not at all."""
    from mlxkv.base.paths import kv_dir

    is_off = os.environ.get("MLXKV_KV_DISK", "").strip() == "0"
    return None if is_off else kv_dir() / "agent-prompts.json"


def _run(engine: Any, config: Any) -> int:
    import asyncio

    from mlxkv.server.app import create_app
    from mlxkv.server.edge.log_lines import log_to_stderr
    from mlxkv.server.edge.serving import Server, raise_file_limit
    from mlxkv.server.edge.stop import Later, Stop, leave

    sys.setswitchinterval(SWITCH_S)
    app = create_app(engine, config)
    log_to_stderr(lambda: app.state.api_keys.keys)
    listening = _listen(config.host, config.port)
    closing = Later(engine.close, "close")
    server = Server(
        app, config, raise_file_limit(), on_end=closing.start, on_stop=engine.put_to_sleep
    )
    stop = Stop(config.end_s)

    async def run() -> None:
        asked, loop = asyncio.Event(), asyncio.get_running_loop()
        stop.on_stop = lambda: loop.call_soon_threadsafe(asked.set)
        try:
            is_loaded = await _load(engine, config, asked)
        finally:
            stop.on_stop = server.stop
        if stop.is_asked or not is_loaded:
            return
        port = listening.getsockname()[1]
        print(f"mlxkv: listening on http://{config.host}:{port}", file=sys.stderr, flush=True)
        await app.state.wake()
        await server.serve([listening])

    stop.install()
    engine.on_failed = server.stop
    engine.start()
    try:
        asyncio.run(run())
    except RuntimeError:
        # asyncio ends its executor in a thread, which a limit of memory may not allow.
        if not stop.is_asked:
            raise
    finally:
        if app.state.state_memory is not None:
            app.state.state_memory.save()
        closing.start()
        is_closed = closing.wait(stop.left_s if stop.is_asked else None)
    leave(_code_of(engine) if is_closed else stop.code)


def _code_of(engine: Any) -> int:
    """Exit code of a server that has ended: for its supervisor, if the engine failed."""
    if not engine.failed:
        return 0
    error = InternalError("the engine has failed too often; see the log")
    print(f"mlxkv: error: {error}", file=sys.stderr)
    return error.exit_code


async def _load(engine: Any, config: Any, asked: Any) -> bool:
    """Load the operator's models; False if the process is to end meanwhile."""
    import asyncio

    stop = asyncio.ensure_future(asked.wait())
    for model in config.models:
        loading = asyncio.ensure_future(engine.load(model, keep_alive_s=-1))
        await asyncio.wait({loading, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            loading.cancel()
            return False
        await loading
        print(f"mlxkv: {model} is loaded", file=sys.stderr)
    stop.cancel()
    return True


def _listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Raises:
        UsageError: the port is taken, or the address is not this machine's.
    """
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(kind)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(128)
    except (OSError, OverflowError) as error:
        made.close()
        raise UsageError(f"--host {host} --port {port} cannot be listened on: {error}") from None
    return made


def ps(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="More columns.")] = False,
    as_json: AsJson = False,
    server: Address = None,
    api_key: Key = None,
) -> None:
    """List the models that a running server has in memory, and the answers that sleep."""
    from mlxkv.base.units import human_bytes
    from mlxkv.terminal.console import table

    stats = _server(server, api_key).ask("GET", "/stats.json")
    loaded = _loaded_in(stats)
    if as_json:
        print(json.dumps(loaded))
        return
    header = [*PS_COLUMNS, *(PS_MORE if verbose else ())]
    print(table(header, [_ps_row(model, verbose) for model in loaded]))
    for model in loaded:
        for adapter, n_bytes in model.get("adapters", ()):
            print(f"adapter: {model['name']}+{adapter} ({human_bytes(n_bytes)})")
    for name, n in stats.get("asleep", {}).items():
        print(f"asleep: {n} {'answer' if n == 1 else 'answers'} of {name}")


PS_COLUMNS = ("NAME", "SIZE", "WEIGHTS", "KV USED", "KV ALLOCATED", "SEQUENCES", "ASLEEP", "PAGES",
              "UNTIL")  # fmt: skip
PS_MORE = ("KV MAX", "KV TYPE", "PAGES ON SSD", "CONTEXT", "DEVICE", "FAMILY", "QUANTIZATION")


def _ps_row(model: Mapping[str, Any], verbose: bool) -> list[str]:
    from mlxkv.base.units import human_bytes

    row = [
        model["name"],
        human_bytes(model["size_bytes"]),
        human_bytes(model["weights_bytes"]),
        human_bytes(model["kv_used_bytes"]),
        human_bytes(model["kv_allocated_bytes"]),
        str(model["n_sequences"]),
        str(model.get("n_asleep", 0)),
        human_bytes(model["pages_ram_bytes"]),
        model["until"] or "for ever",
    ]
    if verbose:
        row += [
            human_bytes(model["kv_max_bytes"]),
            model.get("kv_type", ""),
            human_bytes(model["pages_ssd_bytes"]),
            f"{model['context']:,}",
            model["device"],
            model["family"],
            model["quantization"],
        ]
    return row


def stop(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name that `ps` shows.")],
    server: Address = None,
    api_key: Key = None,
) -> None:
    """Unload a model of a running server, when its last answer has ended."""
    running = _server(server, api_key)
    names = [loaded["name"] for loaded in _loaded(running)]
    if model not in names:
        raise ModelNotFound(f"{model} is not loaded; loaded are: {', '.join(names) or 'none'}")
    running.ask("POST", "/api/generate", {"model": model, "keep_alive": 0})
    is_here = any(loaded["name"] == model for loaded in _loaded(running))
    print(f"{model} {'is unloaded when its last answer has ended' if is_here else 'is unloaded'}")


def _loaded(server: Server) -> list[dict[str, Any]]:
    """The models that a running server has in memory."""
    return _loaded_in(server.ask("GET", "/stats.json"))


def _loaded_in(stats: dict[str, Any]) -> list[dict[str, Any]]:
    models = stats.get("models", {})
    return [{"name": name, **model["loaded"]} for name, model in models.items() if model["loaded"]]


def _server(address: str | None, key: str | None) -> Server:
    from mlxkv.server.client import Server

    return Server.at(address, key)
