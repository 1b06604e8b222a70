"""`mlxkv kv`: KV that is kept under a name, and the formats that KV is kept in."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxkv.commands.options import AsJson, DType, Memory, Model, takes

if TYPE_CHECKING:
    from mlxkv.saved_kv.registry import KVNames

app = typer.Typer(
    name="kv",
    help="Compute a prompt once and start many answers from it; choose KV formats.",
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A name; `mlxkv kv ls` lists them.")]
ItsModel = Annotated[
    str | None, typer.Option("--model", "-m", help="Its model; default: the one it names.")
]


def _names() -> KVNames:
    from mlxkv.base.paths import kv_dir
    from mlxkv.saved_kv.registry import KVNames

    return KVNames(kv_dir())


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """Of the command line; made by `takes`."""

    name: str = typer.Argument(..., metavar="NAME", help="A name of your choice.")
    sources: list[str] | None = typer.Argument(
        None,
        metavar="(PROMPT | FILE...)",
        help="Files and folders, or a text; piped text is appended.",
    )
    model: str | None = typer.Option(
        None, "--model", "-m", help="The model; default: smollm2:135m."
    )
    raw: bool = typer.Option(False, "--raw", help="A text to continue, not the start of a chat.")
    pin: bool = typer.Option(False, "--pin", help="Never evict it.")
    dtype: DType = "auto"
    memory: Memory = None
    kv_type: str | None = typer.Option(None, help="Format of the KV: native, q8, k8v4 or q4.")
    context: int | None = typer.Option(
        None, help="Context that it must leave room in; default: as for `run`."
    )


@app.command()
@takes(SaveOptions)
def save(options: SaveOptions) -> int:
    """Compute a prompt, a file or a whole folder once, and keep its KV.

    A folder means its text files, and the pictures and recordings that the model takes.

    `mlxkv run --kv-from NAME "..."` starts from it.
    """
    from mlxkv.base.units import human_bytes
    from mlxkv.commands import inputs
    from mlxkv.store import catalog
    from mlxkv.store.settings import COMMAND_LINE, Given
    from mlxkv.terminal.console import ProgressLine
    from mlxkv.terminal.local import load_model
    from mlxkv.terminal.one_shot import prefill_report

    o, name = options, options.name
    pieces = inputs.pieces(o.sources or [])
    wanted = o.model or catalog.DEFAULT.name
    given = Given(o.context, o.kv_type, o.memory, origin=COMMAND_LINE)
    progress = ProgressLine()
    with load_model(wanted, o.dtype, given) as llm:
        content = inputs.content(pieces, () if o.raw else llm.media.kinds)
        # Templates write the media of users' messages.
        role = "system" if isinstance(content, str) else "user"
        prompt = content if o.raw else [{"role": role, "content": content}]
        try:
            saved = llm.save_kv(name, prompt, model=wanted, on_progress=prefill_report(progress))
        finally:
            progress.clear()
    names = _names()
    if o.pin:
        names.pin(name)
    size = human_bytes(names.nbytes(saved))
    print(f"saved {name}: {saved.n_tokens:,} tokens of {wanted}, {size}")
    return 0


@app.command("ls")
def ls(as_json: AsJson = False) -> None:
    """List the saved names, and the size of all KV on disk."""
    import json

    from mlxkv.terminal.saved_kv_text import summary_dict, summary_text

    print(json.dumps(summary_dict(_names())) if as_json else summary_text(_names()))


app.command("list", hidden=True)(ls)


@app.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Show one name: its model, text and size."""
    import json

    from mlxkv.terminal.saved_kv_text import card_dict, card_text

    names = _names()
    saved = names.load(name)
    print(json.dumps(card_dict(names, saved)) if as_json else card_text(names, saved))


@app.command()
def rm(name: Name) -> None:
    """Remove a name; its KV is evicted when its space is needed (see `mlxkv kv gc`)."""
    _names().remove(name)
    print(f"removed {name}")


@app.command()
def pin(name: Name) -> None:
    """Never evict it."""
    _names().pin(name)
    print(f"pinned {name}")


@app.command()
def unpin(name: Name) -> None:
    """Allow its eviction, after all KV without a name."""
    _names().unpin(name)
    print(f"unpinned {name}")


@app.command()
def gc() -> None:
    """Check every page; remove leftovers, damaged files, and pages over the cap."""
    from mlxkv.base.paths import kv_dir
    from mlxkv.saved_kv.gc import gc as collect
    from mlxkv.terminal.saved_kv_text import gc_text

    print(gc_text(collect(kv_dir())))


