"""Pages by groups of layers: what a model and its adapters share below the first that differs.

Where adapters change only the layers from a border on, the layers below compute the base's KV, and
hand the base's residual stream to the layer at the border. So a prompt that the base, or another
adapter, has computed needs the upper layers alone: from the stream that was kept of it.

Invariants:
- The base's own pages have all layers, as without adapters. `LowerPages` add what only adapters
  have computed; a page that the base has is not kept again.
- An adapter's own pages, `UpperPages`, have the layers from the border on. What they restore is
  what the layers below have as well.
- A stream is kept from position 0 on without a gap, of prompts: tokens of answers have none.
- The pages of a group are `Pages`, under names of the same chain of tokens. What tells them apart
  on disk is the fingerprint: the base's and the border, the adapter's for the upper layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from mlxkv.kv.layout import Cache
from mlxkv.kv.types import STEP, KVFormat
from mlxkv.prefix.layout import FULL, WINDOW, Kinds, Link, part_names
from mlxkv.prefix.match import WORTH, Match
from mlxkv.prefix.on_disk.part import Part
from mlxkv.prefix.open import CachedModel, Group, open_pages
from mlxkv.prefix.pages import Pages


class CutModel(CachedModel, Protocol):
    """A model whose layers can be cut, `nn.model.CausalLM.cuts_layers`."""

    @property
    def config(self) -> Any:
        """Its numbers."""
        ...


class LowerPages(Pages):
    """Pages of the layers below a border, which the base's pages have as well.

    Args:
        base: the base's pages, of all layers.
        args: see `Pages`.
    """

    def __init__(self, base: Pages, *args: Any):
        super().__init__(*args)
        self.base = base

    def match(self, tokens: Sequence[int], limit: int, worth: int = WORTH) -> Match:
        if limit >= STEP:
            _ = self.base.disk  # is opened
        return super().match(tokens, limit, worth)

    def holds(self, link: Link, part: str) -> bool:
        return super().holds(link, part) or self.base.holds(link, part)

    def is_in_ram(self, link: Link) -> bool:
        return super().is_in_ram(link) or self.base.is_in_ram(link)

    def has(self, link: Link) -> bool:
        return super().has(link) or self.base.has(link)

    def children(self, parent: str, at: int) -> Iterator[Link]:
        own = list(super().children(parent, at))
        yield from own
        names = {link.name for link in own}
        yield from (x for x in self.base.children(parent, at) if x.name not in names)

    def tokens(self, link: Link) -> bytes:
        return super().tokens(link) or self.base.tokens(link)

    def rows_before(self, link: Link, stop: int) -> Part | None:
        if not self.kinds.window:
            return None
        if self.ram.has(link, WINDOW):
            return super().rows_before(link, stop)
        if (rows := self.base.rows_before(link, stop)) is None:
            return None
        rows = self._lower(WINDOW, rows)
        mx.eval(rows.words)
        return rows

    def load(self, match: Match, caches: Sequence[Cache], room: int = 0) -> int | None:
        n_ssd = super().load(match, caches, room)
        if n_ssd is not None:
            self.base.touch(match.links)
        if n_ssd is not None and self.base.opened_disk is not None:
            self.base.keep(link for link in match.links if link.n_tokens == STEP)
        return n_ssd

    def forget(self, links: Iterable[Link]) -> None:
        links = list(links)
        super().forget(links)
        self.base.forget(links)

    def part(self, link: Link, part: str) -> Part | None:
        """A part of a page; None where it cannot be had."""
        found = self._bring(part, [link], {(link.name, part)}, set())
        return None if found is None else found[0]

    def drop_doubles(self, links: Sequence[Link]) -> None:
        """Give up in RAM what the base's pages have there as well."""
        for link in links:
            if self.base.has(link) and (page := self.ram.get(link.name)) is not None:
                self.ram.drop(page, self.kinds.parts)

    def _bring(
        self, part: str, links: Sequence[Link], kept: Set[tuple[str, str]], read: set[str]
    ) -> list[Part] | None:
        found: list[Part] = []

        def is_own(link: Link) -> bool:
            in_base = self.base.ram.has(link, part) and not self.ram.has(link, part)
            return Pages.holds(self, link, part) and not in_base

        for own, some in groupby(links, is_own):
            if own:
                parts = super()._bring(part, list(some), kept, read)
            else:
                parts = self.base._bring(part, list(some), kept, read)
                parts = parts and [self._lower(part, each) for each in parts]
            if parts is None:
                return None
            found += parts
        return found

    def _lower(self, part: str, whole: Part) -> Part:
        """What a part of the base's page has of these layers, lazily."""
        mine, slices = set(self.kinds.caches(part)), whole.slices()
        numbers = self.base.kinds.caches(part)
        return Part.of([x for i, x in zip(numbers, slices, strict=True) if i in mine])


class JoinedPages(Pages):
    """Takes pages of the layers from a border on, and gives the base pages of all layers: what it
    lacks is in `LowerPages`.

    Args:
        lower: of the layers below.
        kinds: of the layers above.
    """

    def __init__(self, lower: LowerPages, kinds: Kinds):
        super().__init__(kinds, 0)
        self._lower_pages = lower

    def has(self, link: Link) -> bool:
        return self._lower_pages.base.has(link)

    def add(
        self, link: Link, tokens: bytes, parts: dict[str, Part], chain: Sequence[Link] = ()
    ) -> None:
        lower, whole = self._lower_pages, dict[str, Part]()
        for part in lower.base.kinds.parts:
            groups = [lower.part(link, part)] if lower.kinds.caches(part) else []
            groups += [parts.get(part)] if self.kinds.caches(part) else []
            found = [each for each in groups if each is not None]
            if len(found) == len(groups):
                whole[part] = Part.of([x for each in found for x in each.slices()])
        mx.eval([part.words for part in whole.values()])
        if whole:
            lower.base.add(link, tokens, whole, chain)


