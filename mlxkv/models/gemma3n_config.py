"""config.json of Gemma 3n, in either style, multimodal or text alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxkv.checkpoint.config import Fields, refuse_bidirectional, text_config
from mlxkv.checkpoint.rope_config import rope_configs
from mlxkv.nn.decoder_model import GroupedConfig, grouped_fields, layer_windows
from mlxkv.nn.shared_kv import Heads, donors

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(GroupedConfig):
    """The numbers that define a Gemma 3n; the names are those of config.json.

    Attributes:
        intermediate_sizes: of each layer's MLP; `intermediate_size` is the largest.
        donors: the layer whose KV each layer reads; None: its own.
    """

    vocab_size_per_layer_input: int
    hidden_size_per_layer_input: int
    intermediate_sizes: tuple[int, ...]
    activation_sparsity_pattern: tuple[float, ...]
    final_logit_softcapping: float | None
    altup_num_inputs: int
    altup_active_idx: int
    altup_correct_scale: bool
    laurel_rank: int
    donors: tuple[int | None, ...]

    @property
    def heads(self) -> tuple[Heads, ...]:
        """The attention of each layer."""
        D, Hk = self.head_dim, self.num_key_value_heads
        return tuple(
            Heads(window, D, Hk, donor, False, self.rope_of(window))
            for window, donor in zip(self.windows, self.donors, strict=True)
        )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> Config:
        """Read a config of either style, nested or flat.

        Raises:
            ConfigError: a key is missing, wrong or not understood.
        """
        text = text_config(raw)
        sizes = _intermediate_sizes(Fields(text, source))
        fields = Fields({**text, "intermediate_size": max(sizes)}, source).with_defaults(DEFAULTS)
        refuse_bidirectional(fields)
        n_inputs, n_layers = fields.int("altup_num_inputs", 4), fields.n_layers()
        n_shared = fields.count("num_kv_shared_layers", 15, at_most=n_layers)
        shared = grouped_fields(fields, "hidden_activation")
        shared["model_type"] = "gemma3n_text"
        # Every fifth layer is full unless `layer_types` says else; no pattern key counts.
        shared["windows"] = layer_windows(fields, lambda i: (i + 1) % 5 != 0)
        config = cls(
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
            donors=donors(fields, shared["windows"], n_shared),
            **rope_configs(fields, shared["head_dim"]),
        )
        # Gemma 3's; released Gemma 3n configs carry it, and scores are not scaled at all.
        fields.ignore("query_pre_attn_scalar")
        fields.finish()
        return config


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
