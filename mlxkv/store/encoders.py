"""Which encoders of pictures and sound a model's files have: config.json may promise more."""

from __future__ import annotations

from pathlib import Path

from mlxkv.checkpoint.tensor_names import towers_in
from mlxkv.checkpoint.weights import open_weights

_KINDS = {"vision": "image", "audio": "audio"}


def encoders_in(model_dir: Path) -> frozenset[str]:
    """`image` and `audio`, as far as there are weights for them.

    Raises:
        ModelNotFound, CheckpointError: as `open_weights`.
    """
    return frozenset(_KINDS[tower] for tower in towers_in(open_weights(model_dir).infos))
