"""config.json of Gemma 3n, in either style, multimodal or text alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxkv.checkpoint.config import Fields, RopeConfig, rope_config, text_config
from mlxkv.models import gemma
from mlxkv.nn.layers import ACTIVATIONS

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class Config:
    """The numbers that define a Gemma 3n; the names are those of config.json.

    Attributes:
        windows: of each layer, None for all tokens.
        donors: the layer whose KV each layer reads; None: its own.
    """

    model_type: str
    vocab_size: int
    vocab_size_per_layer_input: int
    hidden_size: int
    hidden_size_per_layer_input: int
    intermediate_size: tuple[int, ...]
    activation_sparsity_pattern: tuple[float, ...]
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_activation: str
    attention_bias: bool
    tie_word_embeddings: bool
    final_logit_softcapping: float | None
    altup_num_inputs: int
    altup_active_idx: int
    altup_correct_scale: bool
    laurel_rank: int
    windows: tuple[int | None, ...]
    donors: tuple[int | None, ...]
    full_rope: RopeConfig
    sliding_rope: RopeConfig

    @property
    def context(self) -> int:
        """Tokens that the model can attend to."""
        return self.max_position_embeddings

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> Config:
        """Read a config of either style, nested or flat; defaults are Gemma 3n's in transformers.

        Raises:
            ConfigError: a key is missing, wrong or not understood.
        """
        fields = Fields(text_config(raw), source)
        gemma.refuse_bidirectional(fields)
        n_heads, n_kv_heads = gemma.heads(fields, 8, 2)
        head_dim = fields.int("head_dim", 256)
        context = fields.int("max_position_embeddings", 32768)
        fields = fields.with_default("max_position_embeddings", context)
        n_inputs = fields.int("altup_num_inputs", 4)
        windows = _windows(fields)
        config = cls(
            model_type="gemma3n_text",
            vocab_size=fields.int("vocab_size", 262400),
            vocab_size_per_layer_input=fields.int("vocab_size_per_layer_input", 262144),
            hidden_size=fields.int("hidden_size", 2048),
            hidden_size_per_layer_input=fields.int("hidden_size_per_layer_input", 256),
            intermediate_size=_intermediate_sizes(fields),
            activation_sparsity_pattern=_sparsity(fields),
            num_hidden_layers=fields.n_layers(),
            num_attention_heads=n_heads,
            num_key_value_heads=n_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=context,
            rms_norm_eps=fields.float("rms_norm_eps", 1e-6),
            hidden_activation=fields.str(
                "hidden_activation", "gelu_pytorch_tanh", among=sorted(ACTIVATIONS)
            ),
            attention_bias=fields.bool("attention_bias", False),
            tie_word_embeddings=fields.bool("tie_word_embeddings", True),
            final_logit_softcapping=fields.float("final_logit_softcapping", 30.0),
            altup_num_inputs=n_inputs,
            altup_active_idx=_count(fields, "altup_active_idx", 0, n_inputs - 1),
            altup_correct_scale=fields.bool("altup_correct_scale", True),
            laurel_rank=fields.int("laurel_rank", 64),
            windows=windows,
            donors=_donors(fields, windows),
            full_rope=rope_config(
                fields, head_dim, default_theta=1_000_000.0, layer_type="full_attention"
            ),
            sliding_rope=rope_config(
                fields,
                head_dim,
                default_theta=10_000.0,
                layer_type="sliding_attention",
                theta_key="rope_local_base_freq",
                scaling_key=None,
            ),
        )
        # Gemma 3's; released Gemma 3n configs carry it, and scores are not scaled at all.
        fields.ignore("query_pre_attn_scalar")
        fields.finish()
        return config


def _windows(fields: Fields) -> tuple[int | None, ...]:
    """Every fifth layer is full unless `layer_types` says else; no pattern key counts."""
    n_layers = fields.n_layers()
    types = fields.strings("layer_types", n_layers, LAYER_TYPES) or tuple(
        "sliding_attention" if (i + 1) % 5 else "full_attention" for i in range(n_layers)
    )
    window = fields.int("sliding_window", 512)
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _donors(fields: Fields, windows: Sequence[int | None]) -> tuple[int | None, ...]:
    """The last layers read the KV of the last layer of their kind that has its own.

    Raises:
        ConfigError: there is no such layer.
    """
    n_shared = _count(fields, "num_kv_shared_layers", 15, len(windows))
    n_own = len(windows) - n_shared
    last = {window: i for i, window in enumerate(windows[:n_own])}
    if any(window not in last for window in windows[n_own:]):
        raise fields.error(
            "num_kv_shared_layers",
            f"of {n_shared} leaves no layer of each kind with KV of its own",
        )
    return tuple(None if i < n_own else last[window] for i, window in enumerate(windows))


def _count(fields: Fields, key: str, default: int, at_most: int) -> int:
    """A whole number from 0 on."""
    value = fields.any(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= at_most:
        raise fields.error(key, f"must be a whole number from 0 to {at_most}; got {value!r}")
    return value


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
