"""Memory of pictures and sound: rows that are kept, and what an encoder takes while it runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import mlx.core as mx

from mlxkv.errors import CheckpointError
from mlxkv.media.types import Medium
from mlxkv.nn import kernels
from mlxkv.nn.model import CausalLM

Shapes = Mapping[str, tuple[tuple[int, ...], mx.Dtype]]
"""Shape and dtype of each array that an encoder takes."""
SHARE = 16
"""Rows take a part of this of the memory beside the weights: a picture has 256 rows, one megabyte,
and its KV is larger."""
UNTRACED = 64
"""Multiple of its input and output that bounds an encoder's memory where MLX cannot trace it."""
MAX_TRACED = 64
"""Encoder sizes whose peak is remembered."""


class Rows:
    """Rows that the encoders made of media, by owner and content; the least recently used go first.

    Args:
        limit_bytes: that may be kept.

    Attributes:
        n_encoded: times that an encoder ran.
    """

    def __init__(self, limit_bytes: int = 0):
        self._limit_bytes, self.n_encoded = limit_bytes, 0
        self._kept: OrderedDict[tuple[str, bytes], mx.array] = OrderedDict()

    def set_limit(self, limit_bytes: int) -> None:
        """Set how much may be kept, and drop what is too much."""
        self._limit_bytes = limit_bytes
        self._shrink()

    def _shrink(self) -> None:
        while self._kept and self.nbytes > self._limit_bytes:
            self._kept.popitem(last=False)

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self._kept.values())

    def get(self, medium: Medium) -> mx.array | None:
        """The rows of a medium, if they are kept."""
        rows = self._kept.get(medium.kept_as)
        if rows is not None:
            self._kept.move_to_end(medium.kept_as)
        return rows

    def encode(self, model: CausalLM, medium: Medium) -> mx.array:
        """Compute the rows of a medium, and keep them.

        Raises:
            CheckpointError: the encoder made another number of rows.
        """
        assert medium.data is not None
        model.load_encoder(medium.kind)
        # No name for the arrays: MLX frees them once they are read.
        rows = model.media_rows(medium.kind, {k: mx.array(v) for k, v in medium.data.items()})
        if rows.shape[0] != medium.n_tokens:
            raise CheckpointError(
                f"the model makes {rows.shape[0]} rows of this {medium.kind}, and its "
                f"preprocessing says {medium.n_tokens}: config.json and processor_config.json "
                "do not fit together"
            )
        mx.eval(rows)
        mx.clear_cache()
        self.n_encoded += 1
        self._kept[medium.kept_as] = rows
        self._shrink()
        return rows

    def clear(self) -> int:
        """Drop all, and return their bytes."""
        n_bytes = self.nbytes
        self._kept.clear()
        return n_bytes


def rows_bytes(limit_bytes: int, weights_bytes: int) -> int:
    """Bytes that rows may take."""
    return max(0, limit_bytes - weights_bytes) // SHARE


def shapes_of(medium: Medium) -> Shapes:
    """What the encoder takes of a medium."""
    assert medium.data is not None
    return {name: (x.shape, _dtype(str(x.dtype))) for name, x in medium.data.items()}


def _dtype(name: str) -> mx.Dtype:
    return {"bool": mx.bool_}.get(name) or getattr(mx, name)


def input_bytes(shapes: Shapes) -> int:
    """Bytes of an encoder's input."""
    n_bytes = 0
    for shape, dtype in shapes.values():
        n = dtype.size
        for size in shape:
            n *= size
        n_bytes += n
    return n_bytes


def encoder_bytes(model: CausalLM, kind: str, shapes: Shapes) -> int:
    """Peak bytes of computing one medium's rows, its input and the rows included.

    Args:
        model: loaded or hollow.
        kind: see `CausalLM.media_rows`.
        shapes: of what the encoder takes.
    """
    from mlxkv.memory.graph import Graph
    from mlxkv.memory.simulation import Memory

    names = list(shapes)

    def run(*arrays: mx.array) -> list[mx.array]:
        return [model.media_rows(kind, dict(zip(names, arrays, strict=True)))]

    arrays = [mx.broadcast_to(mx.array(0, dtype), shape) for shape, dtype in shapes.values()]
    try:
        with kernels.traced():
            graph = Graph.of(run, *arrays)
        return Memory(graph, graph.order(1)).peak()
    except (ValueError, RuntimeError):
        return UNTRACED * input_bytes(shapes)


class EncoderNeeds:
    """What a model's encoders take, traced once for each size."""

    def __init__(self, model: CausalLM):
        self._model = model
        self._known: OrderedDict[tuple, int] = OrderedDict()

    def load(self, kind: str) -> int:
        """Load the weights of an encoder; their bytes, 0 where they were loaded before."""
        n_bytes = self._model.waiting_bytes(kind)
        self._model.load_encoder(kind)
        return n_bytes

    def of(self, medium: Medium) -> int:
        """Bytes that the rows of a medium take while they are computed, and its encoder's weights
        where they are not loaded yet."""
        shapes = shapes_of(medium)
        key = medium.kind, tuple(sorted((name, shape) for name, (shape, _) in shapes.items()))
        if key not in self._known:
            self._known[key] = encoder_bytes(self._model, medium.kind, shapes)
            while len(self._known) > MAX_TRACED:
                self._known.popitem(last=False)
        return self._known[key] + self._model.waiting_bytes(medium.kind)
