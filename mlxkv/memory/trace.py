"""What a step of a model holds in memory at its peak, found by tracing it: nothing is computed.

MLX writes the graph of a step down with the shapes and dtypes of all its arrays. That graph is run
through here as MLX's evaluation would: in its order, with the memory of an array given back after
its last reader, in-place where MLX writes in place, views for nothing. Weights are left out: they
are there before and after.

The order is that of MLX's `eval`: breadth first from the results, no wider than `WIDTH`, then
backwards. Work is handed to the device before it is done, so the last operations still hold what
they read.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map, tree_unflatten

from mlxkv.base import device
from mlxkv.cache import KVCache, RotatingKVCache, make_caches
from mlxkv.kv.layout import Cache
from mlxkv.kv.types import CacheSpec
from mlxkv.models.loader import Layout
from mlxkv.nn.layers import Prepared
from mlxkv.nn.linear import split_products
from mlxkv.nn.model import CausalLM
from mlxkv.nn.moe import GatedExperts

WIDTH = 20
"""Width of MLX's evaluation order (its MLX_BFS_MAX_WIDTH)."""
IN_FLIGHT = 95
"""Tasks that are handed to the device before the first of them has to be done: an operation is two,
a view one. MLX's CPU backend lets ten queues of ten wait, the last of them half full on average."""
_DONATION_SLACK = 16384
"""Bytes by which MLX lets a donated buffer be larger than the result."""

