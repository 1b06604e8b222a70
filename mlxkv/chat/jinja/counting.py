"""Rewrites a parsed template so that it counts: operators become filters of the sandbox."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, nodes
from jinja2.visitor import NodeTransformer


class Counting(NodeTransformer):
    """Has a template count its loop rounds, and what its operators and blocks build.

    Args:
        environment: the template's.
        nests: whether lists in lists may come out.
    """

    def __init__(self, environment: Environment, nests: bool):
        self._environment, self._nests = environment, nests
        self._n_kept = 0  # blocks around a node whose text is kept

    def _filter(self, name: str, node: nodes.Node, args: list[Any], lineno: int) -> nodes.Filter:
        return nodes.Filter(
            node, name, args, [], None, None, lineno=lineno, environment=self._environment
        )

    def _kept(self, node: nodes.Node) -> nodes.Node:
        self._n_kept += 1
        self.generic_visit(node)
        self._n_kept -= 1
        return node

    visit_Macro = visit_CallBlock = visit_FilterBlock = visit_AssignBlock = _kept

    def visit_For(self, node: nodes.For) -> nodes.For:
        n_chars = 0
        if self._n_kept:
            n_chars = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.iter = self._filter("_counted", node.iter, [nodes.Const(n_chars)], node.lineno)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        node.nodes = [self._written(each) for each in node.nodes]
        return node

    def _written(self, node: nodes.Expr) -> nodes.Expr:
        """What is written: a sum of texts counts where it is."""
        is_text = _is_text(node)
        if isinstance(node, nodes.Add):
            self._terms(node)
        else:
            node = self.visit(node)
        if isinstance(node, nodes.TemplateData | nodes.Const):
            return node
        if self._n_kept or (self._nests and not is_text):
            return self._filter("_output", node, [], node.lineno)
        return node

    def _terms(self, node: nodes.Add) -> None:
        while isinstance(node.left, nodes.Add):
            node.right = self.visit(node.right)
            node = node.left
        node.left, node.right = self.visit(node.left), self.visit(node.right)

    def visit_Add(self, node: nodes.Add) -> nodes.Expr:
        self.generic_visit(node)
        if any(
            isinstance(each, nodes.Const) and not isinstance(each.value, str)
            for each in (node.left, node.right)
        ):
            return node  # a number
        return self._filter("_add", node.left, [node.right], node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        parts = nodes.Tuple(node.nodes, "load", lineno=node.lineno)
        return self._filter("_concat", parts, [], node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        if len(node.ops) != 1:
            return node
        op, other = node.ops[0].op, node.ops[0].expr
        if op in ("in", "notin"):
            found = self._filter("_is_in", node.expr, [other], node.lineno)
        elif self._nests and op in ("eq", "ne") and not (_is_text(node.expr) or _is_text(other)):
            found = self._filter("_is_equal", node.expr, [other], node.lineno)
        else:
            return node
        return nodes.Not(found, lineno=node.lineno) if op in ("notin", "ne") else found

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        args = [nodes.Const(None) if bound is None else bound for bound in bounds]
        return self._filter("_sliced", node.node, args, node.lineno)


def nests(tree: nodes.Template) -> bool:
    """Whether a template may put lists into lists, and so build more text than it has parts."""
    literals = tree.find_all((nodes.List, nodes.Tuple, nodes.Dict))
    if any(not _is_constant(each) and getattr(each, "ctx", "load") == "load" for each in literals):
        return True
    if any(
        each.name in ("batch", "slice", "groupby", "items") for each in tree.find_all(nodes.Filter)
    ):
        return True
    called = (call.node for call in tree.find_all(nodes.Call))
    return any(isinstance(each, nodes.Name) and each.name == "dict" for each in called)


def _is_constant(node: nodes.Node) -> bool:
    parts = node.find_all((nodes.Name, nodes.Getattr, nodes.Getitem, nodes.Call))
    return next(iter(parts), None) is None


def _is_text(node: nodes.Node) -> bool:
    """Whether an expression is a text, or fails."""
    if isinstance(node, nodes.Add):
        return _is_text(node.left) or _is_text(node.right)
    if isinstance(node, nodes.Filter):
        return node.name in ("trim", "tojson", "string", "upper", "lower", "replace", "join")
    is_constant = isinstance(node, nodes.Const) and isinstance(node.value, str)
    return is_constant or isinstance(node, nodes.Concat | nodes.TemplateData)
