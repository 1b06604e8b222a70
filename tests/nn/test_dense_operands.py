"""On a GPU, products, norms and rotations copy an operand that does not lie in order. None has to.

Each family's chunk and step take the branches of a GPU here, evaluated on the CPU backend, and the
strides of what these operations read are compared with what Metal's kernels take as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import mlx.core as mx
import pytest

from mlxkv.base import device
from mlxkv.cache import make_caches
from mlxkv.nn.batch import batch
from mlxkv.nn.linear import Linear
from mlxkv.nn.moe import ExpertLinear
from tests.nn.test_batch import FAMILIES, Case, folder, load  # noqa: F401

CHUNK = 40
COPIED = {
    "glm4-moe-plain": "rope of 8 of",
    "glm4-moe-lite-plain": "rope of 8 of (2, 4, 1, 8)",
    "glm-moe-dsa-plain": "rope of 8 of (2, 4, 1, 8)",
    "qwen3-next-plain": ("rms_norm of", "rope of 8 of"),
    "qwen3-5-plain": ("rms_norm of", "rope of 8 of"),
}
"""What is copied all the same: heads that turn in part and in halves, the turning part of a
batch's queries, where the rest of each head comes first, and what a gated delta net norms: heads
that are some of a convolution's channels, and its result, which lies head by head."""


def strides(x: mx.array) -> tuple[int, ...]:
    """Steps between values, in values."""
    mx.eval(x)
    found = memoryview(x).strides  # pyright: ignore[reportArgumentType]
    assert found is not None
    return tuple(stride // x.dtype.size for stride in found)


def is_matrix(x: mx.array) -> bool:
    """Whether a packed product takes x as it is: rows of a matrix lie one behind the other."""
    return x.ndim < 2 or strides(x)[-2:] == (x.shape[-1], 1)


def is_normable(x: mx.array) -> bool:
    """Whether a norm takes x as it is: rows that leave no gaps."""
    *_, rows, columns = x.shape
    at = sorted((s, n) for s, n in zip(strides(x), x.shape, strict=True) if n > 1)
    dense = all(s == step for (s, _), step in zip(at, _steps(at), strict=True))
    return dense and strides(x)[-1] == 1 and (rows == 1 or strides(x)[-2] == columns)


def _steps(axes: list[tuple[int, int]]) -> Iterator[int]:
    step = 1
    for _, n in axes:
        yield step
        step *= n


def is_rotatable(x: mx.array, dims: int) -> bool:
    """Whether the rotation takes x `[B, H, L, D]` as it is."""
    B, H, L, D = x.shape
    if dims < D or B == 1:
        return dims == D
    by_head, by_token = (H * L * D, L * D, D, 1), (L * H * D, D, H * D, 1)
    lies = [s for s, n in zip(strides(x), x.shape, strict=True) if n > 1]
    return any(
        lies == [s for s, n in zip(way, x.shape, strict=True) if n > 1]
        for way in (by_head, by_token)
    )


@pytest.fixture
def copies(monkeypatch) -> Iterator[list[str]]:
    """What a GPU would have copied for products, norms and rotations, as it is computed."""
    found: list[str] = []
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(device, "core_streams", lambda: (mx.default_stream(mx.default_device()),))

    def watch(owner: object, name: str, at: int, fits: Callable[[mx.array], bool]) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def watched(*args, **kwargs):
            if not fits(args[at]):
                found.append(f"{name} of {tuple(args[at].shape)} at {strides(args[at])}")
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(Linear, "__call__", 1, is_matrix)
    watch(ExpertLinear, "_gather", 1, is_matrix)
    watch(mx.fast, "rms_norm", 0, is_normable)
    rope = mx.fast.rope

    def rotate(x: mx.array, dims: int, **kwargs):
        if not is_rotatable(x, dims):
            found.append(f"rope of {dims} of {tuple(x.shape)} at {strides(x)}")
        return rope(x, dims, **kwargs)

    monkeypatch.setattr(mx.fast, "rope", rotate)
    mx.disable_compile()
    yield found
    mx.enable_compile()


def unexpected(case: Case, copies: list[str]) -> list[str]:
    return [copy for copy in copies if not copy.startswith(COPIED.get(case.name, "nothing"))]


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_nothing_is_copied_for_a_chunk_or_a_token(case, folder, copies):  # noqa: F811
    model = load(folder, case)
    caches = make_caches(model)
    for n in (CHUNK, CHUNK, 1, 1):
        mx.eval(model.last_logits(mx.ones((1, n), mx.int32), caches))
    assert not unexpected(case, copies)


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_nothing_is_copied_for_a_batch(case, folder, copies):  # noqa: F811
    model = load(folder, case)
    sequences = []
    for n in (CHUNK, CHUNK // 2):
        sequences.append(make_caches(model))
        mx.eval(model.last_logits(mx.ones((1, n), mx.int32), sequences[-1]))
    mx.eval(model.last_logits(mx.ones((2, 1), mx.int32), batch(sequences)))
    assert not unexpected(case, copies)
