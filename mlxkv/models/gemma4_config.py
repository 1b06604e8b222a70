"""Gemma 4's config in both styles: one `Heads` for each layer, and the numbers of the whole.

Reference: transformers `configuration_gemma4.py` and `configuration_gemma4_unified.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxkv.checkpoint.config import Fields, refuse_bidirectional, text_config
from mlxkv.models.gemma_audio_config import Gemma4Audio, RawAudio, gemma4_audio
from mlxkv.models.gemma_vision_config import EmbedderConfig, VitConfig, gemma4_vision
from mlxkv.nn.decoder_model import FULL, SLIDING, decoder_fields, grouping, layer_types
from mlxkv.nn.shared_kv import Heads, SharedKVConfig, donors, rope_of_kind, sizes_by_layer

DEFAULT_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}

DEFAULTS = {
    "model_type": "gemma4_text",
    "vocab_size": 262144,
    "num_attention_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "rope_parameters": DEFAULT_ROPE,
}
UNIFIED = {
    **DEFAULTS,
    "max_position_embeddings": 262144,
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
}
"""What a config leaves out, as transformers documents it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(SharedKVConfig):
    """The numbers that define a Gemma 4; the names are those of config.json.

    Attributes:
        two_way: whether the tokens of a picture see each other both ways in sliding layers.
        vision: the encoder of pictures; None for text alone.
        audio: the encoder of sound; None without.
        assistant: an `AssistantConfig`, of what drafts for it; None without.
    """

    num_kv_shared_layers: int
    use_double_wide_mlp: bool
    num_experts: int
    top_k_experts: int
    moe_intermediate_size: int
    two_way: bool = False
    vision: VitConfig | EmbedderConfig | None = None
    audio: Gemma4Audio | RawAudio | None = None
    assistant: Any = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> Config:
        # Here and not in `read`: the type of the whole model decides about defaults.
        fields = Fields(text_config(raw), source)
        unified = "unified" in f"{raw.get('model_type')} {fields.any('model_type')}"
        fields = fields.with_defaults(UNIFIED if unified else DEFAULTS)
        refuse_bidirectional(fields, "vision")
        has_experts = fields.bool("enable_moe_block", False)
        if not has_experts:
            # transformers does not look at them either.
            fields.ignore("num_experts", "moe_intermediate_size")
        n_experts = fields.int("num_experts") if has_experts else 0
        shared = decoder_fields(fields, "hidden_activation")
        shared["model_type"] = "gemma4_text"
        config = cls(
            **shared,
            final_logit_softcapping=fields.opt_float("final_logit_softcapping"),
            num_kv_shared_layers=fields.count("num_kv_shared_layers", 0),
            use_double_wide_mlp=fields.bool("use_double_wide_mlp", False),
            hidden_size_per_layer_input=fields.count("hidden_size_per_layer_input", 0),
            vocab_size_per_layer_input=fields.count("vocab_size_per_layer_input", 262144),
            num_experts=n_experts,
            top_k_experts=fields.int("top_k_experts", at_most=n_experts) if has_experts else 0,
            moe_intermediate_size=fields.int("moe_intermediate_size") if has_experts else 0,
            heads=_heads(fields),
            pad_token_id=fields.count("pad_token_id", 0),
            two_way=_two_way(raw, unified),
            vision=gemma4_vision(raw, source),
            audio=gemma4_audio(raw, source),
        )
        fields.finish()
        return config


def _two_way(raw: Mapping[str, Any], unified: bool) -> bool:
    """Whether pictures see themselves both ways; 12B's do where the key is absent, not null."""
    inner = raw.get("text_config")
    text = inner if isinstance(inner, Mapping) else raw
    default = "vision" if unified else None
    return text.get("use_bidirectional_attention", default) == "vision"


def _heads(fields: Fields) -> tuple[Heads, ...]:
    # Five sliding layers to each full one; the last one is full whatever is said.
    types = (*layer_types(fields, lambda i: (i + 1) % 6 != 0)[:-1], FULL)
    sources = donors(fields, types, fields.count("num_kv_shared_layers", 0))
    window, k_eq_v = fields.int("sliding_window"), fields.bool("attention_k_eq_v", False)
    heads = [
        Heads(
            window=window if kind == SLIDING else None,
            head_dim=head_dim,
            n_kv_heads=grouping(fields, n_kv_heads),
            donor=donor,
            k_is_v=k_eq_v and kind == FULL,
            rope=rope_of_kind(fields, kind, head_dim),
        )
        for kind, donor, (head_dim, n_kv_heads) in zip(
            types, sources, _head_sizes(fields, types), strict=True
        )
    ]
    for layer in heads:
        donor = layer if layer.donor is None else heads[layer.donor]
        if (layer.head_dim, layer.n_kv_heads) != (donor.head_dim, donor.n_kv_heads):
            raise fields.error("per_layer_config", "gives a layer other heads than its KV has")
    return tuple(heads)


def _head_sizes(fields: Fields, types: Sequence[str]) -> list[tuple[int, int]]:
    """(head_dim, KV heads) of each layer; the two styles say it in their own keys."""
    head_dim, n_kv_heads = fields.int("head_dim", 256), fields.int("num_key_value_heads", 4)
    if not fields.has("per_layer_config"):
        full_kv_heads = fields.opt_int("num_global_key_value_heads")
        if full_kv_heads is None or not fields.bool("attention_k_eq_v", False):
            full_kv_heads = n_kv_heads
        full = fields.int("global_head_dim", 512), full_kv_heads
        return [full if kind == FULL else (head_dim, n_kv_heads) for kind in types]
    return sizes_by_layer(fields, [(head_dim, n_kv_heads)] * len(types))
