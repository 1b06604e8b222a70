"""What Metal does for a graph: kernels that it launches, and copies that no operation names.

A view (a slice, a transpose, a reshape that strides allow) launches nothing. Any other operation
counts as one launch, a concatenation as one for each part. Some kernels want their inputs dense
and copy them first if they are not: strides are followed from array to array to see where.

Taken as given, for a graph does not show them: an update writes in place (its buffer is donated),
and a sort, a scan or a reduction of a long row is one launch, where Metal may take several.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxkv.memory.simulation import reshaped_strides

VIEWS = frozenset(
    {
        "AsStrided",
        "Broadcast",
        "BroadcastAxes",
        "Copy",
        "Depends",
        "ExpandDims",
        "NumberOfElements",
        "Slice",
        "Split",
        "Squeeze",
        "StopGradient",
        "Transpose",
        "View",
    }
)
RESHAPES = frozenset(("Contiguous", "Flatten", "Reshape", "Unflatten"))
COPIES = frozenset(("AsType", "Concatenate", "Gather", "GatherAxis", "Pad", "Select"))
"""Operations that write what they read to another place."""

ELEMENTWISE = frozenset(
    (
        "Add",
        "AsType",
        "Divide",
        "Exp",
        "Maximum",
        "Minimum",
        "Multiply",
        "Negative",
        "Sigmoid",
        "Sqrt",
        "Square",
        "Subtract",
        "Tanh",
    )
)
"""Operations whose result lies as their operands do, where those have the result's shape."""

_ITEMSIZE = {"bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "float16": 2, "bfloat16": 2}
_ITEMSIZE |= {"int64": 8, "uint64": 8, "float64": 8, "complex64": 8}

Strides = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Array:
    """An array of a graph."""

    id: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * _ITEMSIZE.get(self.dtype, 4)


@dataclass(frozen=True, slots=True)
class Op:
    """An operation of a graph; `arguments` are those that decide about strides."""

    name: str
    arguments: tuple[int, ...]
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]

    @property
    def out(self) -> Array:
        return self.outputs[0]

    @property
    def moves_nothing(self) -> bool:
        """Whether it is a view, or may be one."""
        return self.name in VIEWS or self.name in RESHAPES


