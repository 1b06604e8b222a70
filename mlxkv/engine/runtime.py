"""A loaded model and what all its answers share: tokenizer, settings, pages, budget."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Generator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxkv.base import device
from mlxkv.base.stepwise import finished
from mlxkv.engine.adapter_pool import AdaptedModel, AdapterPool
from mlxkv.engine.draft_models import DraftModels
from mlxkv.engine.media.side import MediaSide
from mlxkv.errors import UsageError, contained
from mlxkv.generation.decoder import Decoder
from mlxkv.generation.drafts.drafting import Drafting
from mlxkv.generation.drafts.small_model import SmallModel
from mlxkv.generation.embed import Vectors
from mlxkv.generation.prompt_logprobs import Scores
from mlxkv.generation.session import Session
from mlxkv.kv.types import STEP, KVFormat, first_kv_type
from mlxkv.memory import needs
from mlxkv.memory.budget import Budget
from mlxkv.models.loader import Layout, lay_out, loading
from mlxkv.nn.embedder import Embedder
from mlxkv.nn.model import CausalLM
from mlxkv.prefix.border import Border, open_border, open_upper
from mlxkv.prefix.open import open_pages
from mlxkv.prefix.pages import Pages
from mlxkv.sampling.params import SamplingParams, recommended, suppressed
from mlxkv.store.adapters import AdapterRef, other_bases, own_adapters, read_adapters
from mlxkv.store.settings import Given, Settings, draws_on_model, effective
from mlxkv.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mlxkv.engine.queue.preparation import Preparer
    from mlxkv.sampling.grammar import Maskers

_log = logging.getLogger(__name__)


class TextSide:
    """What preparing a prompt needs of a model: nothing of MLX, so that any thread may do it.

    Args:
        tokenizer: the model's.
        path: its directory.
        config: its config.json.
        settings: context, overflow and their origins.
        media: reads pictures and sound; None for what the directory's files say.
        vectors: what it makes of a text, if it is an embedding model; None for one that writes.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        path: Path,
        config: Any,
        settings: Settings,
        media: MediaSide | None = None,
        vectors: Vectors | None = None,
    ):
        self.tokenizer, self.path, self.config, self.settings = tokenizer, path, config, settings
        self.media, self.vectors = media or MediaSide(path), vectors

    def must_write(self) -> None:
        """Raise UsageError for a model that makes vectors and is asked to write."""
        if self.vectors is not None:
            raise UsageError(
                "this is an embedding model, which makes vectors of texts and writes none: see "
                "`mlxkv embed`, POST /v1/embeddings and `LLM.embed`, or choose a model that chats"
            )

    def text_side(self) -> TextSide:
        """This alone, without the weights."""
        side = self.tokenizer, self.path, self.config, self.settings, self.media, self.vectors
        return TextSide(*side)


