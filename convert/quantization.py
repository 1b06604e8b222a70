"""MLX's quantization formats by their names here, and the tensors that stay precise."""

from __future__ import annotations

import re

from mlxkv.checkpoint.quantization import MODES, Format
from mlxkv.errors import Hint, UsageError

DEFAULT_GROUP = {"affine": 64, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
_ALIASES = {"q4": "affine4", "q8": "affine8"}
NAMES = (*(f"affine{bits}" for bits in MODES["affine"][0] if bits > 1), "mxfp4", "mxfp8", "nvfp4")
RECIPES = ("mixed",)
MIXED = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}
"""`--quantize` of mlx-lm's mixed recipes -> bits of most weights, and of those that are raised."""
AUTO = "auto"
"""`--quantize` that measures what each weight needs, see `quality`."""

# The roles of weights by their names, the first that matches; all others are "other".
#
# | role | affine4 and the like | mixed | mixed_4_6 and the like | auto |
# |---|---|---|---|---|
# | precise | plain values | plain values | plain values | plain values |
# | embedding | as asked | more bits | fewer bits | measured |
# | head, and an embedding that is the head | as asked | more bits | more bits | measured |
# | value, down | as asked | more bits in the first and last eighth of the layers | the same, and in
# every third layer between | measured |
# | other | as asked | as asked | fewer bits | measured |
#
# Precise are small tensors of which one value acts on many: a norm scales a channel of every token,
# a router picks the experts, a gate opens the one that all share, sinks stand in every softmax, and
# two of a gated delta net's projections make each head's decay. Two are of Gemma 4's encoders:
# mlx-vlm casts what they multiply to the dtype of their weights, which is integers where they are
# quantized. Every token passes embedding and head. Errors of the values, and of what a block adds
# to the residual stream (down), weigh most at the ends (as in llama.cpp's K-quants). mlx-lm's
# recipes leave an embedding at fewer bits also where it is the head.
ROLES = {
    "precise": r"norm|router|\.gate\.|sinks|conv|scalar|altup|laurel|correction_bias|"
    r"shared_expert_gate|\.in_proj_(a|b|ba)\.|position_embedding|patch_embedder|relative_k_proj",
    "embedding": r"embed_tokens|per_layer",
    "head": r"^lm_head",
    "value": r"v_proj|v_a_proj|v_b_proj",
    "down": r"down_proj",
}


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
    if full in MIXED:
        full = f"affine{MIXED[full][0]}"
    elif full == AUTO:
        full = "affine4"  # of what is not measured
    if full not in NAMES:
        allowed = ", ".join((*NAMES, *MIXED, AUTO, "none"))
        raise UsageError(f"must be one of {allowed}; got {name!r}", field="quantize")
    mode = "affine" if full.startswith("affine") else full
    bits = int(full[-1])
    groups = MODES[mode][1]
    if group_size is not None and group_size not in groups:
        allowed = ", ".join(map(str, groups))
        raise UsageError(
            f"must be one of {allowed} for {full}; got {group_size}", field="group_size"
        )
    return Format(mode, bits, group_size or DEFAULT_GROUP[mode])


def role_of(name: str) -> str:
    """The role of a weight, see `ROLES`."""
    return next((role for role, names in ROLES.items() if re.search(names, name)), "other")


def must_stay_precise(name: str, shape: tuple[int, ...]) -> bool:
    """Whether this tensor is never quantized: no matrix, or its role is "precise"."""
    return len(shape) < 2 or not name.endswith(".weight") or role_of(name) == "precise"


def must_keep_dtype(name: str) -> bool:
    """Whether this tensor is never cast: the scores that a router's correction bias is added to
    differ by less than a 16-bit step, and what a gated delta net's decay is made of adds up over
    all tokens."""
    return name.endswith(("correction_bias", ".A_log", ".dt_bias"))


def check_recipe(recipe: str | None, quantization: Format | None) -> None:
    """Refuse a recipe without effect.

    Raises:
        UsageError: unknown, nothing is quantized, or nothing has more bits.
    """
    if recipe is None or recipe in MIXED:
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


def with_more_bits(quantization: Format, recipe: str = "mixed") -> Format:
    """The format that a recipe has for the weights that it raises."""
    if recipe in MIXED:
        return Format("affine", MIXED[recipe][1], quantization.group_size)
    if quantization.mode != "affine":
        return Format("mxfp8", 8, 32)
    bits = {2: 4, 3: 6, 4: 6, 5: 8, 6: 8}[quantization.bits]
    return Format("affine", bits, quantization.group_size)


def is_raised(recipe: str, name: str, n_layers: int, *, tied: bool = False) -> bool:
    """Whether a recipe gives this weight more bits than most, see `ROLES`.

    Args:
        recipe: "mixed", or one of `MIXED`.
        name: of the weight.
        n_layers: of the model.
        tied: whether the embedding is the head.
    """
    if is_next_token(name, n_layers):
        return False
    role, layer = role_of(name), re.search(r"\blayers\.(\d+)\.", name)
    if role == "head" or (role == "embedding" and (recipe == "mixed" or _is_head(name, tied))):
        return True
    if role not in ("value", "down") or layer is None:
        return False
    i = int(layer[1])
    if recipe == "mixed":
        edge = max(1, n_layers // 8)
        return not edge <= i < n_layers - edge
    edge = n_layers // 8
    return i < edge or i >= 7 * n_layers // 8 or (i - edge) % 3 == 2


def is_next_token(name: str, n_layers: int) -> bool:
    """Whether a weight is of a layer that guesses the next token: no answer depends on it."""
    layer = re.search(r"\blayers\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= n_layers


def _is_head(name: str, tied: bool) -> bool:
    return tied and name == "model.embed_tokens.weight"


def smaller_group(wanted: Format, shape: tuple[int, ...]) -> Format | None:
    """The same format with the largest group that divides the rows; None if none does."""
    groups = sorted(MODES[wanted.mode][1], reverse=True)
    smaller = (Format(wanted.mode, wanted.bits, group) for group in groups)
    return next((each for each in smaller if fits(each, shape)), None)