@dataclass(slots=True)
class Counts:
    """Launches and hidden copies of a graph.

    Attributes:
        ops: its operations, in the order of their evaluation; empty results left out.
        kernels: launches by operation.
        hidden: copies that no operation names, by what makes them.
        hidden_bytes: their bytes, in the same way.
        copied: arrays that hidden copies copy.
    """

    ops: list[Op]
    kernels: Counter[str] = field(default_factory=Counter)
    hidden: Counter[str] = field(default_factory=Counter)
    hidden_bytes: Counter[str] = field(default_factory=Counter)
    copied: list[Array] = field(default_factory=list)

    @property
    def launches(self) -> int:
        return self.kernels.total() + self.hidden.total()

    def float32(self) -> dict[str, int]:
        """Operations that make float32 arrays, `Name [.., width]` -> how many; scalars aside."""
        found = Counter(
            f"{'Compiled' if op.name.startswith('Compiled') else op.name} [.., {x.shape[-1]}]"
            for op in self.ops
            if not op.moves_nothing
            for x in op.outputs
            if x.dtype in ("float32", "float64") and x.size > 1
        )
        return dict(sorted(found.items()))

    def rows_of(self, width: int) -> int:
        """The largest number of rows of this width that one operation makes."""
        made = (x for op in self.ops if not op.moves_nothing for x in op.outputs if x.shape)
        return max((x.size // width for x in made if x.shape[-1] == width), default=0)


def count(graph: Mapping[str, Any]) -> Counts:
    """Count a graph as `shim.graph` gives it."""
    ops = [
        Op(raw["name"], tuple(raw["arguments"]), _arrays(raw["inputs"]), _arrays(raw["outputs"]))
        for raw in graph["ops"]
    ]
    counter = _Counter(Counts([op for op in ops if op.out.size]))
    for op in counter.counts.ops:
        counter.add(op)
    return counter.counts


def _arrays(raw: Sequence[Sequence[Any]]) -> tuple[Array, ...]:
    return tuple(Array(id, dtype, tuple(shape)) for id, dtype, shape, _ in raw)


def dense(shape: Sequence[int]) -> Strides:
    """Strides of a row-contiguous array."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def is_dense(shape: Sequence[int], strides: Strides) -> bool:
    """Whether an array is row-contiguous; the stride of a single row does not matter."""
    wanted = zip(shape, strides, dense(shape), strict=True)
    return all(n == 1 or have == want for n, have, want in wanted)


class _Counter:
    """Follows strides through the operations, and counts."""

    def __init__(self, counts: Counts):
        self.counts = counts
        self._strides: dict[int, Strides] = {}

    def strides(self, x: Array) -> Strides:
        return self._strides.get(x.id) or dense(x.shape)

    def is_dense(self, x: Array) -> bool:
        return is_dense(x.shape, self.strides(x))

    def add(self, op: Op) -> None:
        if op.name in VIEWS:
            strides = self._of_view(op)
            self._strides |= {x.id: strides for x in op.outputs}
        elif op.name in RESHAPES:
            self._reshape(op)
        else:
            rule = _RULES.get(op.name)
            if rule is not None:
                rule(self, op)
            if op.name in ELEMENTWISE or op.name.startswith("Compiled"):
                self._elementwise(op)
            parts = sum(1 for x in op.inputs if x.size) if op.name == "Concatenate" else 1
            self.counts.kernels["Compiled" if op.name.startswith("Compiled") else op.name] += parts

    def _hide(self, kind: str, x: Array) -> None:
        self.counts.hidden[kind] += 1
        self.counts.hidden_bytes[kind] += x.nbytes
        self.counts.copied.append(x)

    def _of_view(self, op: Op) -> Strides:
        x, strides, shape = op.inputs[0], self.strides(op.inputs[0]), op.out.shape
        if op.name == "Transpose":
            return tuple(strides[axis] for axis in op.arguments)
        if op.name == "Slice":
            return tuple(a * b for a, b in zip(strides, op.arguments, strict=True))
        if op.name in ("Broadcast", "BroadcastAxes"):
            new = len(shape) - len(x.shape)
            kept = zip(x.shape, strides, shape[new:], strict=True)
            return (0,) * new + tuple(0 if n != m else stride for n, stride, m in kept)
        if op.name == "ExpandDims":
            wider = list(strides)
            for axis in op.arguments:
                wider.insert(axis, 1)
            return tuple(wider)
        if op.name == "Squeeze":
            return tuple(s for i, s in enumerate(strides) if i not in op.arguments)
        return strides if len(shape) == len(strides) and op.name != "View" else dense(shape)

    def _reshape(self, op: Op) -> None:
        x, shape = op.inputs[0], op.out.shape
        if op.name == "Contiguous":
            if not self.is_dense(x):
                self._hide("contiguous", x)
            return
        if self.is_dense(x):
            return
        strides = reshaped_strides(x.shape, self.strides(x), shape)
        if strides is None:
            self._hide("reshape", x)
        else:
            self._strides[op.out.id] = strides

    def _norm(self, op: Op) -> None:
        x, strides = op.inputs[0], self.strides(op.inputs[0])
        D, inner = x.shape[-1], strides[-1]
        rows_follow = x.shape[-2:-1] in ((), (1,)) or strides[-2] in (0, D)
        if inner == 1 and rows_follow and _has_no_gaps(x.shape, strides):
            self._strides[op.out.id] = strides
        else:
            self._hide("norm of a strided array", x)

    def _rope(self, op: Op) -> None:
        x, strides, (n_rotated,) = op.inputs[0], self.strides(op.inputs[0]), op.arguments
        shape = x.shape
        L, D, heads = shape[-2], shape[-1], math.prod(shape[1:-2])
        n_dims = len(shape)
        while n_dims > 3 and shape[-n_dims] == 1:
            n_dims -= 1
        # [B, L, H, D] seen as [B, H, L, D]
        heads_inside = len(shape) == 4 and strides[:3] == (L * heads * D, D, heads * D)
        if n_rotated < D:
            self._hide("rotation of a part", x)
        elif not (self.is_dense(x) or n_dims == 3 or heads_inside):
            self._hide("rotation of a strided array", x)

    def _quantized_product(self, op: Op) -> None:
        for x in op.inputs[:3]:
            strides = self.strides(x)
            if len(strides) > 1 and (strides[-1] != 1 or strides[-2] != x.shape[-1]):
                self._hide("quantized product of a strided array", x)

    def _product(self, op: Op) -> None:
        M, N = op.out.shape[-2:]
        for x, is_vector in zip(op.inputs[:2], (M == 1, N == 1), strict=True):
            (rows, row), (outer, inner) = x.shape[-2:], self.strides(x)[-2:]
            plain = inner == 1 and (not is_vector or outer == row)
            transposed = outer == 1 and (not is_vector or inner == rows)
            if not (plain or transposed):
                self._hide("product of a strided array", x)

    def _attention(self, op: Op) -> None:
        q, k, v = op.inputs[:3]
        _, H, L, D = op.out.shape
        if L > 8:
            for x in (q, k, v):
                if self.strides(x)[-1] != 1:
                    self._hide("attention on a strided array", x)
            self._strides[op.out.id] = (L * H * D, D, H * D, 1)
            return
        if not self._takes_query(q):
            self._hide("attention on a strided array", q)
        for x in (k, v):
            strides = self.strides(x)
            one_step = 1 in x.shape[:2] or strides[0] == strides[1] * x.shape[1]
            if strides[-1] != 1 or not one_step:
                self._hide("attention on strided keys", x)

    def _takes_query(self, q: Array) -> bool:
        if self.is_dense(q):
            return True
        if 1 not in q.shape[:2]:
            return False
        strides, other = self.strides(q), 1 if q.shape[0] == 1 else 0
        D = q.shape[3]
        return strides[3] == 1 and strides[2] == D * q.shape[other] and strides[other] == D

    def _elementwise(self, op: Op) -> None:
        """A kernel keeps the strides of dense operands, a single row's own stride too."""
        full = [x for x in op.inputs if x.shape == op.out.shape]
        if full and all(self.is_dense(x) for x in full):
            for out in op.outputs:
                if out.shape == op.out.shape:
                    self._strides[out.id] = self.strides(full[0])

    def _softmax(self, op: Op) -> None:
        if self.strides(op.inputs[0])[-1] != 1:
            self._hide("softmax of a strided array", op.inputs[0])


_RULES = {
    "RMSNorm": _Counter._norm,
    "RoPE": _Counter._rope,
    "QuantizedMatmul": _Counter._quantized_product,
    "GatherQMM": _Counter._quantized_product,
    "Matmul": _Counter._product,
    "AddMM": _Counter._product,
    "GatherMM": _Counter._product,
    "ScaledDotProductAttention": _Counter._attention,
    "Softmax": _Counter._softmax,
}


def _has_no_gaps(shape: Sequence[int], strides: Strides) -> bool:
    """Whether the elements fill their span in memory, in some order of the axes."""
    step = 1
    for stride, n in sorted((s, n) for n, s in zip(shape, strides, strict=True) if n > 1):
        if stride == 0:
            continue
        if stride != step:
            return False
        step *= n
    return True
