"""The source as a model that runs, its values plain: what a quantized one is held against."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxkv.base import device
from mlxkv.checkpoint.quantization import other_settings
from mlxkv.errors import UsageError
from mlxkv.models.loader import load_model, random_state_kept
from mlxkv.nn.kernels import settle
from mlxkv.nn.layers import Fusing, Prepared
from mlxkv.nn.linear import Embedding
from mlxkv.nn.model import CausalLM
from mlxkv.text.tokenizer import Tokenizer

from ..open import open_source
from ..plan import DTYPES
from ..sources import Source, write_json
from ..tensors import SourceTensor, matrix_shape


def dense_model(source: Source) -> CausalLM:
    """The source's text model with all values dequantized, its projections not fused.

    It takes the memory of its values in the source's dtype; on the CPU backend in float32.

    Args:
        source: opened with `text_only`.
    """
    dtype = device.default_dtype(_dtype_of(source))
    with random_state_kept():
        model = source.family.build(source.parsed)
    root = model.weights_root()
    for tensor in source.tensors.values():
        value = values_of(tensor).astype(dtype)
        mx.eval(value)
        root.update(tree_unflatten([(tensor.name, value)]))
    model.compute_dtype = dtype
    for module in model.modules():
        if isinstance(module, Embedding):
            module.compute_dtype = dtype
        if isinstance(module, Prepared) and not isinstance(module, Fusing):
            module.prepare()
    model.eval()
    settle(model)
    return model


def predicts(source: Source) -> None:
    """Check that a source is a model that says what token comes next.

    Raises:
        UsageError: an embedding model.
    """
    if source.family.embeds:
        raise UsageError(
            f"{source.path} is an embedding model, which predicts no tokens: what quantizing does "
            "to it cannot be measured"
        )


def open_model(path: Path) -> tuple[CausalLM, Tokenizer]:
    """A model and its tokenizer, from a directory that runs as it is, or any other source.

    Raises:
        UsageError: an embedding model.
        MlxkvError: as `load_model` and `open_source`.
    """
    source = open_source(path, text_only=True)
    predicts(source)
    tokenizer = tokenizer_of(source)
    if (path / "config.json").is_file() and not other_settings(source.config):
        return load_model(path), tokenizer
    return dense_model(source), tokenizer


def values_of(tensor: SourceTensor) -> mx.array:
    """All values of a tensor in its shape."""
    return tensor.rows(0, matrix_shape(tensor.shape)[0]).reshape(tensor.shape)


def _dtype_of(source: Source) -> mx.Dtype:
    """The source's, or what its quantized values are dequantized to."""
    sizes: dict[str, int] = {}
    for tensor in source.tensors.values():
        if tensor.dtype in DTYPES and len(tensor.shape) > 1:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + matrix_shape(tensor.shape)[0]
    name = max(sizes, key=lambda key: sizes[key]) if sizes else source.default_dtype
    return getattr(mx, name or "float16")


def tokenizer_of(source: Source) -> Tokenizer:
    """The tokenizer that a conversion of the source would have.

    Raises:
        TokenizerError: it has none.
    """
    with tempfile.TemporaryDirectory(prefix="mlxkv-") as folder:
        write_json(Path(folder) / "config.json", dict(source.config))
        source.write_side_files(Path(folder))
        return Tokenizer.from_dir(Path(folder))


class Recorder(nn.Module):
    """A projection that adds up the second moments of its inputs.

    Args:
        inner: the projection.
        full: sum x x^T, `[in, in]`; else its diagonal, `[in]`.
    """

    def __init__(self, inner: nn.Module, full: bool):
        super().__init__()
        self.inner = inner
        self._full = full
        self._sum: mx.array | None = None
        self._n_rows = 0

    def __call__(
        self, x: mx.array, norm: nn.Module | None = None, plus: mx.array | None = None
    ) -> mx.array:
        x = x if norm is None else norm(x)
        self.add(x)
        result = self["inner"](x)
        return result if plus is None else plus + result

    def add(self, x: mx.array) -> None:
        """Add inputs `[..., in]`."""
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        more = rows.T @ rows if self._full else mx.square(rows).sum(0)
        self._sum = more if self._sum is None else self._sum + more
        mx.eval(self._sum)
        self._n_rows += rows.shape[0]

    def mean(self) -> mx.array | None:
        """The sum over the number of inputs, None if there were none."""
        return None if self._sum is None else self._sum / self._n_rows


@contextmanager
def recording(model: CausalLM, modules: Sequence[str], full: bool) -> Iterator[dict[str, Recorder]]:
    """Put recorders in the places of these projections, by their paths."""
    root = model.weights_root()
    found = dict(root.named_modules())
    inner = {path: found[path] for path in modules}
    recorders = {path: Recorder(module, full) for path, module in inner.items()}
    root.update_modules(tree_unflatten(list(recorders.items())))
    try:
        yield recorders
    finally:
        root.update_modules(tree_unflatten(list(inner.items())))