class Runtime(TextSide):
    """A loaded model and what all its answers share.

    Args:
        model: see `load_model`.
        tokenizer: its tokenizer.
        path: its directory.
        kv_type: format of the KV cache.
        limit_bytes: memory limit; None for what the machine allows.
        settings: context, overflow and their origins; None reads them.
        adapters: see below.

    Attributes:
        preparer: prepares long prompts; None to prepare all where they begin.
        adapters: that the model was loaded with.
        adapted: it under the adapters of requests.
        budget: its memory limit and use.
        pages: cached prefixes; None for a model whose layers keep other state than keys and values.
        drafting: what its answers' drafts share.
        draft_models: smaller models that draft for it.
        memory_limit: bytes for it and its draft models, where it is the only model.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        path: Path,
        kv_type: str = "native",
        limit_bytes: int | None = None,
        settings: Settings | None = None,
        adapters: Sequence[AdapterRef] = (),
    ):
        settings = settings or effective(path, Given(kv_type=kv_type, memory=limit_bytes))
        media = MediaSide(path, model.media_kinds)
        vectors = Vectors.of(model, settings.context.value) if isinstance(model, Embedder) else None
        super().__init__(tokenizer, path, model.config, settings, media, vectors)
        self.model, self.kv_type = model, kv_type
        self.preparer: Preparer | None = None
        self.adapters = tuple(adapters)
        weights_bytes = sum(
            x.nbytes for _, x in tree_flatten(model.parameters()) if isinstance(x, mx.array)
        )
        weights_bytes -= model.waiting_bytes()
        limit_bytes = limit_bytes or device.memory_limit()
        room = needs.pages_bytes(limit_bytes, weights_bytes)
        first = first_kv_type(kv_type)
        list(KVFormat(first).layers(model.cache_specs()))  # a layer that is not there is an error
        self.pages = open_pages(model, path, first, room)
        self.budget = Budget(model, weights_bytes, limit_bytes, self.pages)
        self.adapted = AdapterPool(model, path, self.adapters, self.budget, self._close_pages)
        self._pages: dict[str, Pages | None] = {"": self.pages}
        self._borders: dict[tuple[str, int], Border] = {}
        self._scores: dict[str, Scores] = {}
        past = _past_of(self._pages, model.config.vocab_size)
        self.drafting = Drafting(past, model)
        self.draft_models = DraftModels(self)
        self.memory_limit = limit_bytes
        self._at_exit = weakref.finalize(self, _close, self._pages, self.drafting, at_exit=True)
        self._unwire: Callable[[], object] | None = None

    @classmethod
    def load(
        cls,
        path: Path,
        settings: Settings,
        dtype: mx.Dtype | str = "auto",
        adapters: Sequence[AdapterRef] = (),
    ) -> Self:
        """Load a model's directory, with adapters; raises as `mlxkv.load`."""
        runtime = finished(cls.loading(path, settings, dtype, adapters=adapters))
        runtime.hold_wired()
        return runtime

    @classmethod
    def loading(
        cls,
        path: Path,
        settings: Settings,
        dtype: mx.Dtype | str = "auto",
        layout: Layout | None = None,
        adapters: Sequence[AdapterRef] = (),
    ) -> Generator[None, None, Self]:
        """`load` in steps, without `hold_wired`; `layout` if the model is laid out already."""
        limit = settings.memory.value
        layout = layout or lay_out(path, dtype, guesses=draws_on_model(settings.draft.value))
        adapters = [*own_adapters(path), *adapters]
        added = read_adapters(adapters, layout.checkpoint.raw)
        for note in other_bases(added, path):
            _log.warning("%s", note)
        read = list[Tokenizer]()
        model = yield from loading(
            path,
            dtype,
            limit,
            layout,
            encoders_wait=True,
            adapters=added,
            meanwhile=lambda: read.append(Tokenizer.from_dir(path)),
        )
        del added  # the model has what it needs of them
        yield
        return cls(model, read[0], path, settings.kv_type.value, limit, settings, adapters)

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.settings.context.value

    @cached_property
    def recommended(self) -> SamplingParams:
        """The sampling that the model's generation_config.json recommends."""
        return recommended(self.path)

    @cached_property
    def suppressed(self) -> frozenset[int]:
        """Tokens that the model must not write, by its generation_config.json."""
        return suppressed(self.path)

    @cached_property
    def maskers(self) -> Maskers:
        """Makes masks of grammars; the first takes seconds, see `Maskers`."""
        from mlxkv.sampling.grammar import Maskers

        return Maskers(self.tokenizer, self.suppressed)

    def pages_of(self, owner: str, adapter: Sequence[str] = ()) -> Pages | None:
        """Prefix pages of one owner, which no other owner's requests see.

        Args:
            owner: of the request.
            adapter: of the request; None is returned where it is not in memory.
        """
        found = self.adapted.find(adapter) if adapter else None
        return None if adapter and found is None else self._pages_under(owner, found)

    def _pages_under(self, owner: str, adapted: AdaptedModel | None) -> Pages | None:
        """An owner's pages, of the model under adapters of a request, or none."""
        if (key := _place(owner, adapted)) not in self._pages:
            kv_type = first_kv_type(self.kv_type)
            # The base's own are what a border is made of.
            border = None if adapted is None else self._border(owner, adapted)
            if adapted is None or border is None:
                model = self.model if adapted is None else adapted.model
                pages = open_pages(model, self.path, kv_type, 0, owner=owner)
            else:
                pages = open_upper(adapted.model, self.path, kv_type, border, owner)
            self._adopt(key, pages, owner)
        return self._pages[key]

    def _border(self, owner: str, adapted: AdaptedModel | None) -> Border | None:
        """Where an owner's pages of the base and of adapters part; None where they share none."""
        at = self.adapted.border if adapted is None else adapted.border
        base = None if at is None else self._pages_under(owner, None)
        if at is None or base is None:
            return None
        if (owner, at) not in self._borders:
            kv_type = first_kv_type(self.kv_type)
            border = open_border(self.model, self.path, kv_type, base, at, owner)
            self._borders[owner, at] = border
            self._adopt(f"{owner}\nbelow {at}", border.lower, owner)
            self._adopt(f"{owner}\nat {at}", border.stream, owner)
        return self._borders[owner, at]

    def _adopt(self, key: str, pages: Pages | None, owner: str) -> None:
        self._pages[key] = pages
        if pages is not None:
            self.budget.adopt(pages, owner)

    def _close_pages(self, stamp: str) -> None:
        """Close the pages of an adapter that is dropped."""
        for key in [key for key in self._pages if key.partition("\n")[2] == stamp]:
            pages = self._pages.pop(key)
            self._scores.pop(key, None)
            if pages is None:
                continue
            self.budget.shares.release(pages)
            try:
                pages.close()
            except BaseException as error:  # what needs the adapter's memory goes on
                _log.warning("prefixes were not saved: %s", contained(error))

    def _of_owner(self, owner: str) -> list[Pages]:
        """An owner's pages under each adapter."""
        found = [
            pages for key, pages in list(self._pages.items()) if key.partition("\n")[0] == owner
        ]
        return [pages for pages in found if pages is not None]

    def pages_bytes(self, owner: str | None) -> int:
        """Bytes of prefix pages in RAM: an owner's, or all for None."""
        if owner is None:
            return self.budget.pages_bytes
        return sum(pages.nbytes for pages in self._of_owner(owner))

    def ssd_bytes(self, owner: str | None) -> int:
        """Bytes of prefix pages on disk: an owner's with this model, or all models' for None."""
        if owner is None:
            return 0 if self.pages is None else self.pages.ssd_bytes
        opened = [pages.opened_disk for pages in self._of_owner(owner)]
        return sum(disk.files.own_bytes() for disk in opened if disk is not None)

    def session(self, owner: str = "", adapter: Sequence[str] = ()) -> Session:
        """Empty caches for one sequence, which shares prefixes with its owner's others.

        Args:
            owner: of the request.
            adapter: of the request, loaded where it is not in memory, see `AdapterPool.get`.

        Raises:
            UsageError: an embedding model, which has none.
        """
        self.must_write()
        found = self.adapted.get(adapter) if adapter else None
        model = self.model if found is None else found.model
        scores = self._scores.setdefault(_place(owner, found), Scores())
        pages, border = self._pages_under(owner, found), self._border(owner, found)
        session = Session(model, self.kv_type, pages, self.budget, scores, border)
        if found is not None:
            found.sessions.add(session)
            found.owners.add(owner)
        return session

    def decoder(self) -> Decoder:
        """Decodes answers together."""
        return Decoder(self.model, self.drafting.costs, self.adapted.mixed)

    def draft_model(self, name: str) -> SmallModel | None:
        """The smaller model that drafts under this name; None where it is not loaded."""
        return self.draft_models.find(name)

    def share_memory(self) -> None:
        """Share the memory with the models that draft for it: for a single model."""
        self.draft_models.share_memory(self.memory_limit)

    def hold_wired(self) -> None:
        """Have Metal keep this model's memory resident until it is closed or collected.

        For a single model: an engine does it for all of its models.
        """
        if self._unwire is None:
            release = device.hold_wired(self.budget.limit_bytes)
            self._unwire = weakref.finalize(self, release)

    def close(self) -> None:
        """Write prefixes to disk and drop them from RAM; also runs at exit."""
        if self._at_exit.detach() is not None:
            _close(self._pages, self.drafting)
        if self._unwire is not None:
            self._unwire()


