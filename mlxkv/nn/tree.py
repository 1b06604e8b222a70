"""Copies of a tree of modules with others in some places; what is the same is shared.

A copy is a model of its own on the same arrays: nothing of the original is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.nn as nn

Swap = Callable[[Any, Any, Any], nn.Module | None]
"""(module or list, name in it, what is there) -> what takes its place; None to look inside it."""


def replaced(node: Any, swap: Swap, done: dict[int, Any] | None = None) -> Any:
    """A tree with other modules in some places; the tree itself where there are none of them.

    Args:
        node: the tree.
        swap: says what is replaced.
        done: of calls for its parts.
    """
    done = {} if done is None else done
    if not isinstance(node, nn.Module | list):
        return node
    if id(node) not in done:
        found = {}
        for name, child in children(node):
            new = swap(node, name, child)
            found[name] = replaced(child, swap, done) if new is None else new
        done[id(node)] = with_children(node, found)
    return done[id(node)]


def merged(
    nodes: Sequence[Any], merge: Callable[[Sequence[Any]], nn.Module | None], done: dict[Any, Any]
) -> Any:
    """One tree of several that differ in some places.

    Args:
        nodes: the original, and copies of it by `replaced`.
        merge: makes one module of those in a place where they differ; None to look inside them.
        done: empty.
    """
    first = nodes[0]
    if all(node is first for node in nodes):
        return first
    key = tuple([id(node) for node in nodes])
    if key not in done:
        made = merge(nodes) if isinstance(first, nn.Module) else None
        if made is None:
            found = {
                name: merged([child, *(node[name] for node in nodes[1:])], merge, done)
                for name, child in children(first)
                if isinstance(child, nn.Module | list)
            }
            made = with_children(first, found)
        done[key] = made
    return done[key]


def children(node: Any) -> Iterator[tuple[Any, Any]]:
    """Names and values of a module, or of a list."""
    return iter(enumerate(node) if isinstance(node, list) else dict.items(node))


def with_children(node: Any, found: Mapping[Any, Any]) -> Any:
    """A node with some of its children, as a copy where one of them is another."""
    if all(node[name] is child for name, child in found.items()):
        return node
    if isinstance(node, list):
        return [found.get(i, child) for i, child in enumerate(node)]
    copy = copied(node)
    dict.update(copy, found)
    return copy


def copied(module: nn.Module, kind: type[nn.Module] | None = None) -> Any:
    """A shallow copy of a module.

    Args:
        module: whose children and arrays are shared.
        kind: the copy's class, which needs nothing that its `__init__` would set; None for the
            same.
    """
    kind = kind or type(module)
    copy = nn.Module.__new__(kind)
    copy.__dict__.update(module.__dict__)
    dict.update(copy, module)
    return copy
