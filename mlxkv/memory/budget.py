"""The memory limit of a model's sequences, and the order in which memory is freed.

Invariants:
- A sequence asks before its caches grow, at each step of 256 tokens: for a chunk of its prompt, and
  for a token. The answer is a `Grant`, from the needs of a traced step (`trace`).
- Where memory is short, the budget takes these rungs in order and reports each: MLX's allocator
  frees its cached buffers, the prompt continues in smaller chunks, kept rows of media and idle
  adapters are dropped, prefix pages are written out or dropped, the sequence must quantize its KV
  (`--kv-type auto`). After the last rung this sequence ends with `KVCacheFull`; no other is
  affected.
- After an allocation that failed inside MLX it takes the same rungs.
- The budget keeps an account for each sequence, and changes nothing in a sequence.
- `limit_bytes` may change at any time, and applies from the next grant on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import mlx.core as mx

from mlxkv.base import device
from mlxkv.base.device import default_chunk
from mlxkv.base.units import human_bytes
from mlxkv.errors import Hint, KVCacheFull
from mlxkv.kv.types import KV_TYPES, STEP, smaller_types
from mlxkv.memory import needs
from mlxkv.memory.accounts import Accounts
from mlxkv.memory.media import EncoderNeeds, Rows, rows_bytes
from mlxkv.memory.needs import AMPLE, MIN_CHUNK, ROOMY, WIDER, Needs, halves, larger_chunk
from mlxkv.memory.page_shares import PageShares
from mlxkv.memory.step_bound import StepBound
from mlxkv.memory.types import Consumer, Grant, KVUse, Rung, smaller_format
from mlxkv.nn.model import CausalLM
from mlxkv.prefix.pages import Pages


class Budget:
    """The memory of one model.

    Args:
        model: loaded.
        weights_bytes: bytes of its weights.
        limit_bytes: memory limit for weights, KV, prefix pages and workspace.
        pages: its prefix pages; None where it has none.

    Attributes:
        start: KV when the last request began.
        most: the largest KV since then.
        rows: of media, kept for prompts to come.
        encoders: what computing rows takes.
        shares: of prefix pages in RAM.
        spare: drops weights that nothing uses, and returns the bytes freed.
    """

    def __init__(
        self, model: CausalLM, weights_bytes: int, limit_bytes: int, pages: Pages | None = None
    ):
        self.weights_bytes, self.pages = weights_bytes, pages
        self.shares = PageShares(pages)
        self._limit_bytes = limit_bytes
        self._model = model
        self._needs: dict[str, Needs] = {}
        self._accounts = Accounts()
        self.start = self.most = KVUse()
        self.rows = Rows(rows_bytes(limit_bytes, weights_bytes))
        self.encoders = EncoderNeeds(model)
        self.spare: Callable[[], int] = lambda: 0

    @property
    def limit_bytes(self) -> int:
        return self._limit_bytes

    @limit_bytes.setter
    def limit_bytes(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.rows.set_limit(rows_bytes(limit_bytes, self.weights_bytes))
        self.shares.set_bytes(needs.pages_bytes(limit_bytes, self.weights_bytes))

    def adopt(self, pages: Pages, owner: str) -> None:
        """Add prefix pages of an owner; all owners get the same share."""
        self.shares.adopt(pages, owner)
        self.limit_bytes = self._limit_bytes

    def plan_with(self, model: CausalLM) -> None:
        """Price steps as those of this model from now on."""
        self._model, self._needs = model, {}
        self.__dict__.pop("_bound", None)

    def give_pages(self, n_bytes: int) -> int:
        """Drop rows of media, then prefix pages from RAM, and return the bytes freed."""
        freed = self.rows.clear()
        return freed if freed >= n_bytes else freed + self.shares.give_back(n_bytes - freed)

    def join(self, sequence: Consumer) -> None:
        """Open an account for a sequence, which lasts as long as the sequence lives."""
        self._accounts.open(sequence)

    @property
    def kv_bytes(self) -> int:
        """Allocated by all sequences."""
        return sum(sequence.nbytes for sequence in self._accounts.live())

    @property
    def used_bytes(self) -> int:
        """Weights, KV, prefix pages, begun ones too, and rows of media."""
        begun = sum(sequence.page_bytes for sequence in self._accounts.live())
        pages = self.pages_bytes + begun
        return self.weights_bytes + self.kv_bytes + pages + self.rows.nbytes

    @property
    def pages_bytes(self) -> int:
        """Of prefix pages in RAM."""
        return self.shares.nbytes

    def use(self) -> KVUse:
        """KV of all live sequences."""
        return self._accounts.use()

    def begin(self) -> None:
        """Start the figures of a request, and allow pages their share again."""
        self.start = self.most = self.use()
        self.shares.take_share()

    def note(self) -> None:
        """Update `most`."""
        use = self.use()
        if use.allocated_bytes >= self.most.allocated_bytes:
            self.most = use

    def begin_prompt(self, sequence: Consumer) -> None:
        """Forget chunk limits and failures of a sequence's last prompt."""
        account = self._accounts[sequence]
        account.chunk_cap = account.n_chunk_reported = account.n_failed_at = None
        account.is_quantizing = False

    def chunk_cap(self, sequence: Consumer) -> int | None:
        """Tokens of a chunk at most, where memory was short; None for any number."""
        return self._accounts[sequence].chunk_cap

    def admit(self, sequence: Consumer, n_prompt: int) -> None:
        """Reserve KV for a whole prompt before prefill. The reservation lasts until it is computed.

        Raises:
            KVCacheFull: it does not fit even if everything else is freed.
        """
        self._accounts[sequence].n_admitted = n_prompt
        if self._is_roomy(sequence, n_prompt - 1, 1):
            return
        # Price what can still be quantized in its smallest format.
        kv_type = KV_TYPES[-1] if sequence.is_auto else sequence.kv_type
        if n_prompt > (most := self._most_tokens(sequence, kv_type)):
            self.dismiss(sequence)
            raise self._full(sequence, n_prompt, most)

    def dismiss(self, sequence: Consumer) -> None:
        """Free the reservation of a sequence that starts over or has ended."""
        account = self._accounts[sequence]
        account.n_admitted, account.granted = 0, None

    def has_room(self, sequence: Consumer, n_bytes: int) -> bool:
        """Whether twice so many bytes are free: a copy must not take a step's workspace."""
        return 2 * n_bytes <= self._free(sequence) - mx.get_cache_memory()

    def is_roomy(self, sequence: Consumer, n_tokens: int, n_chunk: int) -> bool:
        """Whether a sequence can have so many tokens, and a chunk, with all else left as it is."""
        n_new = min(n_tokens, n_chunk)
        return self._is_roomy(sequence, n_tokens - n_new, n_new)

    def grant(
        self,
        sequence: Consumer,
        n_new: int,
        *,
        last: bool,
        beside: int = 0,
        whole: bool = False,
    ) -> Grant:
        """Decide how many of the next tokens a sequence may compute at once.

        Args:
            sequence: the sequence that asks.
            n_new: tokens it wants to compute.
            last: whether it needs the logits after the last of them.
            beside: bytes that the step takes for other sequences.
            whole: whether fewer tokens are of no use to it.
        """
        account = self._accounts[sequence]
        if not account.is_quantizing:
            self._widen(sequence, n_new, last)
        account.is_quantizing = False
        wanted = n_new if whole else min(n_new, account.chunk_cap or n_new)
        rungs: list[Rung] = []
        if self._is_roomy(sequence, sequence.n_held, wanted, beside):
            return self._grant_tokens(sequence, wanted, rungs)
        for sizes in self._ladder(sequence, wanted, rungs):
            for n in [n for n in sizes if n == n_new or not whole]:
                if not self._fits(sequence, n, last=last and n == n_new, beside=beside):
                    continue
                if n < wanted:
                    self._cut(sequence, n, rungs)
                return self._grant_tokens(sequence, n, rungs)
        if (kv_type := smaller_format(sequence, self._kv_bytes)) is not None:
            account.is_quantizing = True
            return Grant(rungs=tuple(rungs), quantize_to=kv_type)
        if whole:
            return Grant(rungs=tuple(rungs), full=self._full(sequence, sequence.n_held + n_new))
        if self._fits(sequence, 1, last=last and n_new == 1, beside=beside):
            if wanted > 1:
                self._cut(sequence, 1, rungs)
            return self._grant_tokens(sequence, 1, rungs)
        return Grant(rungs=tuple(rungs), full=self._full(sequence, sequence.n_held + 1))

    def _grant_tokens(self, sequence: Consumer, n: int, rungs: Sequence[Rung]) -> Grant:
        after = self._need(sequence.kv_type).kv_bytes(sequence.n_held + n)
        self._accounts[sequence].granted = sequence.n_held, after
        return Grant(n, tuple(rungs))

    def _cut(self, sequence: Consumer, n: int, rungs: list[Rung]) -> None:
        """Limit a sequence to chunks of `n` tokens, and report the smallest limit once."""
        account = self._accounts[sequence]
        account.chunk_cap = n
        if account.n_chunk_reported is None or n < account.n_chunk_reported:
            account.n_chunk_reported = n
            rungs.append(Rung("chunk", sequence.n_held, n))

    def _widen(self, sequence: Consumer, n_new: int, last: bool) -> None:
        """Double the limit of a chunk where there is room again, unless an allocation failed."""
        account = self._accounts[sequence]
        if account.chunk_cap is None or account.n_failed_at is not None:
            return
        n = min(n_new, 2 * account.chunk_cap)
        if n > account.chunk_cap and self._fits(sequence, n, last=last and n == n_new):
            account.chunk_cap = n

    def _ladder(
        self, sequence: Consumer, wanted: int, rungs: list[Rung]
    ) -> Iterator[Sequence[int]]:
        """Chunk sizes to try; takes another rung before each."""
        smaller = halves(wanted)
        cached = mx.get_cache_memory()
        if cached and not self._fits(sequence, wanted, last=True, beside=cached):
            mx.clear_cache()
            rungs.append(Rung("cache", sequence.n_held, cached))
        yield (wanted,)
        yield smaller
        if self._drop_rows(sequence, rungs):
            yield (wanted, *smaller)
        while self.pages_bytes:
            missing = -self._room_after(sequence, (wanted, *smaller)[-1], last=True)
            freed = self.give_pages(max(1, missing))
            if not freed:
                break  # the rest is pinned
            rungs.append(Rung("pages", sequence.n_held, freed))
            yield (wanted, *smaller)

    def _drop_rows(self, sequence: Consumer, rungs: list[Rung]) -> int:
        if freed := self.rows.clear():
            mx.clear_cache()
            rungs.append(Rung("media", sequence.n_held, freed))
        if spared := self.spare():
            rungs.append(Rung("adapters", sequence.n_held, spared))
        return freed + spared

    def make_room(self, sequence: Consumer, n_bytes: int) -> Grant:
        """Free memory for an encoder that a sequence is about to run, of which nothing stays.

        Args:
            sequence: the sequence that asks; it has to end where the grant has no tokens.
            n_bytes: that the encoder takes.
        """
        rungs: list[Rung] = []
        if n_bytes > self._free(sequence) - (cached := mx.get_cache_memory()) and cached:
            mx.clear_cache()
            rungs.append(Rung("cache", sequence.n_held, cached))
        if n_bytes > self._free(sequence):
            self._drop_rows(sequence, rungs)
        if (missing := n_bytes - self._free(sequence)) > 0 and (freed := self.give_pages(missing)):
            rungs.append(Rung("pages", sequence.n_held, freed))
        if n_bytes > self._free(sequence):
            full = self._full(sequence, sequence.n_held + 1, sequence.n_held)
            return Grant(rungs=tuple(rungs), full=full)
        return Grant(1, tuple(rungs))

    def load_encoder(self, kind: str) -> None:
        """Load the weights of an encoder, unless they are in memory, and count them."""
        self.weights_bytes += self.encoders.load(kind)

    def after_failure(self, sequence: Consumer, n_held: int) -> Grant:
        """Take the next rung after MLX failed to allocate.

        `sequence` starts over: it has freed its caches of `n_held` tokens.
        """
        account = self._accounts[sequence]
        account.n_failed_at = n_held
        with contextlib.suppress(RuntimeError):
            device.finish()  # the step in flight fails as well
        rungs: list[Rung] = []
        self._drop_rows(sequence, rungs)
        cached = mx.get_cache_memory()
        mx.clear_cache()
        if cached:
            rungs.append(Rung("cache", n_held, cached))
        if account.chunk_cap is None or account.chunk_cap > MIN_CHUNK:
            now = account.chunk_cap or default_chunk()
            account.chunk_cap = n = max(MIN_CHUNK, now // 4)
            account.n_chunk_reported = min(n, account.n_chunk_reported or n)
            rungs.append(Rung("chunk", n_held, n))
        elif freed := self.give_pages(self.pages_bytes):
            rungs.append(Rung("pages", n_held, freed))
        elif (kv_type := smaller_format(sequence, self._kv_bytes)) is not None:
            return Grant(rungs=tuple(rungs), quantize_to=kv_type)
        else:
            return Grant(rungs=tuple(rungs), full=self._full(sequence, n_held + 1, n_held))
        return Grant(rungs=tuple(rungs))

    def _is_roomy(self, sequence: Consumer, n_held: int, n_new: int, beside: int = 0) -> bool:
        """Whether so much is free that this step need not be traced."""
        room = self._free(sequence) - mx.get_cache_memory() - beside
        if self._bound is not None:
            return self._bound(sequence.kv_type, n_held, n_new) <= room
        need = self._need(sequence.kv_type)
        base, times = ROOMY
        if n_new <= STEP and base + times * need.kv_bytes(n_held + n_new) <= room:
            return True
        return any(AMPLE * held <= room for held in need.larger_steps(n_held, n_new))

    @cached_property
    def _bound(self) -> StepBound | None:
        return StepBound.of(self._model)

    def _free(self, asking: Consumer) -> int:
        """Bytes neither used nor granted to other sequences, of the limit and of the machine."""
        granted = self._accounts.granted_bytes(asking)
        own = self.limit_bytes - self.used_bytes - granted
        return min(own, device.memory_limit() - mx.get_active_memory())

    def _room_after(self, sequence: Consumer, n_new: int, *, last: bool) -> int:
        """Bytes left while the next tokens are computed; negative where bytes are missing."""
        held = self._need(sequence.kv_type).step(sequence.n_held, n_new, last=last)
        return self._free(sequence) - (held.peak - held.before)

    def _fits(self, sequence: Consumer, n_new: int, *, last: bool, beside: int = 0) -> bool:
        """Whether `beside` bytes are left while the next tokens are computed.

        Tries the trace of a larger step first, one of few lengths: a trace takes as long as a short
        prompt, and chunks that share steps with decoding have any length.
        """
        if n_new > 1:
            n_held = -(-sequence.n_held // STEP) * STEP
            n_more = larger_chunk(n_new)
            held = self._need(sequence.kv_type).step(n_held, n_more, last=True)
            if self._free(sequence) - WIDER * (held.peak - held.before) >= beside:
                return True
        return self._room_after(sequence, n_new, last=last) >= beside

    def _need(self, kv_type: str) -> Needs:
        if kv_type not in self._needs:
            self._needs[kv_type] = Needs(self._model, kv_type, default_chunk())
        return self._needs[kv_type]

    def _kv_bytes(self, kv_type: str, n_tokens: int) -> int:
        return self._need(kv_type).kv_bytes(n_tokens)

    def _most_tokens(self, sequence: Consumer, kv_type: str) -> int:
        """Tokens that this sequence can hold if everything else is freed."""
        others = self._others(sequence)
        return self._need(kv_type).most_tokens(self._allowed - self.weights_bytes - others)

    @property
    def _allowed(self) -> int:
        """The limit, or what limits of the process leave of it."""
        allowed = device.process_allows()
        return self.limit_bytes if allowed is None else min(allowed, self.limit_bytes)

    def _others(self, sequence: Consumer) -> int:
        return self._accounts.others_bytes(sequence, self._kv_bytes)

    def _full(self, sequence: Consumer, n_wanted: int, most: int | None = None) -> KVCacheFull:
        """The error that ends a sequence, with hints."""
        held = max(sequence.n_held, self._accounts[sequence].n_failed_at or 0)
        most = self._most_tokens(sequence, sequence.kv_type) if most is None else most
        need = self._need(sequence.kv_type)
        others = self._others(sequence)
        enough = self.weights_bytes + others + need.least(n_wanted)
        hints = [Hint("memory", f"{-(-enough // 2**20)}MiB", f"allows {n_wanted:,}")]
        if self._allowed < self.limit_bytes:
            hints = []  # it is the process that may not have more
        if not sequence.is_auto:
            for kv_type in smaller_types(sequence.kv_type):
                n = self._most_tokens(sequence, kv_type)
                if n > most:
                    hints.append(Hint("kv_type", kv_type, f"allows {n:,}"))
        limit, shown = human_bytes(self._allowed), human_bytes(others) if others else ""
        return KVCacheFull(held, n_wanted, most, limit, shown, hints)
