"""Commands about models: `mlxkv pull`, `list`, `show`, `rm`, `plan` and `models`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from mlxkv.commands.options import Adapters, AsJson, Draft, DType, KVType, Memory, Model


def pull(model: Model) -> None:
    """Fetch a model."""
    from mlxkv.store import catalog, resolve
    from mlxkv.terminal.console import ProgressLine

    progress = ProgressLine(plain=True)
    try:
        path = resolve.pull(model, report=progress)
    finally:
        progress.clear()
    entry = catalog.find(model)
    if entry is not None and entry.notice:
        print(entry.notice, file=sys.stderr)
    print(path)


def list_(as_json: AsJson = False) -> None:
    """List the models on this machine."""
    from dataclasses import asdict

    from mlxkv.base.units import human_bytes
    from mlxkv.store import library
    from mlxkv.terminal.console import table

    models = library.list_models()
    if as_json:
        print(json.dumps([asdict(model) | {"path": str(model.path)} for model in models]))
        return
    if not models:
        print("no models yet: `mlxkv run` fetches the default one", file=sys.stderr)
        return
    rows = [
        (
            model.name,
            model.family,
            human_bytes(model.size_bytes),
            model.quantization,
            f"{model.context:,}" if model.context else "?",
            model.source,
        )
        for model in models
    ]
    header = ("NAME", "FAMILY", "SIZE", "QUANTIZATION", "CONTEXT", "SOURCE")
    print(table(header, rows, right=("SIZE", "CONTEXT")))


def show(model: Model, as_json: AsJson = False) -> None:
    """Show a model's shape, size, KV cache, licence and files, and its adapters."""
    from mlxkv.store import adapters, resolve
    from mlxkv.store.adapter_names import split
    from mlxkv.store.info import describe, to_dict
    from mlxkv.terminal import adapter_text

    name, named = split(model)
    path = resolve.resolve(name, fetch=False)
    refs = [*adapters.own_adapters(path), *adapters.adapter_refs(named, fetch=False)]
    card, added = describe(name, path), [(adapters.read(ref.path), ref.weight) for ref in refs]
    if as_json:
        rows = [adapter_text.to_dict(each) | {"weight": weight} for each, weight in added]
        print(json.dumps(to_dict(card) | {"adapters": rows}, indent=2))
        return
    print("\n\n".join([card.text(), *(adapter_text.text(*each) for each in added)]))


def rm(
    model: Model,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a model from the disk."""
    from mlxkv.base.units import human_bytes
    from mlxkv.store import library

    plan = library.plan_removal(model)
    size = human_bytes(plan.n_bytes)
    if sys.stdin.isatty() and not yes and not typer.confirm(f"remove {model} ({size})?", err=True):
        print("nothing removed", file=sys.stderr)
        return
    freed = library.remove(model)
    print(f"removed {model}, {human_bytes(freed)} freed")


def plan(
    model: Model,
    context: Annotated[
        int | None, typer.Option(help="Tokens of a sequence; default: as for `run`.")
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    kv_type: KVType = None,
    dtype: DType = "auto",
    memory: Memory = None,
    image: Annotated[
        list[str] | None, typer.Option(help="A picture of a sequence; may be repeated.")
    ] = None,
    audio: Annotated[
        list[str] | None, typer.Option(help="A recording of a sequence; may be repeated.")
    ] = None,
    image_budget: Annotated[
        int | None, typer.Option(help="Tokens a picture at most, where a model lets you choose.")
    ] = None,
    draft: Draft = None,
    adapter: Adapters = None,
    as_json: AsJson = False,
) -> None:
    """Compute the memory that a model and its KV cache need, without loading the model."""
    from mlxkv.llm import plan as plans
    from mlxkv.terminal import plan_text

    needs = plans.plan(
        model,
        context,
        sequences,
        kv_type,
        memory,
        dtype,
        images=image or (),
        audio=audio or (),
        image_budget=image_budget,
        draft=draft,
        adapter=adapter,
    )
    print(json.dumps(plan_text.to_dict(needs)) if as_json else plan_text.text(needs))


def models(
    find: Annotated[
        list[str] | None,
        typer.Option(
            "--find", metavar="WORDS", help="List models of the hub with these words that fit here."
        ),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="[WORDS]", hidden=True)] = None,
    memory: Memory = None,
    context: Annotated[int, typer.Option(help="With --find: tokens that must fit.", min=1)] = 8192,
    as_json: AsJson = False,
) -> None:
    """List the model families that mlxkv runs, or find a model that fits this machine."""
    from mlxkv.errors import UsageError

    if find:
        words = [word for text in (*find, *(more or ())) for word in text.split()]
        if not words:
            raise UsageError("--find needs a word of the model's name, such as `--find llama 8b`")
        _find(words, memory, context, as_json)
        return
    if more:
        raise UsageError(f"`mlxkv models` takes no argument; `mlxkv models --find {more[0]}`")
    for field, given in (("as_json", as_json), ("memory", memory is not None)):
        if given:
            raise UsageError("is for --find WORDS", field=field)
    from mlxkv.store.info import supported

    print(supported())


def _find(words: list[str], memory: str | None, context: int, as_json: bool) -> None:
    from dataclasses import asdict

    from mlxkv.base.units import human_bytes
    from mlxkv.llm.find import find
    from mlxkv.terminal.console import ProgressLine, table

    progress = ProgressLine()
    try:
        found = find(words, memory, context, progress)
    finally:
        progress.clear()
    if found.offline:
        print(f"known models only, sizes about: {found.offline}", file=sys.stderr)
    if as_json:
        print(json.dumps([asdict(model) for model in found.fitting]))
        return
    rows = [
        (
            model.name,
            model.model_type,
            human_bytes(model.weights_bytes),
            f"{'about ' if model.is_estimate else ''}{human_bytes(model.total_bytes)}",
        )
        for model in found.fitting
    ]
    print(table(("NAME", "FAMILY", "WEIGHTS", "NEEDS"), rows, right=("WEIGHTS", "NEEDS")))
    print(
        f"needs at {found.context:,} tokens, of {human_bytes(found.limit_bytes)}; "
        "`mlxkv run NAME` fetches one",
        file=sys.stderr,
    )
