"""What a model's sequences may take in memory, and what gives way where there is no room.

Invariants:
- Whatever grows with tokens asks before it does, at each step of 256 tokens: a chunk of a prompt
  and a token for which the caches grow. What is granted is what a traced step needs (`workspace`).
- Where the answer is no, rungs of a ladder are taken in this order, and each is written down: MLX's
  allocator gives back what it keeps, the prompt goes on in smaller chunks, prefix pages are written
  out or dropped, the sequence's KV is packed (`--kv-type auto`). Then this sequence ends with
  `KVCacheFull`; nothing else is touched.
- An allocation that fails inside MLX takes the same rungs, one after the other.
- `limit_bytes` may change at any time, and counts from the next question on.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxkv.base import device
from mlxkv.base.device import default_chunk
from mlxkv.base.units import human_bytes
from mlxkv.errors import Hint, KVCacheFull
from mlxkv.kv.types import KV_TYPES, STEP
from mlxkv.memory import needs
from mlxkv.memory.needs import Needs
from mlxkv.memory.step_bound import StepBound
from mlxkv.memory.types import KVUse, MemoryStats, Rung

if TYPE_CHECKING:
    from mlxkv.generation.session import Session
    from mlxkv.nn.model import CausalLM
    from mlxkv.prefix.pages import Pages

MIN_CHUNK = 16
"""Tokens of a prompt below which a chunk is not cut smaller."""
ROOMY = 2**30, 64
"""Bytes, and times the KV after it, that a chunk of a page or less never needs, where the model has
no `StepBound`: where so much is free the step is not traced. Scores grow with the KV."""
WIDER = 1.05
"""How much more a step may take than one of no fewer tokens behind no fewer: a trace says 1% more
where the caches grow by two steps at once."""


class Budget:
    """The memory of one model.

    Args:
        model: loaded.
        weights_bytes: of it.
        limit_bytes: what it may take with all that belongs to it.
        pages: its prefixes; None where it has none.

    Attributes:
        start: KV when the last request began.
        most: KV at the most since then.
    """

    def __init__(
        self, model: CausalLM, weights_bytes: int, limit_bytes: int, pages: Pages | None = None
    ):
        self.weights_bytes, self.pages = weights_bytes, pages
        self._all_pages = [] if pages is None else [pages]
        self._limit_bytes = limit_bytes
        self._model = model
        self._needs: dict[str, Needs] = {}
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._joining = threading.Lock()
        # What sequences were granted and have not taken yet: tokens held then, bytes after it.
        self._granted: weakref.WeakKeyDictionary[Session, tuple[int, int]] = (
            weakref.WeakKeyDictionary()
        )
        # Prompts that were let in, and are not computed yet: their length.
        self._admitted: weakref.WeakKeyDictionary[Session, int] = weakref.WeakKeyDictionary()
        self.start = self.most = KVUse()
        self.share_arrays(needs.page_arrays())

    @property
    def limit_bytes(self) -> int:
        """What the model may take with all that belongs to it."""
        return self._limit_bytes

    @limit_bytes.setter
    def limit_bytes(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        share = needs.pages_bytes(limit_bytes, self.weights_bytes)
        for pages in self._all_pages:
            pages.budget_bytes = share // len(self._all_pages)

    def adopt(self, pages: Pages) -> None:
        """Count another owner's prefixes in: all get the same share."""
        self._all_pages.append(pages)
        self.limit_bytes = self._limit_bytes
        self.share_arrays(self._page_arrays)

    def share_arrays(self, page_arrays: int | None) -> None:
        """Say how many arrays the prefixes of all owners may hold: all get the same share.

        Args:
            page_arrays: see `planner.page_arrays`; None for any number.
        """
        self._page_arrays = page_arrays
        for pages in self._all_pages:
            pages.max_arrays = page_arrays and page_arrays // len(self._all_pages)

    def join(self, session: Session) -> None:
        """Count a sequence in, for as long as it lives."""
        with self._joining:
            self._sessions.add(session)

    def _live(self) -> list[Session]:
        """The sequences, also for a thread that watches while others join."""
        with self._joining:
            return list(self._sessions)

    @property
    def kv_bytes(self) -> int:
        """Allocated by all sequences."""
        return sum(session.nbytes for session in self._live())

    @property
    def used_bytes(self) -> int:
        """Weights, KV and prefix pages."""
        return self.weights_bytes + self.kv_bytes + self.pages_bytes

    @property
    def pages_bytes(self) -> int:
        """Prefix pages in RAM."""
        return sum(pages.nbytes for pages in self._all_pages)

    def use(self) -> KVUse:
        """KV of all live sequences, now."""
        uses = [session.use() for session in self._live()]
        return KVUse(
            sum(use.used_tokens for use in uses),
            sum(use.used_bytes for use in uses),
            sum(use.allocated_tokens for use in uses),
            sum(use.allocated_bytes for use in uses),
        )

    def begin(self) -> None:
        """A request begins: its figures do, and pages may take their share again."""
        self.start = self.most = self.use()
        for pages in self._all_pages:
            pages.take_share()

    def note(self) -> None:
        """Take the KV of now into the figures."""
        use = self.use()
        if use.allocated_bytes >= self.most.allocated_bytes:
            self.most = use

    def admit(self, session: Session, n_prompt: int) -> None:
        """Refuse a prompt whose KV finds no room, whatever gives way, before it is computed.

        One that is let in has its room until it is computed: later ones are refused for it.

        Raises:
            KVCacheFull: with the numbers.
        """
        self._admitted[session] = n_prompt
        if self._is_roomy(session, n_prompt - 1, 1):
            return
        # What can still be packed is priced packed.
        kv_type = KV_TYPES[-1] if session.is_auto else session.kv_type
        if n_prompt > (most := self._most_tokens(session, kv_type)):
            self.dismiss(session)
            raise self._full(session, n_prompt, most)

    def dismiss(self, session: Session) -> None:
        """A sequence starts anew, or is over: what it was promised is free."""
        self._admitted.pop(session, None)
        self._granted.pop(session, None)

    def has_room(self, session: Session, n_bytes: int) -> bool:
        """Whether twice so many bytes are free: what is moved must not take a step's workspace."""
        return 2 * n_bytes <= self._free(session) - mx.get_cache_memory()

    def grant(self, session: Session, n_new: int, *, last: bool, beside: int = 0) -> int:
        """How many of the next tokens may be computed at once, at least one.

        Args:
            session: whose caches take them.
            n_new: tokens that are wanted.
            last: whether the logits after the last of them are.
            beside: bytes that the step takes beside what this sequence alone needs.

        Raises:
            KVCacheFull: no rung of the ladder finds room for any.
        """
        self._widen(session, n_new, last)
        wanted = min(n_new, session.chunk_cap or n_new)
        if self._is_roomy(session, session.n_held, wanted, beside):
            return self._given(session, wanted)
        for sizes in self._ladder(session, wanted):
            for n in sizes:
                if not self._fits(session, n, last=last and n == n_new, beside=beside):
                    continue
                if n < wanted:
                    session.chunk_cap = n
                    if all(n < rung.amount for rung in session.rungs if rung.kind == "chunk"):
                        session.rungs.append(Rung("chunk", session.n_held, n))
                return self._given(session, n)
        raise self._full(session, session.n_held + 1)

    def _given(self, session: Session, n: int) -> int:
        """Note what is granted to a sequence: `n` tokens."""
        after = self._need(session.kv_type).kv_bytes(session.n_held + n)
        self._granted[session] = session.n_held, after
        return n

    def _widen(self, session: Session, n_new: int, last: bool) -> None:
        """Take back half of a cut that was made for lack of room, where there is room again.

        What an allocation that failed has cut stays.
        """
        if session.chunk_cap is None or session.n_failed_at is not None:
            return
        n = min(n_new, 2 * session.chunk_cap)
        if n > session.chunk_cap and self._fits(session, n, last=last and n == n_new):
            session.chunk_cap = n

    def _ladder(self, session: Session, wanted: int) -> Iterator[Sequence[int]]:
        """Chunks to try, each after another rung was taken."""
        smaller = _halves(wanted)
        cached = mx.get_cache_memory()
        if cached and not self._fits(session, wanted, last=True, beside=cached):
            mx.clear_cache()
            session.rungs.append(Rung("cache", session.n_held, cached))
        yield (wanted,)
        yield smaller
        while self.pages_bytes:
            missing = -self._room_after(session, (wanted, *smaller)[-1], last=True)
            given = self.give_pages(max(1, missing))
            if not given:
                break  # what is left is pinned
            session.rungs.append(Rung("pages", session.n_held, given))
            yield (wanted, *smaller)
        while session.can_pack:
            session.rungs.append(session.pack())
            yield (wanted, *smaller)
        yield (1,)

    def after_failure(self, session: Session) -> None:
        """MLX could not allocate, and the sequence starts over: the next rung.

        Raises:
            KVCacheFull: there is none.
        """
        held = session.n_failed_at or 0
        with contextlib.suppress(RuntimeError):
            # The step behind it fails as well, with a text of its own, and is not wanted.
            device.finish()
        cached = mx.get_cache_memory()
        mx.clear_cache()
        if cached:
            session.rungs.append(Rung("cache", held, cached))
        if session.chunk_cap is None or session.chunk_cap > MIN_CHUNK:
            now = session.chunk_cap or default_chunk()
            session.chunk_cap = max(MIN_CHUNK, now // 4)
            session.rungs.append(Rung("chunk", held, session.chunk_cap))
        elif given := self.give_pages(self.pages_bytes):
            session.rungs.append(Rung("pages", held, given))
        elif session.can_pack:
            session.rungs.append(session.pack())
        else:
            raise self._full(session, held + 1, held)

    def give_pages(self, n_bytes: int) -> int:
        """Drop prefix pages from RAM; how many bytes that were."""
        given = 0
        for pages in sorted(self._all_pages, key=lambda pages: -pages.nbytes):
            if given < n_bytes:
                given += pages.give_back(n_bytes - given)
        return given

    def _is_roomy(self, session: Session, n_held: int, n_new: int, beside: int = 0) -> bool:
        """Whether so much is free that what a step takes need not be known: no trace of it."""
        if self._bound is not None:
            needed = self._bound(session.kv_type, n_held, n_new)
        elif n_new <= STEP:
            base, times = ROOMY
            needed = base + times * self._need(session.kv_type).kv_bytes(n_held + n_new)
        else:
            return False
        return beside + needed <= self._free(session) - mx.get_cache_memory()

    @cached_property
    def _bound(self) -> StepBound | None:
        return StepBound.of(self._model)

    def _free(self, asking: Session) -> int:
        """Bytes that nobody has taken or was granted, of the limit and of the machine."""
        granted = sum(
            max(0, after - session.nbytes)
            for session, (held, after) in list(self._granted.items())
            if session is not asking and session.n_held == held
        )
        own = self.limit_bytes - self.used_bytes - granted
        return min(own, device.memory_limit() - mx.get_active_memory())

    def _room_after(self, session: Session, n_new: int, *, last: bool) -> int:
        """Bytes that are left while the next tokens are computed; negative where they miss."""
        held = self._need(session.kv_type).step(session.n_held, n_new, last=last)
        return self._free(session) - (held.peak - held.before)

    def _fits(self, session: Session, n_new: int, *, last: bool, beside: int = 0) -> bool:
        """Whether so many bytes are left while the next tokens are computed.

        Asked of a larger step first, which is one of few: a trace takes as long as a short prompt,
        and where answers are being written a prompt's chunks are of any length.
        """
        if n_new > 1:
            n_held = -(-session.n_held // STEP) * STEP
            n_more = max(MIN_CHUNK, 1 << (n_new - 1).bit_length())
            held = self._need(session.kv_type).step(n_held, n_more, last=True)
            if self._free(session) - WIDER * (held.peak - held.before) >= beside:
                return True
        return self._room_after(session, n_new, last=last) >= beside

    def _need(self, kv_type: str) -> Needs:
        if kv_type not in self._needs:
            self._needs[kv_type] = Needs(self._model, kv_type, default_chunk())
        return self._needs[kv_type]

    def _most_tokens(self, session: Session, kv_type: str) -> int:
        """Tokens that this sequence can have if everything else gives way."""
        others = self._others(session)
        return self._need(kv_type).most_tokens(self.limit_bytes - self.weights_bytes - others)

    def _others(self, session: Session) -> int:
        """Bytes that other sequences hold, or will when the prompts that were let in are."""
        n_bytes = 0
        for other in self._live():
            if other is session:
                continue
            n_promised = self._admitted.get(other, 0)
            is_due = n_promised > other.n_held
            will = self._need(other.kv_type).kv_bytes(n_promised) if is_due else 0
            n_bytes += max(other.nbytes, will)
        return n_bytes

    def _full(self, session: Session, n_wanted: int, most: int | None = None) -> KVCacheFull:
        """Why a sequence cannot go on, and what would have helped."""
        held = max(session.n_held, session.n_failed_at or 0)
        most = self._most_tokens(session, session.kv_type) if most is None else most
        need = self._need(session.kv_type)
        others = self._others(session)
        enough = self.weights_bytes + others + need.least(n_wanted)
        hints = [Hint("memory", f"{-(-enough // 2**20)}MiB", f"allows {n_wanted:,}")]
        if not session.is_auto:
            for kv_type in KV_TYPES[KV_TYPES.index(session.kv_type) + 1 :]:
                n = self._most_tokens(session, kv_type)
                if n > most:
                    hints.append(Hint("kv_type", kv_type, f"allows {n:,}"))
        limit, shown = human_bytes(self.limit_bytes), human_bytes(others) if others else ""
        return KVCacheFull(held, n_wanted, most, limit, shown, hints)


def _halves(n: int) -> tuple[int, ...]:
    """Smaller chunks than `n`, down to `MIN_CHUNK`."""
    sizes = []
    while n > MIN_CHUNK:
        n = max(MIN_CHUNK, n // 2)
        sizes.append(n)
    return tuple(sizes)


def memory_stats(budget: Budget) -> MemoryStats:
    """The figures of a model, and MLX's own."""
    mx.synchronize()
    pages = budget.pages
    active, peak = mx.get_active_memory(), mx.get_peak_memory()
    pages_bytes = budget.pages_bytes
    explained = budget.weights_bytes + budget.kv_bytes + pages_bytes
    most = budget.weights_bytes + budget.most.allocated_bytes + pages_bytes
    return MemoryStats(
        limit_bytes=budget.limit_bytes,
        weights_bytes=budget.weights_bytes,
        kv=budget.use(),
        kv_start=budget.start,
        kv_most=budget.most,
        pages_ram_bytes=pages_bytes,
        pages_ssd_bytes=0 if pages is None else pages.ssd_bytes,
        workspace_bytes=max(0, peak - most),
        active_bytes=active,
        cached_bytes=mx.get_cache_memory(),
        peak_bytes=peak,
        unexplained_bytes=active - explained,
    )
