"""The numbers of Gemma's encoders of pictures; their names are those of `vision_config`.

Reference: transformers `configuration_siglip.py`, `configuration_gemma4.py` and
`configuration_gemma4_unified.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxkv.checkpoint.config import MAX_LAYERS, Fields
from mlxkv.nn.layers import ACTIVATIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class SiglipConfig:
    """Gemma 3's encoder.

    Attributes:
        n_tokens: rows of one picture, a square number.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    n_tokens: int

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_per_side(self) -> int:
        return math.isqrt(self.n_tokens)

    @classmethod
    def read(cls, raw: Mapping[str, Any], source: str) -> SiglipConfig | None:
        """The encoder of a multimodal config; None without one."""
        outer = Fields(raw, source)
        if not outer.has("vision_config"):
            return None
        fields = outer.nested("vision_config")
        config = cls(
            **_sizes(fields, SIGLIP),
            image_size=fields.int("image_size", 224),
            patch_size=fields.int("patch_size", 16),
            hidden_act=_activation(fields, "hidden_act"),
            layer_norm_eps=fields.float("layer_norm_eps", 1e-6),
            n_tokens=outer.int("mm_tokens_per_image", 256),
        )
        if config.hidden_size % config.num_attention_heads:
            raise fields.error("num_attention_heads", f"must divide {config.hidden_size}")
        patches, side = config.patches_per_side, config.tokens_per_side
        if side * side != config.n_tokens or not 0 < side <= patches or patches % side:
            raise outer.error(
                "mm_tokens_per_image",
                f"{config.n_tokens} does not divide a picture of {patches} x {patches} patches",
            )
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class VitConfig:
    """Gemma 4's encoder, of all sizes but 12B."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_activation: str
    rms_norm_eps: float
    rope_theta: float
    pooling_kernel_size: int
    patch_size: int
    position_embedding_size: int
    use_clipped_linears: bool
    standardize: bool

    @property
    def projected_size(self) -> int:
        """Values of a row before its projection into the language model."""
        return self.hidden_size

    @classmethod
    def read(cls, fields: Fields) -> VitConfig:
        heads = fields.int("num_attention_heads", VIT["num_attention_heads"])
        kv_heads = fields.int("num_key_value_heads", 12)
        if heads % kv_heads:
            raise fields.error("num_key_value_heads", f"{kv_heads} must divide {heads}")
        rope = fields.nested("rope_parameters")
        rope.str("rope_type", "axial", among=("axial", "default"))
        head_dim = fields.int("head_dim", 64)
        if head_dim % 4:
            raise fields.error("head_dim", f"{head_dim} must be a multiple of 4")
        return cls(
            **_sizes(fields, VIT),
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            hidden_activation=_activation(fields, "hidden_activation"),
            rms_norm_eps=fields.float("rms_norm_eps", 1e-6),
            rope_theta=rope.float("rope_theta", 100.0),
            pooling_kernel_size=fields.int("pooling_kernel_size", 3),
            patch_size=fields.int("patch_size", 16),
            position_embedding_size=fields.int("position_embedding_size", 10240),
            use_clipped_linears=fields.bool("use_clipped_linears", False),
            standardize=fields.bool("standardize", False),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedderConfig:
    """What Gemma 4 12B has in an encoder's place."""

    patch_size: int
    pooling_kernel_size: int
    mm_embed_dim: int
    mm_posemb_size: int
    rms_norm_eps: float
    output_proj_dims: int

    @property
    def patch_dim(self) -> int:
        """Values of one patch: of as many pixels as become one row."""
        return 3 * (self.patch_size * self.pooling_kernel_size) ** 2

    @property
    def projected_size(self) -> int:
        """Values of a row before its projection into the language model."""
        return self.output_proj_dims

    @classmethod
    def read(cls, fields: Fields) -> EmbedderConfig:
        return cls(
            patch_size=fields.int("patch_size", 16),
            pooling_kernel_size=fields.int("pooling_kernel_size", 3),
            mm_embed_dim=fields.int("mm_embed_dim", 3840),
            mm_posemb_size=fields.int("mm_posemb_size", 1120),
            rms_norm_eps=fields.float("rms_norm_eps", 1e-6),
            output_proj_dims=fields.int("output_proj_dims", 3840),
        )


def gemma4_vision(raw: Mapping[str, Any], source: str) -> VitConfig | EmbedderConfig | None:
    """The encoder of a multimodal Gemma 4; None without one."""
    outer = Fields(raw, source)
    if not outer.has("vision_config"):
        return None
    fields = outer.nested("vision_config")
    unified = "unified" in f"{raw.get('model_type')} {fields.any('model_type')}"
    return EmbedderConfig.read(fields) if unified else VitConfig.read(fields)


SIGLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
VIT = {**SIGLIP, "num_hidden_layers": 16}
"""What a config leaves out, as transformers documents it."""


def _sizes(fields: Fields, defaults: Mapping[str, int]) -> dict[str, Any]:
    sizes = {key: fields.int(key, value) for key, value in defaults.items()}
    fields.int("num_hidden_layers", defaults["num_hidden_layers"], at_most=MAX_LAYERS)
    return sizes


def _activation(fields: Fields, key: str) -> str:
    return fields.str(key, "gelu_pytorch_tanh", among=sorted(ACTIVATIONS))
