"""Convert a Hugging Face checkpoint or a GGUF file to an MLX model directory, as mlx-lm loads it;
as mlx-vlm does where the model takes pictures or sound.

    from mlxkv.convert import convert
    result = convert("model.gguf", "model-mlx")
    print(result.plan.bits_per_weight)

`plan.py` decides what is written, `write.py` writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .fidelity import Fidelity
    from .plan import ConvertPlan
    from .quality.calibration import Measured
    from .quality.compare import Comparison
    from .report import changes, describe
    from .sources import Source
    from .write import Round

__all__ = ["ConvertPlan", "ConvertResult", "Progress", "changes", "convert", "describe"]


_DEFERRED = {"ConvertPlan": ".plan", "changes": ".report", "describe": ".report"}


def __getattr__(name: str) -> Any:
    if name in _DEFERRED:
        return getattr(import_module(_DEFERRED[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is.

    Attributes:
        phase: "tensors" while weights are written, then "files" for the other files, then "done".
            Before and after that, where it was asked for, what is measured ("measuring").
        done_bytes, total_bytes: of the output's weights; of steps while something is measured.
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
        plan: what was decided.
        path: the model directory; None after a dry run.
        errors: of a quantized source's values that changed: what became what -> root mean square of
            the differences over that of the values, measured on the first rows of each tensor.
        measured: what `quantize="auto"` found.
        comparison: with the source, if it was asked for.
    """

    plan: ConvertPlan
    path: Path | None
    errors: Mapping[str, float] = field(default_factory=dict)
    measured: Measured | None = None
    comparison: Comparison | None = None


def convert(
    source: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    group_size: int | None = None,
    recipe: str | None = None,
    quantize_towers: bool = False,
    text_only: bool = False,
    mmproj: str | Path | None = None,
    target_bits: float | None = None,
    calibrate: bool | str | Path = False,
    evaluate: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int | None = None,
    adapters: Sequence[tuple[Path, float]] = (),
    progress: Callable[[Progress], None] | None = None,
) -> ConvertResult:
    """Convert a model.

    Args:
        source: a directory with config.json and safetensors, or a .gguf file.
        output: the folder to make; it must not exist, or be empty.
        dtype: of what is not quantized: float16, bfloat16 or float32. None keeps the source's, and
            dequantizes a GGUF file's types to bfloat16 for Gemma and float16 for others.
        quantize: affine2 to affine8, mxfp4, mxfp8, nvfp4; mixed_2_6, mixed_3_4, mixed_3_6 or
            mixed_4_6, see `quantization.ROLES`; auto, which measures what each weight needs; or
            none to dequantize everything. None keeps the source's quantization where MLX has the
            same.
        group_size: values that share a scale; only affine has a choice.
        recipe: "mixed" keeps embeddings, head and the projections at both ends at more bits.
        quantize_towers: quantize the encoders of pictures and sound as well; they are kept as they
            are without it.
        text_only: leave them out; mlx-lm loads that of every family.
        mmproj: the file of a GGUF model's encoders; None for the one beside it, if it is alone.
        target_bits: of auto, for each weight of the whole output, scales included; 4.5 if None.
        calibrate: round affine weights by the moments of their inputs on a text: a file, or True
            for the one that is shipped. `auto` always does.
        evaluate: compare the output with the source on a text that is shipped.
        dry_run: only plan.
        overwrite: replace an output that exists, when the new one is complete.
        max_shard_bytes: the largest weights file, 5 GiB if None.
        adapters: to fuse into the weights, paths and what their changes are multiplied by. A
            quantized source is quantized again where they change it. Not beside what measures.
        progress: called after every block of rows.

    Raises:
        UsageError: an option that is not allowed.
        ModelNotFound: no such source.
        CheckpointError: the source is damaged, or its architecture is not supported.
        OutputError: the output exists, or cannot be written.
    """
    from mlxkv.errors import UsageError

    from .open import open_source
    from .plan import MAX_SHARD_BYTES, make_plan, parse_options
    from .quality.measure import Measure
    from .write import check_output, check_room

    output = Path(output)
    options = parse_options(
        dtype,
        quantize,
        group_size,
        recipe,
        max_shard_bytes or MAX_SHARD_BYTES,
        quantize_towers=quantize_towers,
        text_only=text_only,
    )
    measure = Measure.of(options, quantize, target_bits, calibrate, evaluate)
    if not dry_run:
        check_output(output, overwrite)
    elif evaluate:
        raise UsageError("compares what is written, and a dry run writes nothing", field="evaluate")
    opened = open_source(source, text_only=text_only, mmproj=mmproj)
    if adapters:
        from .fuse import check_unmeasured, with_adapters

        check_unmeasured(quantize, calibrate=bool(calibrate), evaluate=evaluate)
        opened = with_adapters(opened, adapters)
    measure.check(opened)
    report = progress or (lambda step: None)

    def step(what: str, done: int, total: int) -> None:
        report(Progress(what, done, total))

    plan = make_plan(opened, options)
    if not dry_run:
        check_room(output, measure.least_bytes(plan))
    calibration = measure.calibration(source, step)
    measured = None
    if calibration is not None and measure.target_bits is not None:
        measured = calibration.measure(plan, group_size, measure.target_bits)
        formats = measured.formats(plan, measure.target_bits)
        plan = make_plan(opened, replace(options, formats=formats))
    if dry_run:
        return ConvertResult(plan, None, measured=measured)
    from .fidelity import Fidelity

    fidelity = Fidelity()
    rounding = None if calibration is None else calibration.rounding(plan)
    path = _write(plan, opened, output, overwrite, report, fidelity, rounding)
    calibration = rounding = None  # with its model, before the output's is loaded
    comparison = measure.comparison(source, path, step)
    return ConvertResult(plan, path, fidelity.errors(), measured, comparison)


def _write(
    plan: ConvertPlan,
    source: Source,
    output: Path,
    overwrite: bool,
    progress: Callable[[Progress], None],
    fidelity: Fidelity,
    rounding: Round | None,
) -> Path:
    from .write import write_model

    done_bytes, total_bytes = 0, plan.total_bytes  # a sum over all tensors

    def report(phase: str, name: str = "") -> None:
        progress(Progress(phase, done_bytes, total_bytes, name))

    def advance(name: str, n_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += n_bytes
        report("tensors", name)

    def write_side_files(folder: Path) -> None:
        report("files")
        source.write_side_files(folder)

    path = write_model(
        plan,
        source.tensors,
        write_side_files,
        output,
        overwrite=overwrite,
        advance=advance,
        fidelity=fidelity,
        rounding=rounding,
    )
    report("done")
    return path
