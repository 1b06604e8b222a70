"""MLX's quantization formats by their names here, and the tensors that stay precise."""

from __future__ import annotations

import re

from mlxkv.checkpoint.quantization import MODES, Format
from mlxkv.errors import Hint, UsageError

DEFAULT_GROUP = {"affine": 64, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
_ALIASES = {"q4": "affine4", "q8": "affine8"}
NAMES = (*(f"affine{bits}" for bits in MODES["affine"][0] if bits > 1), "mxfp4", "mxfp8", "nvfp4")
RECIPES = ("mixed",)

# Small tensors, by name, that are never quantized: one value acts on many (a norm scales a channel
# of every token, a router picks the experts). The last two are of Gemma 4's encoders: mlx-vlm casts
# what they multiply to the dtype of their weights, which is integers where they are quantized.
_PRECISE = re.compile(
    r"norm|router|\.gate\.|sinks|conv|scalar|altup|laurel|correction_bias|position_embedding|"
    r"patch_embedder|relative_k_proj"
)


def name_of(quantization: Format) -> str:
    """The name that a user types, such as `affine4`."""
    return f"affine{quantization.bits}" if quantization.mode == "affine" else quantization.mode


def has_biases(quantization: Format) -> bool:
    """Whether there is a bias beside each scale."""
    return quantization.mode == "affine"


def fits(quantization: Format, shape: tuple[int, ...]) -> bool:
    """Whether the rows divide into groups."""
    return len(shape) >= 2 and shape[-1] % quantization.group_size == 0


def parse_quantization(name: str, group_size: int | None = None) -> Format:
    """The format of a name such as `affine4`, with its group size.

    Raises:
        UsageError: names what is allowed.
    """
    full = _ALIASES.get(name, name)
    if full not in NAMES:
        raise UsageError(f"must be one of {', '.join(NAMES)}, none; got {name!r}", field="quantize")
    mode = "affine" if full.startswith("affine") else full
    bits = int(full[-1])
    groups = MODES[mode][1]
    if group_size is not None and group_size not in groups:
        allowed = ", ".join(map(str, groups))
        raise UsageError(
            f"must be one of {allowed} for {full}; got {group_size}", field="group_size"
        )
    return Format(mode, bits, group_size or DEFAULT_GROUP[mode])


def must_stay_precise(name: str, shape: tuple[int, ...]) -> bool:
    """Whether this tensor is never quantized: no matrix, or one of `_PRECISE`."""
    return len(shape) < 2 or not name.endswith(".weight") or _PRECISE.search(name) is not None


def must_keep_dtype(name: str) -> bool:
    """Whether this tensor is never cast: the scores that a router's correction bias is added to
    differ by less than a 16-bit step."""
    return name.endswith("correction_bias")


def check_recipe(recipe: str | None, quantization: Format | None) -> None:
    """Refuse a recipe without effect.

    Raises:
        UsageError: unknown, nothing is quantized, or nothing has more bits.
    """
    if recipe is None:
        return
    if recipe not in RECIPES:
        raise UsageError(f"must be one of {', '.join(RECIPES)}; got {recipe!r}", field="recipe")
    if quantization is None:
        raise UsageError(
            f"{recipe} is for a model that is quantized",
            field="recipe",
            hints=[Hint("quantize", "affine4")],
        )
    if quantization.bits == 8:
        raise UsageError(
            f"{recipe} keeps some tensors at more bits than the others, and nothing has more than "
            f"{name_of(quantization)}: leave it out",
            field="recipe",
        )


def with_more_bits(quantization: Format) -> Format:
    """The format that the `mixed` recipe has for sensitive tensors."""
    if quantization.mode != "affine":
        return Format("mxfp8", 8, 32)
    bits = {2: 4, 3: 6, 4: 6, 5: 8, 6: 8}[quantization.bits]
    return Format("affine", bits, quantization.group_size)


def is_sensitive(name: str, n_layers: int) -> bool:
    """Whether `mixed` gives more bits: embeddings, head, and v_proj and down_proj at both ends.

    Every token passes the first two. Errors of the values, and of what a block adds to the residual
    stream, weigh most in the first and last eighth of the layers (as in llama.cpp's K-quants).
    """
    layer = re.search(r"\blayers\.(\d+)\.", name)
    if layer is not None and int(layer[1]) >= n_layers:
        return False  # a next-token layer: no answer depends on it
    if "embed_tokens" in name or "per_layer" in name or name.startswith("lm_head"):
        return True
    if layer is None or ("v_proj" not in name and "down_proj" not in name):
        return False
    edge = max(1, n_layers // 8)
    return not edge <= int(layer[1]) < n_layers - edge
