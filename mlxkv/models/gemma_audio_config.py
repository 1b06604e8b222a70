"""`audio_config` of Gemma 3n and 4: the numbers of their encoders of sound.

Reference: transformers `configuration_gemma3n.py`, `configuration_gemma4.py` and
`configuration_gemma4_unified.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from mlxkv.checkpoint.config import MAX_LAYERS, Fields
from mlxkv.nn.layers import ACTIVATIONS

MAX_CHUNK = 4096
"""Bound on the frames of a chunk and on those seen around it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Which encoder frames see which: queries in chunks, and the keys before and behind a chunk.

    Attributes:
        chunk: queries of one product.
        past: keys before the first query of a chunk.
        ahead: keys behind the last one.
        seen: keys that a query sees of itself and before.
        seen_ahead: keys that it sees behind itself.
        top: the largest relative position that has a key of its own.
        n_positions: such positions, from `top` down.
    """

    chunk: int
    past: int
    ahead: int
    seen: int
    seen_ahead: int
    top: int
    n_positions: int

    @property
    def context(self) -> int:
        """Keys of one chunk's product."""
        return self.past + self.chunk + self.ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class ConformerConfig:
    """The numbers of a conformer; the names are Gemma 4's.

    Attributes:
        masked_score: of the keys that a query does not see, before the softmax.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    subsampling_conv_channels: tuple[int, int]
    conv_kernel_size: int
    residual_weight: float
    attention_logit_cap: float
    gradient_clipping: float
    rms_norm_eps: float
    hidden_act: str
    span: Span
    masked_score: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma4Audio(ConformerConfig):
    """Of E2B and E4B."""

    use_clipped_linears: bool
    output_proj_dims: int

    @property
    def projected_size(self) -> int:
        """Values of a row before its projection into the language model."""
        return self.output_proj_dims

    @classmethod
    def read(cls, fields: Fields) -> Self:
        context = fields.int("attention_context_left", 13, at_most=MAX_CHUNK)
        ahead = fields.count("attention_context_right", 0, at_most=MAX_CHUNK)
        chunk = fields.int("attention_chunk_size", 12, at_most=MAX_CHUNK)
        past = context - 1
        config = cls(
            **_sizes(fields, "num_hidden_layers", "num_attention_heads", hidden_size=1024),
            subsampling_conv_channels=_pair(fields, "subsampling_conv_channels", (128, 32)),
            conv_kernel_size=fields.int("conv_kernel_size", 5, at_most=MAX_CHUNK),
            residual_weight=fields.float("residual_weight", 0.5),
            attention_logit_cap=fields.float("attention_logit_cap", 50.0),
            hidden_act=fields.str("hidden_act", "silu", among=sorted(ACTIVATIONS)),
            # One key less than Gemma 3n's: its mask counts the query among the `past`.
            span=Span(
                chunk=chunk,
                past=past,
                ahead=ahead,
                seen=past,
                seen_ahead=max(ahead - 1, 0),
                top=(chunk + past + ahead) // 2,
                n_positions=(chunk + past + ahead) // 2 + 1,
            ),
            masked_score=_negative(fields, "attention_invalid_logits_value", -1e9),
            use_clipped_linears=fields.bool("use_clipped_linears", True),
            output_proj_dims=fields.int("output_proj_dims", 1536),
        )
        if not config.span.seen:
            raise fields.error("attention_context_left", "of 1 leaves a query no key to see")
        fields.finish()
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma3nAudio(ConformerConfig):
    """Of Gemma 3n.

    Attributes:
        kernels: of the two convolutions, frames and frequencies.
        strides: of the two.
        group_norm_eps: of the norms behind them.
        reduction: encoder frames of one row.
        n_rows: of every clip; what a short one lacks is filled with the row of a padding token.
        vocab_offset: the first token that embeds as sound.
        vocab_size: the number of those.
        padding: which of them fills clips up.
    """

    input_feat_size: int
    kernels: tuple[tuple[int, int], tuple[int, int]]
    strides: tuple[tuple[int, int], tuple[int, int]]
    group_norm_eps: float
    reduction: int
    n_rows: int
    vocab_offset: int
    vocab_size: int
    padding: int

    @classmethod
    def read(cls, fields: Fields, n_rows: int, vocab_size: int) -> Self:
        past = fields.int("conf_attention_context_left", 13, at_most=MAX_CHUNK) - 1
        ahead = fields.count("conf_attention_context_right", 0, at_most=MAX_CHUNK)
        offset, n_own = fields.int("vocab_offset", 262272), fields.int("vocab_size", 128)
        if not 0 <= vocab_size - 1 - offset < n_own:
            raise fields.error(
                "vocab_offset",
                f"{offset} and vocab_size {n_own} leave out token {vocab_size - 1}, which fills "
                "clips up",
            )
        layers, heads = "conf_num_hidden_layers", "conf_num_attention_heads"
        config = cls(
            **_sizes(fields, layers, heads, hidden_size=1536),
            subsampling_conv_channels=_pair(fields, "sscp_conv_channel_size", (128, 32)),
            conv_kernel_size=fields.int("conf_conv_kernel_size", 5, at_most=MAX_CHUNK),
            residual_weight=fields.float("conf_residual_weight", 0.5),
            attention_logit_cap=fields.float("conf_attention_logit_cap", 50.0),
            hidden_act="silu",
            span=Span(
                chunk=fields.int("conf_attention_chunk_size", 12, at_most=MAX_CHUNK),
                past=past,
                ahead=ahead,
                seen=past + 1,
                seen_ahead=ahead,
                top=past,
                n_positions=past + ahead + 1,
            ),
            masked_score=-1e30,
            input_feat_size=fields.int("input_feat_size", 128),
            kernels=_pairs(fields, "sscp_conv_kernel_size", (3, 3)),
            strides=_pairs(fields, "sscp_conv_stride_size", (2, 2)),
            group_norm_eps=fields.float("sscp_conv_group_norm_eps", 1e-3),
            reduction=fields.int("conf_reduction_factor", 4),
            n_rows=n_rows,
            vocab_offset=offset,
            vocab_size=n_own,
            padding=vocab_size - 1 - offset,
        )
        fields.finish()
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class RawAudio:
    """Of the 12B, which projects samples and has no encoder."""

    audio_embed_dim: int
    rms_norm_eps: float

    @property
    def projected_size(self) -> int:
        """Values of a row before its projection into the language model."""
        return self.audio_embed_dim

    @classmethod
    def read(cls, fields: Fields) -> Self:
        config = cls(
            audio_embed_dim=fields.int("audio_embed_dim", 640),
            rms_norm_eps=fields.float("rms_norm_eps", 1e-6),
        )
        fields.finish()
        return config


def gemma4_audio(raw: Mapping[str, Any], source: str) -> Gemma4Audio | RawAudio | None:
    """The `audio_config` of a multimodal Gemma 4; None without one.

    Raises:
        ConfigError: a key is wrong or not understood.
    """
    outer = Fields(raw, source)
    if not outer.has("audio_config"):
        return None
    fields = outer.nested("audio_config")
    unified = "unified" in f"{raw.get('model_type')} {fields.any('model_type')}"
    return (RawAudio if unified else Gemma4Audio).read(fields)


def gemma3n_audio(raw: Mapping[str, Any], source: str, vocab_size: int) -> Gemma3nAudio | None:
    """The same of a Gemma 3n, whose language model has `vocab_size` tokens."""
    outer = Fields(raw, source)
    if not outer.has("audio_config"):
        return None
    n_rows = outer.int("audio_soft_tokens_per_image", 188)
    return Gemma3nAudio.read(outer.nested("audio_config"), n_rows, vocab_size)


def _sizes(fields: Fields, layers: str, heads: str, *, hidden_size: int) -> dict[str, Any]:
    """What both kinds of conformer have under names of their own, or of any kind."""
    E, n_heads = fields.int("hidden_size", hidden_size), fields.int(heads, 8)
    if E % n_heads or E % 2:
        raise fields.error("hidden_size", f"{E} must be even and a multiple of {n_heads} heads")
    return {
        "hidden_size": E,
        "num_hidden_layers": fields.int(layers, 12, at_most=MAX_LAYERS),
        "num_attention_heads": n_heads,
        "gradient_clipping": fields.float("gradient_clipping", 1e10),
        "rms_norm_eps": fields.float("rms_norm_eps", 1e-6),
    }


def _pair(fields: Fields, key: str, default: tuple[int, int]) -> tuple[int, int]:
    """Two whole numbers of at least 1."""
    value = fields.any(key)
    if value is None:
        return default
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise fields.error(key, f"must be a list of 2 numbers; got {value!r}")
    numbers = [Fields({key: item}, fields.source).int(key, at_most=2**16) for item in value]
    return numbers[0], numbers[1]


def _pairs(
    fields: Fields, key: str, default: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """One pair for each of the two convolutions."""
    value = fields.any(key)
    if value is None:
        return default, default
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise fields.error(key, f"must be a list of 2 pairs; got {value!r}")
    pairs = [_pair(Fields({key: item}, fields.source), key, default) for item in value]
    return pairs[0], pairs[1]


def _negative(fields: Fields, key: str, default: float) -> float:
    """A number below 0."""
    value = fields.any(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not value < 0:
        raise fields.error(key, f"must be a number below 0; got {value!r}")
    return float(value)
