"""One sequence: its caches, the tokens that they hold, and where prefixes come from and go to.

Invariants:
- `Session.tokens` are exactly the tokens whose KV the caches hold.
- The budget is asked before the caches grow, and pages get what is complete as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import replace

import mlx.core as mx

from mlxkv.base.device import default_chunk
from mlxkv.base.stepwise import finished
from mlxkv.cache import convert_caches, make_caches
from mlxkv.generation.asking import asked
from mlxkv.generation.held import Held
from mlxkv.generation.lifting import behind, lifting
from mlxkv.generation.media import MediaRows
from mlxkv.generation.prefill import Tap, hears_all, prefilling
from mlxkv.generation.prompt_logprobs import PromptLogprobs, Scores
from mlxkv.generation.restored import Restored, explained, n_shared
from mlxkv.kv.types import AUTO, STEP, ceil_step, first_kv_type
from mlxkv.media.prompt import NO_MEDIA
from mlxkv.media.types import Medium
from mlxkv.memory.budget import Budget
from mlxkv.memory.media import Rows
from mlxkv.memory.types import ALLOCATION_ERRORS, Grant, Rung, is_allocation_failure
from mlxkv.nn.blocks import growth_bytes, sliceable
from mlxkv.nn.model import CausalLM
from mlxkv.prefix.border import Border
from mlxkv.prefix.border_capture import BorderCutter
from mlxkv.prefix.capture import Cutter
from mlxkv.prefix.layout import Link
from mlxkv.prefix.match import WORTH, Match
from mlxkv.prefix.pages import Pages


class Session(Held):
    """The caches of one sequence, and which tokens they hold.

    Args:
        model: the model.
        kv_type: format of the KV: one of `KV_CHOICES`, or by layer.
        pages: where prefixes come from and go to; None for a sequence that keeps to itself.
        budget: asked before the caches grow; None for a sequence that takes what it wants.
        scores: log-probabilities of recent prompts that share its pages; None keeps none.
        border: where it shares pages with the model's adapters, or the base; None for none.

    Attributes:
        kv_type: the format that the KV is in now.
        media: among the tokens that are held or come next.
        listener: hears what is computed of prompts; None for none.
        turn_ends: tokens that end a turn, see `prefix.marks`.
        rungs: what was done since the last `restore` to free memory.
        n_lifted: tokens of the prompt of which only the layers above the border were computed.
    """

    def __init__(
        self,
        model: CausalLM,
        kv_type: str = "native",
        pages: Pages | None = None,
        budget: Budget | None = None,
        scores: Scores | None = None,
        border: Border | None = None,
    ):
        super().__init__(model, first_kv_type(kv_type))
        self.is_auto, self.media = kv_type == AUTO, NO_MEDIA
        self.turn_ends: Collection[int] = ()
        self.pages, self._budget, self._scores = pages, budget, scores
        self._scorer: PromptLogprobs | None = None
        self._border, self.n_lifted = border, 0
        self._cutter = self._new_cutter()
        self._stable = model.stable_tokens if pages is None else pages.stable
        self._longest = 0  # tokens that the caches have held since they were empty
        self._n_restored = 0  # tokens of the last prompt that were not computed
        self.rungs: list[Rung] = []
        if budget is not None:
            budget.join(self)

    @property
    def gives_pages(self) -> bool:
        """Whether others can go on from what it computes."""
        return self._cutter is not None and self._shareable(0)

    @property
    def page_bytes(self) -> int:
        """Bytes kept beside the caches for the next page."""
        return 0 if self._cutter is None else self._cutter.nbytes

    def reset(self) -> None:
        """Forget everything."""
        if self._budget is not None:
            self._budget.dismiss(self)
        if self.kv_type != self._first_type:
            self.kv_type = self._first_type
            self.caches[:] = make_caches(self.model, self.kv_type)
            self._cutter = self._new_cutter()
        self._empty()

    def _new_cutter(self) -> Cutter | None:
        if self.pages is None or self._border is None:
            return None if self.pages is None else Cutter(self.pages, self.caches)
        return BorderCutter(self.pages, self.caches, self._border)

    def _empty(self) -> None:
        """Forget everything, and stay in the same format."""
        for cache in self._all:
            cache.reset()
        self._known, self._longest = [], 0

    def quantize(self, kv_type: str) -> Rung:
        """Convert the KV to a smaller format, layer by layer; from then on it gives no pages."""
        before = self.nbytes
        self.kv_type = kv_type
        if self._scorer is not None:
            self._scorer.is_shared = False
        self._cutter = None
        for caches in (self.caches, [] if self.listener is None else self.listener.caches):
            convert_caches(caches, kv_type)
        mx.clear_cache()
        return Rung("packed", self.n_held, before - self.nbytes, kv_type)

    def apply(self, grant: Grant) -> None:
        """Do what the budget asks for.

        Raises:
            KVCacheFull: there is no room.
        """
        self.rungs += grant.rungs
        if grant.full is not None:
            raise grant.full
        if grant.quantize_to is not None:
            self.rungs.append(self.quantize(grant.quantize_to))

    def score(self, tokens: Sequence[int], n_top: int) -> PromptLogprobs:
        """Log-probabilities of a prompt's tokens, and of the `n_top` likeliest at each place, which
        the next `restore` and prefill find."""
        self._scorer = PromptLogprobs(tokens, n_top, self.media)
        if self._scores is not None and self._shareable(len(tokens)):
            self._scores.join(self._scorer)
        return self._scorer

    def restore(self, tokens: Sequence[int]) -> Restored:
        """Keep or bring back the longest prefix of `tokens` that can be gone on from.

        At least one token is left to compute, whose logits are the answer's first.
        """
        self.rungs, self.n_lifted = [], 0
        if self._budget is not None:
            self._budget.begin_prompt(self)
        try:
            return self._restore(tokens)
        except ALLOCATION_ERRORS as error:
            if not is_allocation_failure(error):
                raise
            self.reset()  # all of it is computed, if there is room for that
            return Restored(0)

    def _restore(self, tokens: Sequence[int]) -> Restored:
        held = self.tokens
        shared = n_shared(held, tokens)
        n_live = self.resumable(tokens, min(shared, self._most(tokens)))
        behind = tuple(held[shared : shared + STEP])
        live = Restored(n_live, shared=shared, held=behind, n_known=len(held))
        if live.n_tokens < len(held) and not self._shareable(0):
            live = replace(live, n_tokens=0)  # its keys were turned for a longer sequence
        restored = self._from_pages(tokens, live, len(held))
        if restored.shared > self._most(tokens) + 1:  # no miss: what it has no logits of
            restored = Restored(restored.n_tokens, restored.ssd_tokens)
        if restored.n_tokens == 0:
            self.reset()
        self._known, self._n_restored = list(tokens[: restored.n_tokens]), restored.n_tokens
        return replace(restored, states=self.pages is not None and self.pages.kinds.states)

    def _from_pages(self, tokens: Sequence[int], live: Restored, n_held: int) -> Restored:
        """Go back to the shared prefix, or to what pages have of it, whichever is longer."""
        match = self._match(tokens)
        while match.n_tokens > live.n_tokens or not self._rewind(live.n_tokens):
            # Before anything is loaded: an interrupt must not find other KV under the old tokens.
            self.reset()
            live = replace(live, n_tokens=0)
            if self.pages is None or match.n_tokens == 0:
                continue
            ssd_tokens = self.pages.load(match, self.caches, len(tokens) - match.n_tokens)
            if ssd_tokens is not None:
                self._longest = match.n_tokens
                self._cut_from(tokens[: match.n_tokens], match)
                return explained(Restored(match.n_tokens, ssd_tokens), live, match)
            # A damaged file: what is left of the chain is looked up anew.
            self.reset()
            match = self._match(tokens)
        if live.n_tokens < n_held or n_held == 0:
            self._cut_from(tokens[: live.n_tokens], match)
        return explained(live, live, match)

    def _match(self, tokens: Sequence[int]) -> Match:
        if self.pages is None:
            return Match()
        n, worth = self.resumable(tokens, self._most(tokens)), WORTH
        match = self.pages.match(tokens, n, worth)
        if min(tokens[match.n_tokens : match.shared], default=0) < 0:
            worth, match = 1, self.pages.match(tokens, n, 1)  # it would take an encoder's run
        while (n := self.resumable(tokens, match.n_tokens)) < match.n_tokens:
            match = self.pages.match(tokens, n, worth)
        return match

    def resumable(self, tokens: Sequence[int], n: int) -> int:
        """The last place up to `n` tokens where a prompt can be cut, and gone on from."""
        return self.media.resumable(tokens, n, self.model.two_way_kinds)

    def _most(self, tokens: Sequence[int]) -> int:
        """Tokens that may be restored: those behind them are computed, to have their logits."""
        n = len(tokens) - 1
        return n if self._scorer is None else min(n, self._scorer.n_known - 1)

    def _cut_from(self, tokens: Sequence[int], match: Match) -> None:
        """Have what comes next cut behind `tokens`, which the caches hold."""
        if self._cutter is not None:
            self._cutter.resume(tokens, match)

    def prefill(
        self,
        tokens: Sequence[int],
        *,
        chunk: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> mx.array:
        """Run what `restore` left of a prompt; lazy logits `[1, V]` after its last token.

        Raises:
            KVCacheFull: there is no room for it.
        """
        steps = self.prefilling(tokens, lambda: chunk)
        return finished(steps, None if on_progress is None else lambda at: on_progress(*at))

    def prefilling(
        self, tokens: Sequence[int], chunk: Callable[[], int | None]
    ) -> Generator[tuple[int, int], None, mx.array]:
        """`prefill`, a chunk each time that the next is asked for.

        Args:
            tokens: the prompt.
            chunk: asked before each chunk how many tokens to compute; None for the device's
                default.

        Yields:
            (done, all) after each chunk but the last.
        """
        while True:
            try:
                return (yield from self._prefilling(list(tokens), chunk))
            except ALLOCATION_ERRORS as error:
                self.start_over(list(tokens), error)

    def _prefilling(
        self, tokens: list[int], chunk: Callable[[], int | None]
    ) -> Generator[tuple[int, int], None, mx.array]:
        start, scorer = self._settle(), self._scorer
        self._known = tokens
        if self._budget is not None:
            self._budget.admit(self, len(tokens))
        kept = Rows() if self._budget is None else self._budget.rows
        media = MediaRows(self.model, self.media, tokens, kept, self._make_room)
        if self._cutter is not None:
            self._cutter.expect(tokens, self.turn_ends)
        first, start = start, (yield from self._lifting(tokens, start, chunk))

        def take(n_left: int, n: int) -> int:
            at, n_new = start + n - n_left, min(chunk() or default_chunk(), n_left)
            n_new = n_new if self._cutter is None else self._cutter.until(at, n_new)
            return media.take(at, n_new, lambda m, whole: self._take(at, m, m == n_left, whole))

        def computed(done: int) -> None:
            self._cut(start + done)
            if self._budget is not None:
                self._budget.note()

        new = self.media.vocabulary(tokens[start:])
        given = self.model, new, self.caches, take, computed, scorer, start, media, self.listener
        steps = prefilling(*given, self._tap)
        logits = yield from behind(max(0, start - first), steps)
        self._scorer = None
        self._longest = max(self._longest, len(tokens))
        return logits

    def _lifting(
        self, tokens: list[int], start: int, chunk: Callable[[], int | None]
    ) -> Generator[tuple[int, int], None, int]:
        """Compute what only the layers above the border lack; tokens that all caches hold then."""
        cutter = self._cutter
        if not isinstance(cutter, BorderCutter):
            return start
        is_whole = bool(self.model.two_way_kinds) and min(tokens) < 0
        lift = None if is_whole else cutter.lift(tokens, start, self._most(tokens))
        if lift is not None:

            def take(at: int, n: int) -> int:
                return self._take(at, min(chunk() or default_chunk(), n), False, False)

            yield from lifting(self, cutter, lift, tokens, start, take)
            stop, self._known = self._settle(), tokens
            if not stop and self._budget is not None:  # it starts over, and so does its reservation
                self._budget.admit(self, len(tokens))
            cutter.lifted(tokens[:stop], lift)
            self.n_lifted, start = max(0, stop - start), stop
        cutter.begin(tokens, start, is_whole)
        return start

    def _tap(self) -> Tap | None:
        """What hears the residual stream of the next chunk."""
        return self._cutter.tap if isinstance(self._cutter, BorderCutter) else None

    def _take(self, at: int, n_new: int, last: bool, whole: bool) -> int:
        """How many of the next tokens of a prompt there is memory for; see `asked`."""
        beside, last = 0, last or hears_all(self.listener)
        if self._scorer is not None and self._scorer.wants(at, n_new):
            beside, last = self._scorer.step_bytes(self.model), True
        return asked(self, self._budget, n_new, last=last, beside=beside, whole=whole)

    def _make_room(self, medium: Medium) -> None:
        """Ask for memory for an encoder; raises KVCacheFull where there is none."""
        if self._budget is not None:
            self.apply(self._budget.make_room(self, self._budget.encoders.of(medium)))
            self._budget.load_encoder(medium.kind)

    def before_step(self, n_new: int = 1) -> None:
        """Tokens are about to be fed: the caches grow at each step of 256."""
        if self._budget is not None and -self.n_held % STEP < n_new:
            self._budget.note()
            beside = growth_bytes(sliceable(self.caches), self.n_held + n_new)
            asked(self, self._budget, n_new, last=True, beside=beside, whole=n_new > 1)

    def has_room(self, n_bytes: int, n_new: int = 0) -> bool:
        """Whether caches may be moved, which takes so many bytes, and n_new tokens be computed."""
        budget, n_after = self._budget, ceil_step(self.n_held + 1)
        has_room = budget is None or budget.has_room(self, n_bytes)
        return has_room and not (n_new and budget and not budget.is_roomy(self, n_after, n_new))

    def start_over(self, tokens: list[int], error: BaseException) -> None:
        """MLX could not allocate: nothing is known of the caches, so what is kept is restored.

        Raises:
            KVCacheFull: nothing is left that could give way.
        """
        if self._budget is None or not is_allocation_failure(error):
            raise error
        n_held = min(len(tokens), self.n_held)
        self._empty()
        self.apply(self._budget.after_failure(self, n_held))
        if self.kv_type != self._first_type:
            return  # there are no pages in this format
        try:
            self._restore(tokens)
        except ALLOCATION_ERRORS:
            self._empty()

    def append(self, token: int) -> None:
        """Remember a token of the answer: the caches hold it, or are given it next."""
        self._known.append(token)

    def cut_due(self) -> None:
        """Give the pages what has become complete, while the caches hold no token not known yet."""
        n = self.n_held
        self._longest = max(self._longest, n)
        if self._cutter is not None and self._cutter.is_due(n):
            self._cut(n)

    def finish(self) -> list[Link]:
        """Give the pages what this sequence has computed, its unfinished page too; its pages."""
        n, cutter = self._settle(), self._cutter
        if self._budget is not None:
            self._budget.note()
        return cutter.finish(self._known, n) if cutter and n and self._shareable(n) else []

    def discard(self) -> None:
        """Forget everything, also what the pages have of what was computed: it is no KV."""
        if self._cutter is not None:
            self._cutter.forget(self._n_restored)
        self.reset()

    def _cut(self, n: int) -> None:
        if self._cutter is not None and n <= len(self._known) and self._shareable(n):
            self._cutter.advance(self._known, n)

    def _shareable(self, n: int) -> bool:
        """Whether the KV of `n` tokens is the one that any prompt with them has."""
        self._longest = max(self._longest, n)
        return self._stable is None or self._longest <= self._stable
