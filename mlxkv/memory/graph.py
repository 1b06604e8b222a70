"""The graph of a step, as MLX exports it, in the order in which MLX evaluates it.

MLX's `eval` walks breadth first from the results, no wider than `WIDTH`, and runs that backwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx

WIDTH = 20
"""MLX_BFS_MAX_WIDTH of MLX."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a graph, with the names of the arrays it reads and writes."""

    name: str
    arguments: Sequence[Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Graph:
    """The operations of a function, and the shapes of the arrays that they read and write."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.nbytes: dict[str, int] = {}
        self.maker: dict[str, int] = {}

    @classmethod
    def of(cls, function: Callable[..., list[mx.array]], *arguments: mx.array) -> Graph:
        """Record the graph of a function; nothing is computed.

        Raises:
            ValueError, RuntimeError: MLX cannot export one of its operations.
        """
        graph = cls()
        mx.export_function(graph._record, function, *arguments)  # pyright: ignore[reportArgumentType]
        return graph

    def _record(self, entry: dict[str, Any]) -> None:
        match entry["type"]:
            case "inputs":
                self.inputs = [self._add_array(x) for x in entry["inputs"]]
            case "outputs":
                self.outputs = [self._add_array(x) for x in entry["outputs"]]
            case "primitive":
                inputs = tuple(self._add_array(x) for x in entry["inputs"])
                outputs = tuple(self._add_array(x) for x in entry["outputs"])
                self.maker |= dict.fromkeys(outputs, len(self.operations))
                arguments = entry["arguments"]
                self.operations.append(Operation(entry["name"], arguments, inputs, outputs))

    def _add_array(self, array: tuple[str, tuple[int, ...], mx.Dtype]) -> str:
        name, shape, dtype = array
        self.shapes[name], self.nbytes[name] = shape, prod(shape) * dtype.size
        return name

    def order(self, n_roots: int) -> list[int]:
        """Operations in the order in which MLX evaluates the first outputs."""
        roots = self.outputs[:n_roots]
        pending = self._edges(roots)
        tape: list[int | None] = [None]  # None is the operation that waits for all roots
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
        """The number of readers of each operation that the roots depend on."""
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
