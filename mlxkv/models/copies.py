"""Heads and embeddings that a checkpoint stores twice, or against what its config says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

EMBEDDING, HEAD = "model.embed_tokens.", "lm_head."


def with_own_head(config: Any, weights: dict[str, mx.array], *, compare: bool = True) -> Any:
    """A config that says "tied" beside a head of its own: the head counts, unless it is a copy.

    transformers 5 decides the same way. Drops a copied head from `weights`; without `compare`
    nothing is read, and every head counts as one of its own.
    """
    if "lm_head.weight" not in weights or not config.tie_word_embeddings:
        return config
    if compare and (names := _copies(weights, HEAD, EMBEDDING)):
        for name in names:
            del weights[name]
        return config
    return dataclasses.replace(config, tie_word_embeddings=False)


def with_own_next_token(config: Any, weights: dict[str, mx.array], *, compare: bool = True) -> Any:
    """A config that says what its next-token layer has of its own: no copies of the model's.

    GLM-4.5 stores its embedding and its head once more for it. Drops copies from `weights`;
    without `compare` nothing is read, and what is there counts.
    """
    next_token = getattr(config, "next_token", None)
    if next_token is None:
        return config
    own: dict[str, bool] = {}
    for field, (at, of) in next_token_copies(config).items():
        copies = _copies(weights, at, of) if compare else []
        for name in copies:
            del weights[name]
        own[field] = f"{at}weight" in weights
    return dataclasses.replace(config, next_token=dataclasses.replace(next_token, **own))


def next_token_copies(config: Any) -> dict[str, tuple[str, str]]:
    """Field of `NextToken` -> the module of the layer, and the model's that it may be a copy of."""
    layer = f"model.layers.{config.num_hidden_layers}."
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    return {
        "own_embedding": (f"{layer}embed_tokens.", EMBEDDING),
        "own_head": (f"{layer}shared_head.head.", head),
    }


def _copies(weights: Mapping[str, mx.array], at: str, of: str) -> list[str]:
    """The arrays of a module that is another once more, quantized or not; [] of any other."""
    found = {name: array for name, array in weights.items() if name.startswith(at)}
    others = {name: array for name, array in weights.items() if name.startswith(of)}
    if {at + name.removeprefix(of) for name in others} != found.keys():
        return []
    pairs = [(others[of + name.removeprefix(at)], array) for name, array in found.items()]
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
        return []
    return list(found) if all(mx.array_equal(a, b).item() for a, b in pairs) else []
