"""Turns a Hugging Face checkpoint or a GGUF file into an MLX model directory.

    from mlxkv.convert import convert
    result = convert("model.gguf", "model-mlx")
    print(result.plan.bits_per_weight)

The output is mlx-lm's own format: both load it. A plan is made first and carried out second; see
`plan.py` and `write.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plan import ConvertPlan
    from .report import describe
    from .sources import Source

__all__ = ["ConvertPlan", "ConvertResult", "Progress", "convert", "describe"]


def __getattr__(name: str) -> Any:
    if name == "ConvertPlan":
        from .plan import ConvertPlan

        return ConvertPlan
    if name == "describe":
        from .report import describe

        return describe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is.

    Attributes:
        phase: "tensors" while weights are written, "files" for what belongs beside them, "done".
        done_bytes, total_bytes: of the output's weights.
        name: the tensor just written.
    """

    phase: str
    done_bytes: int
    total_bytes: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What was done.

    Attributes:
        path: the model directory; None after a dry run.
    """

    plan: ConvertPlan
    path: Path | None


def convert(
    source: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    group_size: int | None = None,
    recipe: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> ConvertResult:
    """Converts a model.

    Args:
        source: a directory with config.json and safetensors, or a .gguf file.
        output: the folder to make; it must not exist, or be empty.
        dtype: of what is not packed: float16, bfloat16 or float32. None keeps the source's; what
            a GGUF file's types are unpacked to is bfloat16 for Gemma and float16 for others.
        quantize: affine2 to affine8, mxfp4, mxfp8, nvfp4, or none to unpack everything. None keeps
            what the source packs, if MLX packs it the same way.
        group_size: values that share a scale; affine only has a choice.
        recipe: "mixed" keeps embeddings, head and the projections at both ends at more bits.
        dry_run: only plan.
        overwrite: replace an output that exists, when the new one is complete.
        max_shard_bytes: the largest weights file, 5 GiB if None.
        progress: called after every block of rows.

    Raises:
        UsageError: an option that is not allowed.
        ModelNotFound: no such source.
        CheckpointError: the source is damaged, or of an architecture that is not known.
        OutputError: the output exists, or cannot be written.
    """
    from .open import open_source
    from .plan import MAX_SHARD_BYTES, make_plan, parse_options
    from .write import check_output

    output = Path(output)
    options = parse_options(dtype, quantize, group_size, recipe, max_shard_bytes or MAX_SHARD_BYTES)
    if not dry_run:
        check_output(output, overwrite)
    opened = open_source(source)
    plan = make_plan(opened, options)
    if dry_run:
        return ConvertResult(plan, None)
    return ConvertResult(plan, _carry_out(plan, opened, output, overwrite, progress))


def _carry_out(
    plan: ConvertPlan,
    source: Source,
    output: Path,
    overwrite: bool,
    progress: Callable[[Progress], None] | None,
) -> Path:
    from .write import write_model

    done_bytes = 0

    def report(phase: str, name: str = "") -> None:
        if progress is not None:
            progress(Progress(phase, done_bytes, plan.total_bytes, name))

    def advance(name: str, n_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += n_bytes
        report("tensors", name)

    def write_side_files(folder: Path) -> None:
        report("files")
        source.write_side_files(folder)

    path = write_model(
        plan, source.tensors, write_side_files, output, overwrite=overwrite, advance=advance
    )
    report("done")
    return path
