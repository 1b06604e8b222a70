"""`mlxkv convert`, and `mlxkv compare`: what a conversion changed."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxkv.commands.options import Adapters, AsJson, takes
from mlxkv.errors import UsageError

if TYPE_CHECKING:
    from mlxkv.convert import (  # pyright: ignore[reportMissingImports]
        ConvertResult,
        Progress,
    )
    from mlxkv.terminal.console import ProgressLine


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """Of the command line; made by `takes`."""

    source: str = typer.Argument(
        ..., metavar="SOURCE", help="Directory, .gguf file, org/name or name."
    )
    output: str | None = typer.Option(
        None, "--output", "-o", help="A path, or a bare name for mlxkv's own models folder."
    )
    dtype: str | None = typer.Option(None, help="float32, float16 or bfloat16.")
    quantize: str | None = typer.Option(
        None,
        "--quantize",
        "-q",
        help="affine4, affine8, mxfp4, mxfp8, nvfp4, ...; mixed_3_6 and the like; auto: measure "
        "what each weight needs; none.",
    )
    target_bits: float | None = typer.Option(
        None, help="Of auto: bits per weight of the whole model, 4.5 by default."
    )
    calibrate: str | None = typer.Option(
        None,
        metavar="FILE|default",
        help="Text to measure weights on, and to round them by; auto does it anyway.",
    )
    evaluate: bool = typer.Option(
        False, "--evaluate", help="Compare the result with the source on held-out text."
    )
    group_size: int | None = typer.Option(None, help="Values that share a scale.")
    recipe: str | None = typer.Option(
        None, help="mixed: more bits for embeddings, head and the like."
    )
    mmproj: Path | None = typer.Option(
        None, help="A .gguf model's encoders; default: the *mmproj*.gguf beside it."
    )
    quantize_towers: bool = typer.Option(
        False, "--quantize-towers", help="Quantize the encoders of pictures and sound as well."
    )
    text_only: bool = typer.Option(
        False, "--text-only", help="Leave the encoders of pictures and sound out."
    )
    adapter: Adapters = None
    fuse: bool = typer.Option(
        False, "--fuse", help="Fuse the adapters of --adapter into the weights."
    )
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the plan only.")
    as_json: AsJson = False


@takes(ConvertOptions)
def convert(options: ConvertOptions) -> int:
    """Convert a checkpoint to an MLX model directory."""
    from mlxkv.store import refs, resolve
    from mlxkv.store.adapters import adapter_refs, own_adapters
    from mlxkv.terminal.console import ProgressLine

    o, progress = options, ProgressLine(plain=True)
    if o.adapter and not o.fuse:
        raise UsageError("--adapter needs --fuse, which adds it to the weights")
    try:
        path = resolve.source_path(o.source, report=progress)
        own = own_adapters(path)
        if own and not o.fuse:
            raise UsageError(f"{o.source} has adapters of its own: --fuse adds them to the weights")
        adapters = [*own, *adapter_refs(o.adapter)]
        if o.fuse and not adapters:
            raise UsageError("--fuse needs --adapter: the model has none of its own")
        default = resolve.default_output(o.source, o.quantize, o.dtype) + "-fused" * o.fuse
        target = refs.output_path(o.output or default)
        from mlxkv.convert import convert as convert_model  # pyright: ignore[reportMissingImports]

        result = convert_model(
            path,
            target,
            dtype=o.dtype,
            quantize=o.quantize,
            target_bits=o.target_bits,
            calibrate=False if o.calibrate is None else o.calibrate == "default" or o.calibrate,
            evaluate=o.evaluate,
            group_size=o.group_size,
            recipe=o.recipe,
            mmproj=o.mmproj,
            quantize_towers=o.quantize_towers,
            text_only=o.text_only,
            dry_run=o.dry_run,
            adapters=[(ref.path, ref.weight) for ref in adapters],
            progress=lambda step: _show(progress, step),
        )
    finally:
        progress.clear()
    _print(result, options)
    return 0


def _show(progress: ProgressLine, step: Progress) -> None:
    if step.phase in ("tensors", "files", "done"):
        progress("converting", step.done_bytes, step.total_bytes)
    else:
        progress(f"{step.phase}, {step.done_bytes} of {step.total_bytes}")


def _print(result: ConvertResult, options: ConvertOptions) -> None:
    from mlxkv.convert import changes, describe  # pyright: ignore[reportMissingImports]

    measured, comparison = result.measured, result.comparison
    if options.as_json:
        print(json.dumps(_to_dict(result)))
        return
    if measured is not None:
        print(measured.text(), file=sys.stderr)
    if options.dry_run:
        print(describe(result.plan))
        return
    for line in changes(result.plan, result.errors):
        print(line, file=sys.stderr)
    if comparison is not None:
        bits = f"{result.plan.bits_per_weight:.2f} bits per weight"
        print(f"{bits}: {comparison.text()}", file=sys.stderr)
    print(result.path)


def _to_dict(result: ConvertResult) -> dict[str, Any]:
    plan, measured, comparison = result.plan, result.measured, result.comparison
    return {
        "path": None if result.path is None else str(result.path),
        "bytes": plan.total_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "quantization": plan.config.get("quantization"),
        "exceptions": {t.name: t.note for t in plan.tensors if t.note},
        "left_out": dict(plan.skipped),
        "errors": dict(result.errors),
        "measured": None
        if measured is None
        else {
            "sensitivity": dict(measured.sensitivity),
            "n_passes": measured.n_passes,
            "n_tokens": measured.n_tokens,
            "seconds": measured.seconds,
        },
        "comparison": None if comparison is None else asdict(comparison),
    }


def compare(
    reference: Annotated[str, typer.Argument(metavar="A", help="What is held to be right.")],
    model: Annotated[str, typer.Argument(metavar="B", help="With the same vocabulary.")],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to compare on; default: shipped.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare what two models say of the same text: KL divergence, likeliest tokens, perplexity."""
    from mlxkv.store import resolve
    from mlxkv.terminal.console import ProgressLine

    progress = ProgressLine(plain=True)
    try:
        first = resolve.source_path(reference, report=progress)
        second = resolve.source_path(model, report=progress)
        from mlxkv.convert.quality.measure import (  # pyright: ignore[reportMissingImports]
            compare_paths,
        )

        found = compare_paths(
            first, second, text, lambda what, done, total: progress(f"{what}, {done} of {total}")
        )
    finally:
        progress.clear()
    print(json.dumps(asdict(found)) if as_json else found.text())
