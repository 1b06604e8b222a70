"""How deep and how costly a grammar is, measured before llguidance reads it.

llguidance compiles recursively: a grammar that is deep through its references (`$ref`, rules,
terminals) overflows the stack of the thread that compiles it. So references are followed here, and
what is too deep is refused.

    weight = schema_weight(schema)  # or lark_weight(text), regex_weight(text)
    weight.check()
    if weight.is_light: ...         # it compiles in well under a second

A depth is an upper bound: of what refers to itself in a circle, all members count. Nothing here
recurses. A grammar in a notation of Lark may hide references from this reading; unless it is light
it is compiled in another process first (`grammar_compiler`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from mlxkv.errors import UsageError
from mlxkv.parsers.json_schema import Schemas

MAX_DEPTH = 1000
"""Levels: 10 KiB of stack each at most, as measured with llguidance 1.9.1."""
MAX_REPEATS = 10_000_000
"""Of one part of a regular expression: the counts of the groups around it, multiplied."""
MAX_MULTIPLES = 100_000
"""Sum of a schema's `multipleOf`, each a state of an automaton: 100,000 compile in 1.2 s."""
_MAX_PARTS = 200_000
"""Objects and lists of a schema that are looked at, again for each reference to them."""
_MAX_UNREAD = 20
"""Places in a grammar that look like a JSON schema and are none, as in comments."""
_LIGHT_DEPTH, _LIGHT_SIZE, _LIGHT_RULES, _LIGHT_MULTIPLES = 100, 32_768, 100, 10_000