_VIEWS = frozenset(
    ("Broadcast", "ExpandDims", "Squeeze", "Slice", "Transpose", "Unflatten", "Split",
     "StopGradient", "AsStrided", "Depends", "View", "Copy", "Reshape", "Flatten", "Contiguous")
)  # fmt: skip
_PRODUCTS = frozenset(("Matmul", "AddMM", "QuantizedMatmul"))
_IN_PLACE = frozenset(
    ("Abs", "Add", "AsType", "BitwiseBinary", "Cos", "Divide", "Equal", "Erf", "Exp", "Floor",
     "Greater", "GreaterEqual", "Less", "LessEqual", "Log", "LogicalAnd", "LogicalNot",
     "LogicalOr", "Maximum", "Minimum", "Multiply", "Negative", "NotEqual", "Power", "RMSNorm",
     "Remainder", "Scatter", "ScatterAxis", "Select", "Sigmoid", "Sin", "SliceUpdate", "Softmax",
     "Sqrt", "Square", "Subtract", "Tanh")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes beside the weights during one step.

    Args:
        before: of the KV before it.
        peak: of KV and everything that is computed, at the most.
    """

    before: int
    peak: int


def prefill_step(model: CausalLM, kv_type: str, n_held: int, n_new: int, *, last: bool) -> Held:
    """A chunk of a prompt.

    Args:
        model: loaded, or hollow (`loader.hollow`).
        kv_type: format of the KV.
        n_held: tokens before it.
        n_new: tokens of the chunk.
        last: whether its logits are wanted.

    Raises:
        ValueError, RuntimeError: MLX cannot trace this model.
    """
    return _step(model, _caches_at(model, kv_type, n_held, n_new), n_new, last)


def decode_step(model: CausalLM, kv_type: str, n_held: int) -> Held:
    """One token behind `n_held`; arguments and errors as for `prefill_step`."""
    return _step(model, _caches_at(model, kv_type, n_held, 1), 1, True)


def hollow(layout: Layout) -> CausalLM:
    """A model as `load_model` leaves it, but for its weights, which take no memory.

    Args:
        layout: its weights are given up.
    """
    model = layout.model
    arrays = {name: hollow_array(x.shape, x.dtype) for name, x in layout.weights.items()}
    layout.weights.clear()
    model.weights_root().update(tree_unflatten(list(arrays.items())))
    layout.settle_dtype()
    for module in [m for m in model.modules() if isinstance(m, Prepared)]:
        module.prepare()
        module.update(tree_map(lambda x: hollow_array(x.shape, x.dtype), module.parameters()))
    split_products(model)
    if not device.on_cpu():
        # Else they are operations of each step's graph, broadcast ones, which products copy.
        # Products that the CPU backend does not divide keep that copy: it is as much as the trace
        # misses there of tasks in flight. Without it tight limits were passed by up to 8%.
        mx.eval(model.parameters())
    return model


def hollow_array(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """An array of any size that takes a few bytes of memory."""
    return mx.broadcast_to(mx.array(0, dtype), tuple(shape))


def _caches_at(model: CausalLM, kv_type: str, n_held: int, n_chunk: int) -> list[Cache]:
    """Caches as they are after `n_held` tokens that came in chunks, with nothing in them."""
    caches = make_caches(model, kv_type)
    n_before = min(n_chunk, n_held)
    for cache in caches:
        if not isinstance(cache, KVCache | RotatingKVCache) or cache.spec is None:
            continue
        for n in (n_held - n_before, n_before):
            if n:
                cache.update(*_rows(cache.spec, n, model.compute_dtype))
                cache.buffers = [hollow_array(x.shape, x.dtype) for x in cache.buffers]
    return caches


def _rows(spec: CacheSpec, n: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    return (
        hollow_array((1, spec.n_kv_heads, n, spec.k_dim), dtype),
        hollow_array((1, spec.n_kv_heads, n, spec.v_dim), dtype),
    )


def _step(model: CausalLM, caches: Sequence[Cache], n_new: int, last: bool) -> Held:
    growing = [cache for cache in caches if isinstance(cache, KVCache | RotatingKVCache)]
    lengths = [len(cache.buffers) for cache in growing]

    def run(tokens: mx.array, *buffers: mx.array) -> list[mx.array]:
        rest = iter(buffers)
        for cache, n in zip(growing, lengths, strict=True):
            cache.buffers = [next(rest) for _ in range(n)]
        logits = model.last_logits(tokens, caches)
        # What keeps the step's memory alive in the end; the first of them are what is asked for.
        kept = [buffer for cache in growing for buffer in cache.buffers]
        return [logits, *kept] if last else kept

    buffers = [buffer for cache in growing for buffer in cache.buffers]
    with _traced(model):
        graph = _Graph.of(run, mx.zeros((1, n_new), mx.int32), *buffers)
    n_roots = 1 if last else len(graph.outputs)
    before = sum(graph.nbytes[name] for name in graph.inputs[1:])
    return Held(before, _Memory(graph, graph.order(n_roots)).peak())


@contextmanager
def _traced(model: CausalLM) -> Iterator[None]:
    """Have a model give nothing but its graph."""
    experts = [module for module in model.modules() if isinstance(module, GatedExperts)]
    # MLX cannot write this one down; a maximum with itself is a copy as well.
    contiguous, mx.contiguous = mx.contiguous, lambda x, **_: mx.maximum(x, x)
    for module in experts:
        module.traced = True
    try:
        yield
    finally:
        mx.contiguous = contiguous
        for module in experts:
            module.traced = False


@dataclass(frozen=True, slots=True)
class _Operation:
    name: str
    arguments: Sequence[Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Graph:
    """The operations of a function, and the shapes of what they read and write."""

    def __init__(self) -> None:
        self.operations: list[_Operation] = []
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.nbytes: dict[str, int] = {}
        self.maker: dict[str, int] = {}

    @classmethod
    def of(cls, function: Callable[..., list[mx.array]], *arguments: mx.array) -> _Graph:
        graph = cls()
        mx.export_function(graph._take, function, *arguments)  # pyright: ignore[reportArgumentType]
        return graph

    def _take(self, entry: dict[str, Any]) -> None:
        match entry["type"]:
            case "inputs":
                self.inputs = [self._seen(x) for x in entry["inputs"]]
            case "outputs":
                self.outputs = [self._seen(x) for x in entry["outputs"]]
            case "primitive":
                inputs = tuple(self._seen(x) for x in entry["inputs"])
                outputs = tuple(self._seen(x) for x in entry["outputs"])
                self.maker |= dict.fromkeys(outputs, len(self.operations))
                arguments = entry["arguments"]
                self.operations.append(_Operation(entry["name"], arguments, inputs, outputs))

    def _seen(self, array: tuple[str, tuple[int, ...], mx.Dtype]) -> str:
        name, shape, dtype = array
        self.shapes[name], self.nbytes[name] = shape, prod(shape) * dtype.size
        return name

    def order(self, n_roots: int) -> list[int]:
        """Operations in the order in which MLX evaluates the first outputs."""
        roots = self.outputs[:n_roots]
        pending = self._edges(roots)
        tape: list[int | None] = [None]  # None stands for what waits for all roots
        postponed: list[tuple[int | None, int]] = []
        at = 0
        while pending and (at < len(tape) or postponed):
            if at < len(tape):
                operation, first = tape[at], 0
                at += 1
            else:
                operation, first = postponed.pop()
            inputs = roots if operation is None else self.operations[operation].inputs
            for i in range(first, len(inputs)):
                maker = self.maker.get(inputs[i])
                if maker is None:
                    continue
                if len(tape) - at >= WIDTH:
                    postponed.append((operation, i))
                    break
                pending[maker] -= 1
                if pending[maker] == 0:
                    del pending[maker]
                    tape.append(maker)
        return [operation for operation in reversed(tape) if operation is not None]

    def _edges(self, roots: Sequence[str]) -> Counter[int]:
        """How many readers each operation has that the roots depend on."""
        edges: Counter[int] = Counter()
        todo = list(roots)
        while todo:
            maker = self.maker.get(todo.pop())
            if maker is None:
                continue
            if maker not in edges:
                todo += self.operations[maker].inputs
            edges[maker] += 1
        return edges


class _Memory:
    """Buffers and who refers to them, as the operations of a graph run one after the other."""

    def __init__(self, graph: _Graph, order: Sequence[int]):
        self._graph, self._order = graph, order
        self._uses: Counter[str] = Counter(graph.outputs)
        for i in order:
            self._uses.update(graph.operations[i].inputs)
        self._buffer: dict[str, str] = {}  # array -> the buffer that it lies in
        self._strides: dict[str, tuple[int, ...]] = {}  # of arrays whose rows are not dense
        self._readers: Counter[str] = Counter()
        self._size: dict[str, int] = {}
        self._live = self._peak = 0
        self._flying: deque[tuple[int, list[str]]] = deque()
        self._handed = 0  # tasks that the device was given so far

    def peak(self) -> int:
        """Bytes at the most."""
        for name in self._graph.inputs:
            self._allocate(name)
        for i in self._order:
            self._run(self._graph.operations[i])
        return self._peak

    def _run(self, operation: _Operation) -> None:
        self._land(0 if operation.name == "StopGradient" else IN_FLIGHT)  # a wait: see `moe`
        read = [self._buffer[name] for name in operation.inputs if name in self._buffer]
        strides = self._view(operation)
        if strides is None:
            self._handed += 2  # the work, and the end of what it reads
            self._write(operation, read)
        else:
            self._handed += 1
            self._look(operation, strides)
        self._flying.append((self._handed, read))

    def _allocate(self, name: str) -> None:
        self._buffer[name] = name
        self._readers[name] = self._uses[name]
        self._take(name, self._graph.nbytes[name])
        if not self._readers[name]:
            self._readers[name] = 1
            self._flying.append((self._handed, [name]))

    def _take(self, buffer: str, n_bytes: int) -> None:
        self._size[buffer] = n_bytes
        self._live += n_bytes
        self._peak = max(self._peak, self._live)

    def _land(self, n_left: int) -> None:
        while self._flying and self._flying[0][0] <= self._handed - n_left:
            for buffer in self._flying.popleft()[1]:
                self._readers[buffer] -= 1
                if self._readers[buffer] == 0:
                    self._live -= self._size.pop(buffer)

    def _strides_of(self, name: str) -> tuple[int, ...]:
        return self._strides.get(name) or dense_strides(self._graph.shapes[name])

    def _view(self, operation: _Operation) -> tuple[int, ...] | None:
        """The strides of what only looks at its first input; None for what writes."""
        if operation.name not in _VIEWS:
            return None
        source = operation.inputs[0]
        before, after = self._graph.shapes[source], self._graph.shapes[operation.outputs[0]]
        strides = self._strides_of(source)
        match operation.name:
            case "Transpose":
                return tuple(strides[axis] for axis in operation.arguments[0])
            case "Slice":
                steps = operation.arguments[2]
                return tuple(a * b for a, b in zip(strides, steps, strict=True))
            case "Broadcast":
                grown = (0,) * (len(after) - len(before)) + strides
                was = (1,) * (len(after) - len(before)) + before
                return tuple(s if a == b else 0 for s, a, b in zip(grown, was, after, strict=True))
            case "Split":
                return strides
            case "AsStrided":
                return tuple(operation.arguments[1])
            case "Contiguous":
                return strides if is_dense(before, strides) else None
            case _:
                return reshaped_strides(before, strides, after)

    def _look(self, operation: _Operation, strides: tuple[int, ...]) -> None:
        source = operation.inputs[0]
        for name in operation.outputs:
            if not is_dense(self._graph.shapes[name], strides):
                self._strides[name] = strides
            if source in self._buffer:  # constants are weights
                self._buffer[name] = buffer = self._buffer[source]
                self._readers[buffer] += self._uses[name]

    def _write(self, operation: _Operation, read: list[str]) -> None:
        for name in operation.outputs:
            donor = self._donor(operation, name)
            if donor is None:
                self._allocate(name)
            else:  # it is the result's from here on
                self._buffer[name] = donor
                self._readers[donor] += self._uses[name] - 1
                read.remove(donor)
        if operation.name in _PRODUCTS:
            for i, name in enumerate(operation.inputs):
                if self._is_copied(name):
                    copy = f"{operation.outputs[0]} {i}"
                    self._readers[copy] = 1
                    self._take(copy, self._graph.nbytes[name])
                    read.append(copy)

    def _is_copied(self, name: str) -> bool:
        """Whether a product needs dense matrices of its own: rows or columns must lie together."""
        if name not in self._strides:
            return False
        (*_, rows, columns), (*_, row, column) = self._graph.shapes[name], self._strides[name]
        return not (column == 1 and row == columns) and not (row == 1 and column == rows)

    def _donor(self, operation: _Operation, name: str) -> str | None:
        """The buffer of an input that nobody else reads, if the result may lie in it."""
        if operation.name not in _IN_PLACE:
            return None
        size = self._graph.nbytes[name]
        for source in operation.inputs:
            buffer = self._buffer.get(source)
            if buffer is None or self._uses[source] != 1 or self._readers[buffer] != 1:
                continue
            if size <= self._size[buffer] <= size + _DONATION_SLACK:
                return buffer
        return None


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Steps between neighbours along each axis of values that lie in order."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether values lie in order without gaps; axes of one value do not matter."""
    rows = zip(shape, strides, dense_strides(shape), strict=True)
    return all(n == 1 or stride == dense for n, stride, dense in rows)


def reshaped_strides(
    before: Sequence[int], strides: Sequence[int], after: Sequence[int]
) -> tuple[int, ...] | None:
    """Strides of a view in another shape; None where that takes a copy."""
    old = [(n, stride) for n, stride in zip(before, strides, strict=True) if n != 1]
    new: list[int] = []
    for n in after:
        if n == 1:
            new.append(1)
            continue
        while old and old[0][0] < n and len(old) > 1:
            (outer, step), (inner, stride) = old[:2]
            if step != inner * stride:
                return None
            old[:2] = [(outer * inner, stride)]
        if not old or old[0][0] % n:
            return None
        rest, stride = old[0][0] // n, old[0][1]
        new.append(rest * stride)
        old[:1] = [(rest, stride)] if rest > 1 else []
    return tuple(new)