def _place(owner: str, adapted: AdaptedModel | None) -> str:
    """What an owner's pages, under adapters of a request or none, are kept under."""
    return owner if adapted is None else f"{owner}\n{adapted.stamp}"


def _past_of(
    owners: dict[str, Pages | None], n_vocab: int
) -> Callable[[str], list[list[int]] | None]:
    """Reads what earlier processes kept of an owner's tokens, once its pages on disk are open."""

    def load(owner: str) -> list[list[int]] | None:
        pages = owners.get(owner)
        if pages is None or pages.opened_disk is None:
            return None
        kept = pages.opened_disk.past_tokens.read()
        return [tokens for tokens in kept if max(tokens) < n_vocab]

    return load


def _close(owners: dict[str, Pages | None], drafting: Drafting, *, at_exit: bool = False) -> None:
    for owner, pages in owners.items():
        if pages is not None:
            try:
                # A whole page is written now at the latest, and tokens go beside it.
                opens = not at_exit and drafting.longest(owner) >= STEP
                disk = pages.disk if opens else pages.opened_disk
                pages.close(at_exit=at_exit)
                if disk is not None:
                    drafting.save(owner, disk.past_tokens)
            except BaseException as error:  # for example, the model's files were deleted
                _log.warning("prefixes were not saved: %s", contained(error))
