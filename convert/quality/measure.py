"""What of a conversion is measured: the options, checked, and the measuring itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlxkv.errors import Hint, UsageError

from ..quantization import AUTO, has_biases
from .texts import HELD_OUT, read_text, windows

if TYPE_CHECKING:
    from ..plan import ConvertOptions, ConvertPlan
    from ..sources import Source
    from .calibration import Calibration
    from .compare import Comparison

DEFAULT_BITS = 4.5
"""Of `auto`: what affine4 in groups of 64 has."""

MOST_BITS = 8.0
"""Of a weight in the largest of `auto`'s formats, without its scales."""

Step = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Measure:
    """What is measured.

    Attributes:
        target_bits: of `auto`; None for a format that is given.
        calibrates: whether weights are rounded by moments.
        file: the text for both, None for the shipped one.
        evaluates: whether the output is compared with the source.
    """

    target_bits: float | None
    calibrates: bool
    file: Path | None
    evaluates: bool

    @classmethod
    def of(
        cls,
        options: ConvertOptions,
        quantize: str | None,
        target_bits: float | None,
        calibrate: bool | str | Path,
        evaluate: bool,
    ) -> Measure:
        """Check the user's options.

        Raises:
            UsageError: names what is allowed.
        """
        is_auto = quantize == AUTO
        if target_bits is not None and not is_auto:
            hint = Hint("quantize", AUTO)
            raise UsageError("is for a model that is measured", field="target_bits", hints=[hint])
        if target_bits is not None and not 1 < target_bits <= 16:
            message = f"must be more than 1 and at most 16; got {target_bits:g}"
            raise UsageError(message, field="target_bits")
        if is_auto and options.quantize_towers:
            raise UsageError("auto measures text alone", field="quantize_towers")
        if is_auto and options.recipe:
            raise UsageError("auto chooses the bits itself", field="recipe")
        asked = calibrate is not False
        if asked and (options.quantization is None or not has_biases(options.quantization)):
            hint = Hint("quantize", "affine4")
            raise UsageError("is for affine formats", field="calibrate", hints=[hint])
        if is_auto and target_bits is None:
            target_bits = DEFAULT_BITS
        file = None if isinstance(calibrate, bool) else Path(calibrate)
        return cls(target_bits, is_auto or asked, file, evaluate)

    def check(self, source: Source) -> None:
        """Refuse a model that cannot be measured, before anything is.

        Raises:
            UsageError: an embedding model, or one whose inputs of layers are not to be had.
            TokenizerError: no tokenizer to read texts with.
        """
        if not self.calibrates and not self.evaluates:
            return
        from .reference import predicts, tokenizer_of

        predicts(source)
        if self.calibrates and not source.family.native:
            name = source.config.get("model_type")
            raise UsageError(
                f"{source.path}: {name} runs on mlx-lm's definition, whose layers show no inputs: "
                "auto and a calibration take families of mlxkv's own (`mlxkv models`); choose a "
                "format or a recipe"
            )
        if self.evaluates and not self.calibrates:  # what calibrates reads its text first
            tokenizer_of(source)

    def least_bytes(self, plan: ConvertPlan) -> int:
        """Bytes of a plan's weights, for `auto` about the fewest, as its formats are not chosen."""
        if self.target_bits is None:
            return plan.total_bytes
        return int(plan.total_bytes * min(self.target_bits, MOST_BITS) / plan.bits_per_weight)

    def calibration(self, source: str | Path, step: Step) -> Calibration | None:
        """The source's model and the text, if anything is measured before writing."""
        if not self.calibrates:
            return None
        from ..open import open_source
        from .calibration import Calibration

        return Calibration(open_source(source, text_only=True), self.file, step)

    def comparison(self, source: str | Path, path: Path, step: Step) -> Comparison | None:
        """The output beside the source, if it was asked for."""
        return compare_paths(source, path, None, step) if self.evaluates else None


def compare_paths(
    reference: str | Path, model: str | Path, file: Path | None, step: Step
) -> Comparison:
    """Compare two models by their paths, on the held-out text or the user's.

    Args:
        reference: a directory or GGUF file.
        model: likewise, with the same vocabulary.
        file: a text; None for the one that is shipped.
        step: told about progress.

    Raises:
        UsageError: the vocabularies differ, an embedding model, or the text cannot be read or is
            too short.
        MlxkvError: as `load_model` and `convert`.
    """
    from .compare import LENGTH, N_WINDOWS, compare
    from .reference import open_model

    source, tokenizer = open_model(Path(reference))
    other, own = open_model(Path(model))
    text = read_text(file or HELD_OUT)
    tokens = windows(tokenizer, text, N_WINDOWS, LENGTH, str(file or "the held-out text"))
    sample = text[:2000]
    if tokenizer.encode(sample) != own.encode(sample):
        raise UsageError(
            f"{reference} and {model} have different tokenizers: only models with one "
            "vocabulary can be compared"
        )
    return compare(
        source,
        other,
        tokens,
        lambda done, total, kl: step(f"comparing, KL {kl:.4g}", done, total),
    )
