"""The rotary embeddings that a config.json of either Hugging Face style describes.

"Hub" style has `rope_theta` and `rope_scaling` at the top and most repositories hold it;
transformers 5 writes `rope_parameters` instead, nested by layer type where layers differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxkv.checkpoint.config import Fields

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")

_ROPE_KEYS = frozenset(
    {
        "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor",
        "original_max_position_embeddings", "max_position_embeddings", "attention_factor",
        "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor",
        "high_freq_factor", "short_factor", "long_factor", "finetuned",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer; `rope.py` has the formulas.

    Args:
        rope_type: one of `ROPE_TYPES`.
        dims: leading values of each head that are rotated, an even number.
        theta: base of the wavelengths.
        max_position_embeddings: the model's context, which `dynamic` and `longrope` stretch from.
        original_max_position_embeddings: context of the pretraining; not the model's limit.
        n_turning: of `proportional`: how many of the first pairs are rotated.
    """

    rope_type: str
    dims: int
    theta: float
    max_position_embeddings: int
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    n_turning: int = 0


def rope_config(
    fields: Fields,
    head_dim: int,
    *,
    default_theta: float | None,
    layer_type: str | None = None,
    theta_key: str = "rope_theta",
    scaling_key: str | None = "rope_scaling",
) -> RopeConfig:
    """The rotary embedding that a config describes, in whichever style.

    Args:
        fields: the model's config.
        head_dim: values per head.
        default_theta: the family's documented base where the config names none; None: required.
        layer_type: which entry of a nested `rope_parameters` to read.
        theta_key: the hub style's key of the base.
        scaling_key: the hub style's key of the scaling; None where these layers are not scaled.

    Raises:
        ConfigError: a key is missing, wrong, or not understood.
    """
    fields.ignore(theta_key, "partial_rotary_factor", *([scaling_key] if scaling_key else []))
    params = fields.nested("rope_parameters")
    if layer_type is not None and isinstance(params.raw.get(layer_type), Mapping):
        params = params.nested(layer_type)
    elif scaling_key is not None and fields.has(scaling_key):
        # transformers lets the older key win where a config holds both.
        base = {key: params.raw[key] for key in ("rope_theta",) if key in params.raw}
        scaling = fields.nested(scaling_key)
        params = Fields({**base, **scaling.raw}, scaling.source)
    elif layer_type is not None and scaling_key is None:
        params = Fields({}, fields.source)
    theta = params.opt_float("rope_theta") or fields.opt_float(theta_key) or default_theta
    if theta is None:
        raise fields.missing(theta_key)
    partial = params.opt_float("partial_rotary_factor") or fields.opt_float("partial_rotary_factor")
    partial = 1.0 if partial is None else partial
    if _rope_type(params) == "proportional":
        return _proportional(fields, params, head_dim, theta, partial)
    dims = int(head_dim * partial)
    if dims % 2 or not 0 < dims <= head_dim:
        raise fields.error("partial_rotary_factor", f"rotates {dims} of {head_dim} values a head")
    return _rope_of_type(fields, params, dims, theta)


def rope_configs(fields: Fields, head_dim: int) -> dict[str, Any]:
    """The embeddings of Gemma 3's and 3n's full (`rope`) and sliding layers (`sliding_rope`)."""
    rope = rope_config(fields, head_dim, default_theta=1_000_000.0, layer_type="full_attention")
    sliding = rope_config(
        fields,
        head_dim,
        default_theta=10_000.0,
        layer_type="sliding_attention",
        theta_key="rope_local_base_freq",
        scaling_key=None,
    )
    return {"rope": rope, "sliding_rope": sliding}


def _proportional(
    fields: Fields, params: Fields, head_dim: int, theta: float, partial: float
) -> RopeConfig:
    """Pairs are half a head apart even if some are not rotated; wavelengths are those of all."""
    n_turning = int(partial * head_dim // 2)
    if head_dim % 2 or not 0 < n_turning <= head_dim // 2:
        raise fields.error("partial_rotary_factor", f"turns {n_turning} pairs of {head_dim} values")
    context = fields.int("max_position_embeddings")
    factor = params.opt_float("factor") or 1.0
    return RopeConfig("proportional", head_dim, theta, context, factor=factor, n_turning=n_turning)


def _rope_of_type(fields: Fields, params: Fields, dims: int, theta: float) -> RopeConfig:
    rope_type = _rope_type(params)
    context = fields.int("max_position_embeddings")
    if rope_type == "default":
        return RopeConfig(rope_type, dims, theta, context)
    # The top-level key has priority, as in transformers.
    original = fields.opt_int("original_max_position_embeddings") or params.opt_int(
        "original_max_position_embeddings"
    )
    values: dict[str, Any] = {"original_max_position_embeddings": original or context}
    if rope_type in ("yarn", "longrope"):
        values["factor"] = params.opt_float("factor") or context / (original or context)
        values["attention_factor"] = params.opt_float("attention_factor")
    else:
        values["factor"] = params.float("factor")
    if rope_type == "yarn":
        values["beta_fast"] = params.opt_float("beta_fast", zero=True) or 32.0
        values["beta_slow"] = params.opt_float("beta_slow", zero=True) or 1.0
        values["mscale"] = params.opt_float("mscale", zero=True)
        values["mscale_all_dim"] = params.opt_float("mscale_all_dim", zero=True)
        values["truncate"] = params.bool("truncate", True)
        if theta <= 1:
            raise fields.error("rope_theta", f"must be above 1 for yarn; got {theta}")
    if rope_type == "llama3":
        values["low_freq_factor"] = params.float("low_freq_factor")
        values["high_freq_factor"] = params.float("high_freq_factor")
        if values["high_freq_factor"] <= values["low_freq_factor"]:
            raise params.error("high_freq_factor", "must be above low_freq_factor")
    if rope_type == "dynamic" and dims <= 2:
        raise fields.error("head_dim", "must rotate more than 2 values for dynamic scaling")
    if rope_type == "longrope":
        if values["original_max_position_embeddings"] < 2:
            raise params.error("original_max_position_embeddings", "must be above 1 for longrope")
        for key in ("short_factor", "long_factor"):
            values[key] = params.floats(key)
            if len(values[key]) != dims // 2:
                raise params.error(key, f"must hold {dims // 2} numbers; got {len(values[key])}")
    return RopeConfig(rope_type, dims, theta, context, **values)


def _rope_type(params: Fields) -> str:
    unknown = sorted(set(params.raw) - _ROPE_KEYS)
    if unknown:
        raise params.error(unknown[0], "changes the mathematics and is not understood")
    key = "rope_type" if params.has("rope_type") else "type"
    rope_type = params.str(key, "default")
    rope_type = {"su": "longrope"}.get(rope_type, rope_type)
    if rope_type not in ROPE_TYPES:
        raise params.error(key, f"must be one of {', '.join(ROPE_TYPES)}; got {rope_type!r}")
    return rope_type
