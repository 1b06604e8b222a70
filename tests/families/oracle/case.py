"""What one golden case is. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LONG = 330
"""Tokens of a prompt that crosses the caches' step of 256 and wraps every small window."""

DROP = object()
"""In `Case.hub`: the key is absent from the hub style."""


@dataclass(frozen=True, eq=False)
class Case:
    """One golden model.

    Args:
        name: of its directory.
        architecture: the transformers class that computes it.
        config: arguments of that class's config.
        hub: what the hub style holds in place of the new style's keys; `DROP` removes one.
        n_prompt: tokens of the prompt.
        norm_mean: see `tiny.random_tensor`.
        prefill_in_one: the reference itself depends on how the prompt is cut (frequencies that
            change with the length), so only whole prefill is compared.
        extra: tensors to add to the checkpoint that transformers does not ask for, with shapes.
        renamed: prefixes of tensor names in the checkpoint, reference's -> checkpoint's.
        per_expert: the checkpoint has one tensor for each expert, where the reference has one for
            all of a layer.
    """

    name: str
    architecture: str
    config: Mapping[str, Any]
    hub: Mapping[str, Any] = field(default_factory=dict)
    n_prompt: int = 70
    norm_mean: float = 1.0
    prefill_in_one: bool = False
    extra: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    per_expert: bool = False
