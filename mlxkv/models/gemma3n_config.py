"""config.json of Gemma 3n, in either style, multimodal or text alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from mlxkv.checkpoint.config import Fields, refuse_bidirectional
from mlxkv.checkpoint.rope_config import rope_configs
from mlxkv.errors import UnsupportedModel
from mlxkv.models.gemma_audio_config import Gemma3nAudio, gemma3n_audio
from mlxkv.nn.decoder_model import decoder_fields, grouping, layer_windows
from mlxkv.nn.shared_kv import Heads, SharedKVConfig, donors

DEFAULTS = {
    "model_type": "gemma3n_text",
    "vocab_size": 262400,
    "hidden_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "sliding_window": 512,
}
"""What a config leaves out, as transformers documents it."""


ENCODER = "mobilenetv5_300m_enc"


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """`vision_config` of a Gemma 3n; the names are those of config.json.

    Attributes:
        architecture: timm's name of the encoder.
        width: factor on the channels of its blocks (timm's `channel_multiplier`).
        resolution: rows and columns of its output (timm's `msfa_output_resolution`).
        unknown_args: names of further arguments for timm.
        vocab_size: tokens that the encoder's own embedding holds, from id `vocab_offset`.
    """

    architecture: str
    width: float
    resolution: int
    unknown_args: tuple[str, ...]
    hidden_size: int
    vocab_size: int
    vocab_offset: int
    rms_norm_eps: float

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> Self:
        """Read the object under `vision_config`.

        Raises:
            ConfigError: a key is wrong.
        """
        fields = Fields(raw, f"{source}: vision_config")
        args = fields.nested("model_args")
        known = ("channel_multiplier", "msfa_output_resolution")
        return cls(
            architecture=fields.str("architecture", ENCODER),
            width=args.float(known[0], 1.0),
            resolution=args.int(known[1], 16),
            unknown_args=tuple(sorted(set(args.raw) - set(known))),
            hidden_size=fields.int("hidden_size", 2048),
            vocab_size=fields.int("vocab_size", 128),
            vocab_offset=fields.int("vocab_offset", 262144),
            rms_norm_eps=fields.float("rms_norm_eps", 1e-6),
        )

    def check(self) -> None:
        """Raise UnsupportedModel where the encoder is not the one defined here."""
        if self.architecture != ENCODER:
            raise UnsupportedModel(
                f"vision_config: architecture must be {ENCODER}; got {self.architecture!r}"
            )
        if self.unknown_args:
            raise UnsupportedModel(
                f"vision_config: model_args holds {', '.join(self.unknown_args)}, which is not "
                "supported"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(SharedKVConfig):
    """The numbers that define a Gemma 3n; the names are those of config.json.

    Attributes:
        intermediate_sizes: of each layer's MLP; `intermediate_size` is the largest.
        vision: of the encoder of pictures; None without one.
        audio: of the encoder of sound; None without one.
    """

    intermediate_sizes: tuple[int, ...]
    activation_sparsity_pattern: tuple[float, ...]
    altup_num_inputs: int
    altup_active_idx: int
    altup_correct_scale: bool
    laurel_rank: int
    vision: VisionConfig | None = None
    audio: Gemma3nAudio | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> Self:
        config = super(Config, cls).from_dict(raw, source)
        config = replace(config, audio=gemma3n_audio(raw, source, config.vocab_size))
        vision = raw.get("vision_config")
        if not isinstance(vision, Mapping):
            return config
        return replace(config, vision=VisionConfig.from_dict(vision, source))

    @classmethod
    def read(cls, fields: Fields) -> Self:
        sizes = _intermediate_sizes(fields)
        fields = fields.with_values({"intermediate_size": max(sizes)}).with_defaults(DEFAULTS)
        refuse_bidirectional(fields)
        # Gemma 3's; released Gemma 3n configs carry it, and scores are not scaled at all.
        fields.ignore("query_pre_attn_scalar")
        n_inputs, shared = (
            fields.int("altup_num_inputs", 4),
            decoder_fields(fields, "hidden_activation"),
        )
        shared["model_type"] = "gemma3n_text"
        return cls(
            **shared,
            vocab_size_per_layer_input=fields.int("vocab_size_per_layer_input", 262144),
            hidden_size_per_layer_input=fields.int("hidden_size_per_layer_input", 256),
            intermediate_sizes=sizes,
            activation_sparsity_pattern=_sparsity(fields),
            final_logit_softcapping=fields.float("final_logit_softcapping", 30.0),
            altup_num_inputs=n_inputs,
            altup_active_idx=fields.count("altup_active_idx", 0, at_most=n_inputs - 1),
            altup_correct_scale=fields.bool("altup_correct_scale", True),
            laurel_rank=fields.int("laurel_rank", 64),
            heads=_heads(fields),
        )


def _heads(fields: Fields) -> tuple[Heads, ...]:
    D, Hk = fields.int("head_dim"), grouping(fields, fields.int("num_key_value_heads"))
    # Every fifth layer is full unless `layer_types` says else; no pattern key counts.
    windows = layer_windows(fields, lambda i: (i + 1) % 5 != 0)
    n_shared = fields.count("num_kv_shared_layers", 15, at_most=len(windows))
    ropes = rope_configs(fields, D)
    return tuple(
        Heads(window, D, Hk, donor, False, ropes["rope" if window is None else "sliding_rope"])
        for window, donor in zip(windows, donors(fields, windows, n_shared), strict=True)
    )


def _intermediate_sizes(fields: Fields) -> tuple[int, ...]:
    """One size for each layer, or one for all."""
    key, n_layers = "intermediate_size", fields.n_layers()
    value = fields.any(key)
    if not isinstance(value, list):
        return (fields.int(key, 16384),) * n_layers
    if len(value) != n_layers:
        raise fields.error(key, f"must be a number or a list of {n_layers}; got {len(value)} items")
    return tuple(Fields({key: size}, fields.source).int(key) for size in value)


def _sparsity(fields: Fields) -> tuple[float, ...]:
    """Share of each layer's activations that is cut off; the first ten layers' is 0.95."""
    key, n_layers = "activation_sparsity_pattern", fields.n_layers()
    value = fields.any(key)
    if value is None:
        n_sparse = 10 if n_layers > 10 else 0
        return (0.95,) * n_sparse + (0.0,) * (n_layers - n_sparse)
    if not isinstance(value, list) or len(value) != n_layers:
        raise fields.error(key, f"must be a list of {n_layers} numbers")
    for share in value:
        good = isinstance(share, int | float) and not isinstance(share, bool)
        if not good or not 0 <= share < 1:
            raise fields.error(key, f"holds {share!r}; allowed are numbers from 0 to below 1")
    return tuple(float(share) for share in value)