class UpperPages(Pages):
    """An adapter's pages, of the layers from a border on.

    Args:
        lower: of the layers below.
        args: see `Pages`.
    """

    def __init__(self, lower: LowerPages, *args: Any):
        super().__init__(*args)
        self.lower = lower

    def match(self, tokens: Sequence[int], limit: int, worth: int = WORTH) -> Match:
        """The longest prefix that all layers can be restored of."""
        while True:
            match = super().match(tokens, limit, worth)
            below = self.lower.match(tokens, match.n_tokens, worth)
            if below.n_tokens == match.n_tokens:
                return replace(match, below=below)
            limit = below.n_tokens

    def load(self, match: Match, caches: Sequence[Cache], room: int = 0) -> int | None:
        assert match.below is not None
        n_ssd = super().load(match, caches, room)
        below = None if n_ssd is None else self.lower.load(match.below, caches, room)
        return None if n_ssd is None or below is None else max(n_ssd, below)

    def share(self, name: str, links: Sequence[Link]) -> None:
        super().share(name, links)
        self.lower.share(name, links)


class StreamPages(Pages):
    """Pages of the residual stream at a border: the input of the layer there, `[1, 1, S, E]`."""

    def rows(self, links: Sequence[Link], start: int, stop: int) -> mx.array | None:
        """Lazy rows `[1, stop - start, E]` at the positions from `start` on; None where a page
        could not be read any more.

        Args:
            links: from position 0 on; some pages of them have the rows.
            start: the first position.
            stop: the one behind the last.
        """
        some = [link for link in links if link.start < stop and link.stop > start]
        parts = self._bring(FULL, some, part_names({FULL: links}), set())
        if parts is None:
            return None
        pieces = [part.slices(stop)[0].arrays[0][:, 0] for part in parts]
        pieces[0] = pieces[0][:, start - parts[0].start :]
        return mx.concatenate(pieces, axis=1)


@dataclass(frozen=True, slots=True)
class Lift:
    """What is known of a prompt below a border, for the layers above to be computed from.

    Args:
        below: pages of the layers below.
        stream: pages of the residual stream.
        stop: tokens of the prompt that both have.
    """

    below: Match
    stream: Match
    stop: int


@dataclass(frozen=True, slots=True)
class Border:
    """A border in one owner's pages of a model.

    Args:
        at: the first layer above.
        lower: pages of the layers below.
        stream: of the residual stream there.
    """

    at: int
    lower: LowerPages
    stream: StreamPages

    def lift(self, tokens: Sequence[int], start: int, limit: int) -> Lift | None:
        """What can be brought up of a prompt; None where that is not worth it.

        Args:
            tokens: the prompt.
            start: tokens of it that all layers have.
            limit: tokens to bring up at most.
        """
        while limit >= start + WORTH:
            stream = self.stream.match(tokens, limit)
            below = self.lower.match(tokens, stream.n_tokens)
            if (limit := below.n_tokens) == stream.n_tokens:
                return Lift(below, stream, limit) if limit >= start + WORTH else None
        return None


def open_border(
    model: CutModel, path: Path, kv_type: str, base: Pages, at: int, owner: str = ""
) -> Border:
    """The pages at a border, and below it.

    Args:
        model: the base; its layers' caches have the layers' numbers.
        path: its directory.
        kv_type: format of the KV.
        base: its own pages, of this owner.
        at: the border.
        owner: as for `open_pages`.
    """
    kinds = base.kinds.within(0, at)
    lower = Group(f"below {at}", kinds, partial(LowerPages, base))
    stream = Group(f"stream at {at}", Kinds((0,), (), 0, 0), StreamPages)
    found = [open_pages(model, path, kv_type, 0, owner=owner, group=x) for x in (lower, stream)]
    below, rows = found
    assert isinstance(below, LowerPages) and isinstance(rows, StreamPages)
    below.weight = _part_below(model, kv_type, at)
    rows.weight = stream_bytes(model) / _row_bytes(model, kv_type)
    return Border(at, below, rows)


def open_upper(
    model: CachedModel, path: Path, kv_type: str, border: Border, owner: str = ""
) -> Pages:
    """An adapter's pages above a border.

    Args:
        model: under the adapter.
        path, kv_type, owner: as for `open_border`.
        border: of the same owner's pages.
    """
    kinds = border.lower.base.kinds.within(border.at, len(model.cache_specs()))
    group = Group(f"from {border.at}", kinds, partial(UpperPages, border.lower))
    pages = open_pages(model, path, kv_type, 0, owner=owner, group=group)
    assert pages is not None
    pages.weight = 1 - _part_below(model, kv_type, border.at)
    return pages


def stream_bytes(model: CutModel) -> int:
    """Bytes of the residual stream of one token."""
    return model.config.hidden_size * model.compute_dtype.size


def _row_bytes(model: CachedModel, kv_type: str, below: int | None = None) -> int:
    """Bytes of one token's KV in the layers below one, or in all."""
    layers = list(KVFormat(kv_type, model.compute_dtype.size).layers(model.cache_specs()))
    return sum(spec.token_bytes(own) for spec, own in layers[:below])


def _part_below(model: CachedModel, kv_type: str, at: int) -> float:
    return _row_bytes(model, kv_type, at) / _row_bytes(model, kv_type)