@app.command()
def export(
    name: Name,
    file: Annotated[str, typer.Argument(metavar="FILE", help="The file to write.")],
    sign: Annotated[
        str | None, typer.Option(metavar="KEYFILE", help="Sign it, in FILE.sig; see `kv keygen`.")
    ] = None,
) -> None:
    """Write a name and its KV into one file."""
    from mlxkv.base.units import human_bytes
    from mlxkv.llm import imported_kv
    from mlxkv.saved_kv import signature

    path = Path(file)
    key = None if sign is None else signature.private_key(Path(sign))
    imported_kv.export(name, path)
    signed = "" if key is None else f", signed in {signature.sign(path, key)}"
    print(f"{path}: {human_bytes(path.stat().st_size)}{signed}")


@app.command()
def keygen(
    file: Annotated[str, typer.Argument(metavar="KEYFILE", help="The private key's file.")],
) -> None:
    """Make a key to sign exports with; KEYFILE.pub is for those who import them."""
    from mlxkv.saved_kv.signature import make_keys

    print(f"keep {file} to yourself; give {make_keys(Path(file))} to those who import")


@app.command("import")
def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="From `mlxkv kv export`.")],
    name: Annotated[str | None, typer.Option(help="Another name for it.")] = None,
    model: ItsModel = None,
    check: Annotated[
        bool, typer.Option("--verify", help="Compute the first, the last and two other pages now.")
    ] = False,
    trust: Annotated[
        list[str] | None,
        typer.Option(metavar="PUBKEY", help="Trust what this key has signed; may be repeated."),
    ] = None,
) -> None:
    """Import a name and its KV from a file, if it belongs to the model on this machine.

    Its KV serves no prompts until a part of it was computed here and is the same, or a key that
    `--trust` names has signed it.
    """
    from mlxkv.llm.imported_kv import import_file

    saved = import_file(Path(file), name, model, [Path(key) for key in trust or ()])
    print(f"imported {saved.name}: {saved.n_tokens:,} tokens of {saved.model}", file=sys.stdout)
    if saved.quarantine and saved.media:
        print(
            f"{saved.name} has pictures or sound, whose content is not in the file: its KV cannot "
            "be computed here and compared, and is used only if --trust PUBKEY takes it",
            file=sys.stderr,
        )
    if check:
        _verify(saved.name, model, memory=None, sample=True)


@app.command()
def verify(
    name: Name,
    model: ItsModel = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="Compute the first, the last and two other pages only.")
    ] = False,
    memory: Memory = None,
) -> None:
    """Compute a name's prompt again and compare its KV; an import that passes is trusted."""
    _verify(name, model, memory, sample)


def _verify(name: str, model: str | None, memory: str | None, sample: bool) -> None:
    from mlxkv.store.settings import COMMAND_LINE, Given
    from mlxkv.terminal.console import ProgressLine
    from mlxkv.terminal.local import load_model
    from mlxkv.terminal.one_shot import prefill_report
    from mlxkv.terminal.saved_kv_text import check_text

    saved = _names().load(name)
    given = Given(None, saved.kv_type, memory, origin=COMMAND_LINE)
    progress = ProgressLine()
    with load_model(model or saved.model, saved.dtype, given) as llm:
        try:
            report = llm.verify_kv(name, full=not sample, on_progress=prefill_report(progress))
        finally:
            progress.clear()
    print(check_text(report))
    if not report.passed:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """Of the command line; made by `takes`."""

    model: Model
    budget: float = typer.Option(
        0.35, help="Bytes of the KV, as a part of those of native 16-bit KV."
    )
    context: int | None = typer.Option(
        None, help="Tokens at which bytes are counted; default: the model's context."
    )
    text: Path | None = typer.Option(
        None, metavar="FILE", help="The text to measure on; default: modules of mlxkv."
    )
    positions: int = typer.Option(256, help="Tokens of the text that are compared.")
    write: bool = typer.Option(False, "--write", help="Write it to the model's mlxkv.json.")
    dtype: DType = "auto"
    memory: Memory = None
    as_json: AsJson = False


@app.command()
@takes(TuneOptions)
def tune(options: TuneOptions) -> int:
    """Find a KV format for each layer, from what each costs on a text.

    Prints the formats that cost the least at the budget, as mlxkv.json has them.
    """
    import json

    from mlxkv.bench import kv_tune
    from mlxkv.store.settings import COMMAND_LINE, Given
    from mlxkv.terminal.console import ProgressLine
    from mlxkv.terminal.local import load_model

    o = options
    given = Given(None, "native", o.memory, origin=COMMAND_LINE)
    text = kv_tune.calibration_text(o.text)
    progress = ProgressLine()
    with load_model(o.model, o.dtype, given) as llm:
        try:
            tuned = kv_tune.tune(
                llm, o.budget, o.context, text, o.positions,
                lambda done, n_all: progress(f"measured {done} of {n_all}"),
            )  # fmt: skip
        finally:
            progress.clear()
        file = kv_tune.write(llm.path, tuned) if o.write else None
    print(json.dumps(kv_tune.to_dict(tuned)) if o.as_json else kv_tune.to_text(tuned))
    if file is not None:
        print(f"written to {file}", file=sys.stderr)
    return 0
