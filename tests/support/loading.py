"""What the tests of the loader share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.errors import CheckpointError, MlxkvError
from mlxkv.models.loader import load_model
from tests.support.tiny import llama_config, random_weights, tensor_shapes, tokens

Arrays = dict[str, Any]
ONE_LAYER = llama_config(num_hidden_layers=1)
FILE = "model.safetensors"
NORM = "model.norm.weight"


def weights_of(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    mean = 0.0 if config["model_type"].startswith("gemma") else 1.0
    return random_weights(tensor_shapes(config), seed, mean)


def logits(model, prompt=None) -> np.ndarray:
    return np.array(model(mx.array([prompt or tokens(40)])).astype(mx.float32))


def assert_rounded(got: mx.array, exact: mx.array) -> None:
    """Whether 16-bit values are float32 ones rounded once, up to the order of sums near zero."""
    half_a_place = 2**-8 if got.dtype == mx.bfloat16 else 2**-11
    error = mx.abs(got.astype(mx.float32) - exact)
    assert mx.all(error <= 1.01 * half_a_place * mx.abs(exact) + 1e-5).item()


def refused(path: Path, *words: str, error: type[MlxkvError] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        mx.eval(load_model(path).parameters())
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    for word in words:
        assert word in message, message
    return message
