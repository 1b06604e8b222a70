"""Names of tensors that several families leave out or rename.

Each function returns the weights kept, and the names of those left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

Remapped = tuple[dict[str, "mx.array"], list[str]]

_ROTARY = re.compile(r"rotary_emb\.|inv_freq$")
TOWERS: Mapping[str, tuple[str, ...]] = {
    "vision": ("vision_tower", "vision_embedder", "embed_vision", "multi_modal_projector"),
    "audio": ("audio_tower", "embed_audio"),
}
"""What makes rows of pictures and of sound, and the modules of it at the root of a checkpoint; a
family's config has a field of each name, None for a model without."""
_MEDIA = re.compile(
    r"(^|\.)(vision_tower|vision_model|vision_embedder|audio_tower|embed_vision|embed_audio|"
    r"multi_modal_projector|visual)\."
)
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_NEXT_TOKEN = ("eh_proj", "enorm", "hnorm", "shared_head.norm", "input_layernorm")
"""Some modules of a layer that predicts the token after next; each has a `weight`."""
_MTP = ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "layers.0.input_layernorm")
"""The same, where the layer is a module of its own: Qwen3-Next's and 3.5's."""
_KV = re.compile(r"\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")


def tower_of(name: str) -> str | None:
    """Which of `TOWERS` a tensor of a checkpoint, or a parameter of a model, is part of."""
    module = name.removeprefix("model.").partition(".")[0]
    return next((tower for tower, modules in TOWERS.items() if module in modules), None)


def towers_in(names: Iterable[str]) -> frozenset[str]:
    """The towers that tensors of these names are part of."""
    return frozenset(tower for name in names if (tower := tower_of(name)) is not None)


def has_next_token(names: Container[str], n_layers: int) -> bool:
    """Whether a layer that predicts the token after next lies behind `n_layers` layers."""
    return all(f"model.layers.{n_layers}.{part}.weight" in names for part in _NEXT_TOKEN)


def has_mtp(names: Container[str]) -> bool:
    """Whether a layer that predicts the token after next lies beside the model, as `mtp`."""
    return any(
        all(f"{root}mtp.{part}.weight" in names for part in _MTP)
        for root in ("", "language_model.", "model.language_model.")
    )


def without_rotary(weights: Mapping[str, mx.array], config: Any = None) -> Remapped:
    """Without rotary frequencies, which `rope.py` computes: `remap` of a family of any config."""
    return _without(weights, lambda name: False)


def without_extra_layers(weights: Mapping[str, mx.array], n_layers: int) -> Remapped:
    """Without rotary frequencies and what lies behind the first `n_layers` layers."""

    def is_extra(name: str) -> bool:
        layer = _layer(name)
        return layer is not None and layer >= n_layers

    return _without(weights, is_extra)


def language_model(
    weights: Mapping[str, mx.array], config: Any = None, *, readers: Container[int | None] = ()
) -> Remapped:
    """The language model's part of a checkpoint, under the names of one of text alone.

    Args:
        weights: of a multimodal checkpoint or not.
        config: of any family. The towers that it has are kept as well, see `tower_of`.
        readers: layers that read another's KV: what their own would be made of is left out.
    """
    kept: dict[str, mx.array] = {}
    skipped: list[str] = []
    towers = [tower for tower in TOWERS if getattr(config, tower, None) is not None]
    for name, array in weights.items():
        if tower_of(name) in towers and not _ROTARY.search(name):
            kept[name.removeprefix("model.")] = array
            continue
        ours = text_name(name)
        unused_kv = _KV.search(ours) and _layer(ours) in readers
        if unused_kv or _MEDIA.search(name) or _ROTARY.search(name):
            skipped.append(name)
        else:
            kept[ours] = array
    return kept, skipped


def text_name(name: str) -> str:
    """A tensor's name in a checkpoint of text alone."""
    ours = name.removeprefix("language_model.")
    if ours.startswith("model.language_model."):
        ours = "model." + ours.removeprefix("model.language_model.")
    return ours


def is_kv(name: str) -> bool:
    """Whether a tensor makes keys or values of a layer of text."""
    ours = text_name(name)
    return _layer(ours) is not None and _KV.search(ours) is not None


def _without(weights: Mapping[str, mx.array], is_extra: Callable[[str], bool]) -> Remapped:
    kept, skipped = dict(weights), list[str]()
    for name in weights:
        if _ROTARY.search(name) or is_extra(name):
            del kept[name]
            skipped.append(name)
    return kept, skipped


def _layer(name: str) -> int | None:
    match = _LAYER.match(name)
    return int(match[1]) if match else None