# What has no end goes to the end (of the line), or looking for it would take quadratic time.
_REGEX_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*+\]?|\{\d{1,18}(?:,\d{0,18})?\}|[()]|[^\\\[(){]++",
    re.DOTALL,
)
_LARK_TOKEN = re.compile(
    r'(?P<string>"(?:\\.|[^"\\\n])*+"?)'
    r"|(?P<regex>/(?:\\.|[^/\\\n])++/?)"
    r"|(?P<json>%json\s*+)"
    r"|(?P<rule>^[ \t]*+[?!]?(?P<name>[A-Za-z_][\w-]*+)[ \t]*+(?=[:\[.{(]))"
    r"|(?P<used>[A-Za-z_][\w-]*+)"
    r"|(?P<open>[(\[{])|(?P<close>[)\]}])",
    re.MULTILINE,
)
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Weight:
    """What a grammar costs to compile.

    Args:
        depth: levels, references followed.
        size: characters.
        repeats: the most that one part of a regular expression repeats.
        multiples: see `MAX_MULTIPLES`.
        n_rules: rules and terminals.
    """

    depth: int = 0
    size: int = 0
    repeats: int = 1
    multiples: int = 0
    n_rules: int = 0

    def __or__(self, other: Weight) -> Weight:
        """Of a grammar that has both."""
        return Weight(
            max(self.depth, other.depth),
            self.size + other.size,
            max(self.repeats, other.repeats),
            self.multiples + other.multiples,
            self.n_rules + other.n_rules,
        )

    @property
    def is_light(self) -> bool:
        """Whether it compiles in well under a second."""
        return (
            self.depth <= _LIGHT_DEPTH
            and self.size <= _LIGHT_SIZE
            and self.n_rules <= _LIGHT_RULES
            and self.multiples <= _LIGHT_MULTIPLES
        )

    def check(self) -> None:
        """Refuse what is out of bounds.

        Raises:
            UsageError: says which bound.
        """
        if self.depth > MAX_DEPTH:
            raise UsageError(
                f"the grammar nests {self.depth:,} levels deep, its references followed; at most "
                f"{MAX_DEPTH:,} are allowed"
            )
        if self.repeats > MAX_REPEATS:
            raise UsageError(
                f"the grammar repeats a part {self.repeats:,} times; at most {MAX_REPEATS:,} are "
                "allowed"
            )
        if self.multiples > MAX_MULTIPLES:
            raise UsageError(
                f"multipleOf of the JSON schema come to {self.multiples:,} together; at most "
                f"{MAX_MULTIPLES:,} are allowed"
            )


def schema_weight(root: Any, size: int = 0) -> Weight:
    """Of a JSON schema.

    Args:
        size: its characters.

    Raises:
        UsageError: it has more parts than are looked at.
    """
    schemas, graph, waiting = Schemas(root), _Graph(), ["#"]
    found, steps, n_left = Weight(size=size), _Multiples(), _MAX_PARTS
    while waiting:
        name = waiting.pop()
        if name in graph.depths:
            continue
        try:
            target = schemas.resolve(name)
        except UsageError:  # it names what lies elsewhere: nothing, or all there is
            target = root
        depth, references = 0, set()
        for each, level in _nested(target, but_definitions=name == "#"):
            depth, n_left = max(depth, level), n_left - 1
            if n_left < 0:
                raise UsageError(
                    f"the JSON schema has more than {_MAX_PARTS:,} parts, its references followed"
                )
            if not isinstance(each, Mapping):
                continue
            if isinstance(reference := each.get("$ref"), str):
                references.add(reference)
            found |= _patterns(each)
            steps.add(each)
        graph.add(name, depth, references)
        waiting += references
    return found | Weight(graph.longest(), multiples=steps.total())


def lark_weight(text: str) -> Weight:
    """Of a grammar in llguidance's dialect of Lark; JSON schemas and patterns within it count."""
    graph, found = _Graph(), Weight(size=len(text))
    name, depth, nesting, used, at, n_unread = "", 1, 0, set(), 0, 0
    while (match := _LARK_TOKEN.search(text, at)) is not None:
        at = match.end()
        match match.lastgroup:
            case "rule":
                if text[at] != ":":  # it may be a name in the body of the rule before it
                    used.add(match["name"])
                graph.add(name, depth, used)
                name, depth, nesting, used = match["name"], 1, 0, set()
                found |= Weight(n_rules=1)
            case "used":
                used.add(match["used"])
            case "regex":
                inner = regex_weight(match["regex"])
                found |= Weight(repeats=inner.repeats)
                depth = max(depth, 1 + nesting + inner.depth)
            case "json":
                try:
                    schema, at = _DECODER.raw_decode(text, at)
                except (ValueError, RecursionError) as error:
                    n_unread += 1
                    if n_unread > _MAX_UNREAD:
                        raise UsageError(f"JSON of the grammar cannot be read: {error}") from None
                    continue
                inner = schema_weight(schema)
                found |= inner
                depth = max(depth, 1 + nesting + inner.depth)
            case "open":
                nesting += 1
                depth = max(depth, 1 + nesting)
            case "close":
                nesting = max(0, nesting - 1)
    graph.add(name, depth, used)
    return found | Weight(graph.longest())


def regex_weight(text: str) -> Weight:
    """Of a regular expression: how deep its groups nest, and how often a part repeats."""
    depth, most, last, open_groups = 0, 1, 1, []
    inner = 1  # the most that a part of the group that is open repeats
    for token in _REGEX_TOKEN.findall(text):
        if token == "(":
            open_groups.append(inner)
            inner, depth, last = 1, max(depth, len(open_groups)), 1
        elif token == ")" and open_groups:
            last, outer = inner, open_groups.pop()
            inner = max(outer, last)
        elif token[0] == "{":
            last *= max(1, *(int(n) for n in re.findall(r"\d+", token)))
            inner = max(inner, last)
        else:
            last = 1
        most = max(most, inner)
    return Weight(depth, len(text), min(most, 10**18))


def _nested(root: Any, but_definitions: bool) -> Iterator[tuple[Any, int]]:
    """The objects and lists in a JSON value, and how deep each is.

    Args:
        but_definitions: leave out the root's own, which only count where something refers to them.
    """
    waiting: list[tuple[Any, int]] = [(root, 1)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, Mapping):
            inner = value.items()
            if but_definitions and depth == 1:
                inner = [(k, v) for k, v in inner if k not in ("$defs", "definitions")]
            waiting += [(each, depth + 1) for _, each in inner]
        elif isinstance(value, list):
            waiting += [(each, depth + 1) for each in value]
        else:
            continue
        yield value, depth


def _patterns(schema: Mapping[str, Any]) -> Weight:
    """Of the regular expressions of a schema; their characters are counted with the schema's."""
    patterns = [schema.get("pattern")]
    if isinstance(of_names := schema.get("patternProperties"), Mapping):
        patterns += of_names
    found = Weight()
    for pattern in patterns:
        if isinstance(pattern, str):
            found |= Weight(repeats=regex_weight(pattern).repeats)
    return found


class _Multiples:
    """Sums up `multipleOf`; where parts of a schema meet, it may be their common multiple."""

    def __init__(self) -> None:
        self._sum, self._different = 0, set[int]()
        self._meet = False

    def add(self, schema: Mapping[str, Any]) -> None:
        """One more schema."""
        self._meet |= "allOf" in schema or ("$ref" in schema and "multipleOf" in schema)
        value = schema.get("multipleOf")
        if isinstance(value, int | float) and not isinstance(value, bool):
            n = _n_steps(value)
            self._sum += n
            self._different.add(n)

    def total(self) -> int:
        """What all of them come to, at most some more than is allowed."""
        if not self._meet:
            return self._sum
        common = 1
        for n in self._different:
            common = min(math.lcm(common, n), 10**18)
        return max(self._sum, common)


def _n_steps(value: float) -> int:
    """A `multipleOf` without the zeros behind its point: 0.25 is 25."""
    try:
        number = Decimal(str(value)).normalize()
        _, digits, exponent = number.as_tuple()
        zeros = exponent if isinstance(exponent, int) else 0
        n = int("".join(map(str, digits))) * 10 ** min(max(zeros, 0), 18)
    except (InvalidOperation, ValueError):
        return 0
    return min(n, 10**18)


class _Graph:
    """What refers to what, and how deep each is by itself."""

    def __init__(self) -> None:
        self.depths: dict[Hashable, int] = {}
        self._references: dict[Hashable, set[Hashable]] = {}

    def add(self, name: Hashable, depth: int, references: Iterable[Hashable]) -> None:
        """One more; of what is there already, both count."""
        self.depths[name] = max(depth, self.depths.get(name, 0))
        self._references.setdefault(name, set()).update(references)

    def longest(self) -> int:
        """The most levels on a way along the references; of a circle, all its members."""
        found: dict[Hashable, int] = {}
        for circle in self._circles():
            behind = {each for name in circle for each in self._references[name]}
            beyond = max((found[each] for each in behind if each in found), default=0)
            total = sum(self.depths[name] for name in circle) + beyond
            found |= dict.fromkeys(circle, total)
        return max(found.values(), default=0)

    def _circles(self) -> Iterator[list[Hashable]]:
        """Strongly connected parts, those referred to first (Tarjan's algorithm, no recursion)."""
        index: dict[Hashable, int] = {}
        lowest: dict[Hashable, int] = {}
        path: dict[Hashable, None] = {}
        for root in self.depths:
            if root in index:
                continue
            work = [(root, self._known(root))]
            index[root] = lowest[root] = len(index)
            path[root] = None
            while work:
                name, rest = work[-1]
                for each in rest:
                    if each not in index:
                        index[each] = lowest[each] = len(index)
                        path[each] = None
                        work.append((each, self._known(each)))
                        break
                    if each in path:
                        lowest[name] = min(lowest[name], index[each])
                else:
                    work.pop()
                    if work:
                        lowest[work[-1][0]] = min(lowest[work[-1][0]], lowest[name])
                    if lowest[name] == index[name]:
                        circle = [path.popitem()[0]]
                        while circle[-1] != name:
                            circle.append(path.popitem()[0])
                        yield circle

    def _known(self, name: Hashable) -> Iterator[Hashable]:
        return iter([each for each in self._references[name] if each in self.depths])
