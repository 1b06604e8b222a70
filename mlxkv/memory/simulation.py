"""The memory that a graph takes, operation by operation, as MLX would allocate it.

An array is freed after its last reader; in-place operations write into their input; views take
nothing. Work is queued on the device, so operations in flight still hold what they read.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from math import prod

from mlxkv.base import device
from mlxkv.memory.graph import Graph, Operation

IN_FLIGHT = 105
"""Tasks that are queued before the first must be done: an operation is two, a view one. MLX's CPU
backend waits where ten tens of them are not done, and then queues the next ten: 105 on average."""
_DONATION_SLACK = 16384
"""Bytes by which MLX lets a donated buffer be larger than the result."""

_VIEWS = frozenset(
    ("Broadcast", "ExpandDims", "Squeeze", "Slice", "Transpose", "Unflatten", "Split",
     "StopGradient", "AsStrided", "Depends", "View", "Copy", "Reshape", "Flatten", "Contiguous")
)  # fmt: skip
_STAND_INS = frozenset(("ArcTanh", "Depends"))
"""Operations of `nn.stand_ins` whose tasks are those of others beside them."""
_PRODUCTS = frozenset(("Matmul", "AddMM", "QuantizedMatmul"))
_IN_PLACE = frozenset(
    ("Abs", "Add", "AsType", "BitwiseBinary", "Cos", "Divide", "Equal", "Erf", "Exp", "Floor",
     "Greater", "GreaterEqual", "Less", "LessEqual", "Log", "LogicalAnd", "LogicalNot",
     "LogicalOr", "Maximum", "Minimum", "Multiply", "Negative", "NotEqual", "Power", "RMSNorm",
     "Remainder", "Scatter", "ScatterAxis", "Select", "Sigmoid", "Sin", "SliceUpdate", "Softmax",
     "Sqrt", "Square", "Subtract", "Tanh")
)  # fmt: skip


class Memory:
    """Buffers and their readers, as the operations of a graph run one after the other."""

    def __init__(self, graph: Graph, order: Sequence[int]):
        self._graph, self._order = graph, order
        self._uses: Counter[str] = Counter(graph.outputs)
        for i in order:
            self._uses.update(graph.operations[i].inputs)
        self._buffer: dict[str, str] = {}  # array -> the buffer that it lies in
        self._strides: dict[str, tuple[int, ...]] = {}  # of arrays whose rows are not dense
        self._readers: Counter[str] = Counter()
        self._size: dict[str, int] = {}
        self._live = self._peak = 0
        self._in_flight: deque[tuple[int, list[str]]] = deque()
        self._n_queued = 0  # tasks so far

    def peak(self) -> int:
        """The most bytes that are alive at once."""
        for name in self._graph.inputs:
            self._allocate(name)
        for i in self._order:
            self._run(self._graph.operations[i])
        return self._peak

    def _run(self, operation: Operation) -> None:
        self._finish(0 if operation.name == "StopGradient" else IN_FLIGHT)  # a wait: see `moe`
        read = [self._buffer[name] for name in operation.inputs if name in self._buffer]
        strides = self._view(operation)
        if strides is None:
            self._n_queued += _n_tasks(operation)
            self._write(operation, read)
        else:
            self._n_queued += operation.name not in _STAND_INS
            self._alias(operation, strides)
            self._release(read)  # its task holds nothing
            read = []
        self._in_flight.append((self._n_queued, read))

    def _allocate(self, name: str) -> None:
        self._buffer[name] = name
        self._readers[name] = self._uses[name]
        self._add_buffer(name, self._graph.nbytes[name])
        if not self._readers[name]:
            self._readers[name] = 1
            self._in_flight.append((self._n_queued, [name]))

    def _add_buffer(self, buffer: str, n_bytes: int) -> None:
        self._size[buffer] = n_bytes
        self._live += n_bytes
        self._peak = max(self._peak, self._live)

    def _finish(self, n_left: int) -> None:
        while self._in_flight and self._in_flight[0][0] <= self._n_queued - n_left:
            self._release(self._in_flight.popleft()[1])

    def _release(self, buffers: Sequence[str]) -> None:
        for buffer in buffers:
            self._readers[buffer] -= 1
            if self._readers[buffer] == 0:
                self._live -= self._size.pop(buffer)

    def _strides_of(self, name: str) -> tuple[int, ...]:
        return self._strides.get(name) or dense_strides(self._graph.shapes[name])

    def _view(self, operation: Operation) -> tuple[int, ...] | None:
        """The strides of a view of the first input; None for an operation that writes."""
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

    def _alias(self, operation: Operation, strides: tuple[int, ...]) -> None:
        source = operation.inputs[0]
        for name in operation.outputs:
            if not is_dense(self._graph.shapes[name], strides):
                self._strides[name] = strides
            if source in self._buffer:  # constants are weights
                self._buffer[name] = buffer = self._buffer[source]
                self._readers[buffer] += self._uses[name]

    def _write(self, operation: Operation, read: list[str]) -> None:
        for name in operation.outputs:
            donor = self._donor(operation, name)
            if donor is None:
                self._allocate(name)
            else:
                self._buffer[name] = donor
                self._readers[donor] += self._uses[name] - 1
                read.remove(donor)
        for i, n_bytes in self._copies(operation):
            copy = f"{operation.outputs[0]} {i}"
            self._readers[copy] = 1
            self._add_buffer(copy, n_bytes)
            read.append(copy)

    def _copies(self, operation: Operation) -> Iterator[tuple[int, int]]:
        """Inputs that an operation copies, by index, and the bytes of the copy."""
        if operation.name in _PRODUCTS:
            factors = operation.inputs[:2]  # not what is added to the product
            if operation.name == "QuantizedMatmul":
                factors = operation.inputs
            for i, name in enumerate(factors):
                if self._is_copied(name):
                    yield i, self._graph.nbytes[name]
        elif operation.name == "Convolution" and device.on_cpu():
            yield 0, self._convolution_bytes(operation)

    def _convolution_bytes(self, operation: Operation) -> int:
        """What the CPU backend's convolution holds: its padded input, and the input of each value
        of the result side by side; of 16 bits the latter in both, and the padded input is gone by
        then. Grouped ones of two axes and more hold nothing.
        """
        source, kernel = (self._graph.shapes[name] for name in operation.inputs)
        result = self._graph.shapes[operation.outputs[0]]
        _, before, after, _, _, groups, _ = operation.arguments
        if groups > 1 and len(before) > 1:
            return 0
        B, *sizes, C = source
        size = self._graph.nbytes[operation.inputs[0]] // prod(source)
        padded = B * C * prod(map(sum, zip(sizes, before, after, strict=True)))
        patches = prod(result[:-1]) * prod(kernel[1:-1]) * C
        return size * (padded + patches) if size == 4 else patches * (size + 4)

    def _is_copied(self, name: str) -> bool:
        """Whether a product copies an array: neither its rows nor its columns are contiguous."""
        if name not in self._strides:
            return False
        (*_, rows, columns), (*_, row, column) = self._graph.shapes[name], self._strides[name]
        return not (column == 1 and row == columns) and not (row == 1 and column == rows)

    def _donor(self, operation: Operation, name: str) -> str | None:
        """The buffer of an input without other readers, if the result may be written there."""
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


def _n_tasks(operation: Operation) -> int:
    """Tasks of an operation that writes: its work, and the release of what it reads."""
    match operation.name:
        case "Concatenate":
            return len(operation.inputs) + 1  # each input's copy
        case "AddMM" | "Pad":
            return 3  # what is added, or the padding, is copied first
        case name if name in _STAND_INS:
            return 0
        case _:
            return 2


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous array."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether an array is contiguous; axes of one value do not matter."""
    rows = zip(shape, strides, dense_strides(shape), strict=True)
    return all(n == 1 or stride == dense for n, stride, dense in rows)


def reshaped_strides(
    before: Sequence[int], strides: Sequence[int], after: Sequence[int]
) -> tuple[int, ...] | None:
    """Strides of a view in another shape; None where only a copy has that shape."""
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
