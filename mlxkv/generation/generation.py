"""One answer in the making: from a prompt to chunks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxkv.errors import KVCacheFull
from mlxkv.generation.asleep import Asleep, Written
from mlxkv.generation.context_shift import Bound
from mlxkv.generation.drafts.drafting import AnswerDrafting
from mlxkv.generation.drafts.drafts import MaskerAhead
from mlxkv.generation.flight import Row
from mlxkv.generation.outputs import Chunk, DraftStats, Parts, Stats, TokenLogprobs, join_parts
from mlxkv.generation.prompt_logprobs import PromptLogprobs, answer_logprobs
from mlxkv.generation.reader import AnswerReader
from mlxkv.generation.request import Request
from mlxkv.generation.session import Restored, Session
from mlxkv.generation.stats import Clock
from mlxkv.media.prompt import NO_MEDIA, PromptMedia
from mlxkv.media.types import AUDIO, IMAGE
from mlxkv.memory.types import without_trace
from mlxkv.parsers.events import ToolCall
from mlxkv.sampling.sampler import Sampler
from mlxkv.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mlxkv.sampling.grammar import Masker


class Generation:
    """One answer in the making. It computes nothing: the scheduler runs its prompt and its steps.

    Args:
        session: for its sequence.
        tokens: the whole prompt.
        request: what is asked for.
        sampler: chooses.
        reader: of the tokens that are chosen.
        bound: the context.
        tokenizer: the model's.
        masker: of the request's format; None where it has none.
        media: of the prompt.
        drafting: makes its drafts; None for none.
        told: tokens whose log-probabilities are told with each token's.

    Attributes:
        sequence: the whole prompt and what was generated, dropped tokens included.
        prompt: the prompt before it was cut to the context; `sequence` begins with what is left.
        limit: tokens that the answer may have, None for as many as come.
        is_over: whether the last chunk was made.
        ahead_tokens: see `Stats`, and so `ahead_saved_s`.
    """

    def __init__(
        self,
        session: Session,
        tokens: list[int],
        request: Request,
        sampler: Sampler,
        reader: AnswerReader,
        bound: Bound,
        tokenizer: Tokenizer,
        masker: Masker | None = None,
        media: PromptMedia = NO_MEDIA,
        drafting: AnswerDrafting | None = None,
        told: tuple[int, ...] = (),
    ):
        media.check(tokens)
        self.media = media
        self.session, self.request, self.sampler, self.bound = session, request, sampler, bound
        self.sequence, self.prompt = list(tokens), tokens
        self.limit = bound.limit(len(tokens), request.max_tokens)
        self.is_over = False
        self.ahead_tokens, self.ahead_saved_s = 0, 0.0
        self.masker, self._drafting, self._told = masker, drafting, told
        self._tokenizer, self._reader = tokenizer, reader
        self._n_prompt = len(tokens)
        self._clock = Clock()
        self._prompt: list[int] = []
        self._restored, self._n_upper = Restored(0), 0
        self._scorer: PromptLogprobs | None = None
        self._parts: list[Parts] = []
        self._logprobs: list[TokenLogprobs] = []

    @property
    def answer(self) -> list[int]:
        """Tokens of the answer so far, also those that a shift dropped."""
        return self.sequence[self._n_prompt :]

    @property
    def ends(self) -> tuple[int, ...]:
        """End tokens that the model may choose."""
        return tuple(x for x in self._tokenizer.eos_token_ids if x < self.sampler.n_vocab)

    @property
    def n_generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.sequence) - self._n_prompt

    def restore(self) -> list[int]:
        """Bring back what is held of the sequence; the tokens that are to be prefilled.

        What the first time finds is what the figures say of the prompt.
        """
        tokens = self.remaining()
        self.session.media, self.session.turn_ends = self.media, self._tokenizer.eos_token_ids
        if (drafting := self._drafting) is None:
            self.session.listener = None
        else:
            self.session.listener = drafting.listener(self.session.caches, self.session.kv_type)
        if self.request.prompt_logprobs is not None and not self.n_generated:
            self._scorer = self.session.score(tokens, self.request.prompt_logprobs)
        restored = self.session.restore(tokens)
        if not self._prompt:
            self._prompt = self.bound.remaining(self.sequence[: self._n_prompt])
            self._restored = restored.of_first(len(self._prompt))
        return tokens

    @property
    def n_left(self) -> int | None:
        """Tokens until the answer is at its limit or the context is full; None for no bound."""
        n = len(self.sequence)
        room = self.bound.context - (n - self.bound.n_dropped(n))
        return room if self.limit is None else min(room, self.limit - self.n_generated)

    def remaining(self) -> list[int]:
        """What of the prompt and the answer the caches shall hold: all that fits the context."""
        return self.bound.remaining(self.sequence)

    def row(self, logits: mx.array) -> Row:
        """It as a row of a decoder, which decodes from the logits `[1, V]` after its last token."""
        masker, n_vocab, drafting = self.masker, self.sampler.n_vocab, self._drafting
        if not self.n_generated:
            self._n_upper = self.session.n_lifted
        return Row(
            self.session,
            logits,
            self.sampler,
            self.n_left,
            None if masker is None else lambda _: masker.allowed(n_vocab),
            self.request.logprobs,
            self.answer,
            self.ends,
            self.request.min_tokens - self.n_generated,
            None if drafting is None else drafting.begin(self.sequence),
            None if masker is None else MaskerAhead(masker, n_vocab),
            self._told,
        )

    def add(self, token: int, logprobs: TokenLogprobs | None = None) -> Chunk:
        """The chunk of the next token; the last has the figures."""
        self._clock.tick()
        first = self._first()
        self.sequence.append(token)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        ended = token in self._tokenizer.eos_token_ids and not self.request.ignore_eos
        part = self._reader.add(token)
        self._parts.append(part)
        if not (ended or self._reader.stopped or self.n_generated == self.limit):
            return Chunk(
                part.text,
                token,
                reasoning=part.reasoning,
                tool_calls=part.tool_calls,
                logprobs=logprobs,
                **first,
            )
        text, reasoning, calls = join_parts([part, self._finish()])
        reason = "stop" if ended or self._reader.stopped else "length"
        return Chunk(
            text,
            token,
            reason,
            self._stats(),
            reasoning or None,
            calls,
            logprobs,
            stopped_by=self._reader.stopped_by,
            **first,
        )

    def end(self, reason: str, error: KVCacheFull | None = None) -> Chunk:
        """A last chunk without a token: what was generated stays the caller's."""
        rest = self._finish()
        if error is not None:
            error = without_trace(error)
        text, reasoning, calls = join_parts([rest])
        return Chunk(
            text,
            None,
            reason,
            self._stats(),
            reasoning or None,
            calls,
            error=error,
            **self._first(),
        )

    def reply(self) -> tuple[str, str, tuple[ToolCall, ...]]:
        """Text, reasoning and calls so far, as the client has them."""
        return join_parts(self._parts)

    def advance(self, token: int) -> bool:
        """Have the grammar follow the token that came; whether it is complete by this.

        Raises:
            UsageError: it must not come here.
        """
        if self.masker is None or self.is_over:
            return False
        self.masker.advance(token)
        return self.masker.finished

    def written(self) -> Written:
        """The answer so far, as what puts it away keeps it."""
        logprobs = [
            (each.logprob or 0.0, tuple((top.token, top.logprob or 0.0) for top in each.top))
            for each in self._logprobs
        ]
        calls = [call.id for part in self._parts for call in part.tool_calls]
        return Written(self.answer, logprobs, calls)

    def replay(self, asleep: Asleep) -> list[Chunk]:
        """Bring a new answer to where it was put away; the chunks that it gave until then.

        Raises:
            MlxkvError: the model cannot have written it.
        """
        written, chunks = asleep.written, []
        self._reader.expect_calls(written.calls)
        for i, token in enumerate(written.tokens):
            told = written.logprobs[i] if i < len(written.logprobs) else (None, ())
            chunks.append(self.add(token, answer_logprobs(self._tokenizer, token, *told)))
            self.advance(token)
        self._reader.expect_calls(())
        self.sampler.rewind(self.n_generated)
        self._clock = Clock()
        return chunks

    def _finish(self) -> Parts:
        """End the answer with what the reader held back."""
        self.is_over = True
        if self._drafting is not None:
            self._drafting.end(self.sequence)
        self._parts.append(rest := self._reader.finish())
        return rest

    def _first(self) -> dict[str, Any]:
        """What the first chunk says of the prompt; nothing while there is an answer."""
        if self.n_generated:
            return {}
        told = None if self._scorer is None else self._scorer.told(self._tokenizer)
        return {"prompt_tokens": self._n_prompt, "prompt_logprobs": told}

    def _stats(self) -> Stats:
        n = self.n_generated
        stats = self._clock.stats(
            self._prompt,
            self._restored,
            n,
            self.session.nbytes,
            self._text_of,
        )
        n_rows = self._n_rows()
        # The last token itself has not been made room for.
        shifted = self.bound.n_dropped(self._n_prompt + max(n, 1) - 1)
        rungs, moved = tuple(self.session.rungs), self.request.moved_chars
        return replace(
            stats,
            shifted_tokens=shifted,
            rungs=rungs,
            moved_chars=moved,
            ahead_tokens=self.ahead_tokens,
            ahead_saved_s=self.ahead_saved_s,
            image_tokens=n_rows[IMAGE],
            audio_tokens=n_rows[AUDIO],
            drafts=self._drafts(),
            upper_tokens=self._n_upper,
        )

    def _drafts(self) -> DraftStats | None:
        """What drafts gave; None where there were none."""
        drafts = None if self._drafting is None else self._drafting.drafts
        if drafts is None or not drafts.counts.passes:
            return None
        counts = drafts.counts
        return DraftStats(counts.passes, counts.proposed, counts.accepted, dict(counts.by))

    def _text_of(self, tokens: Sequence[int], at: int | None) -> str:
        """What tokens say; `at` where they stand in the prompt, None for those of another."""
        known = None if at is None else self.media.numbers(self._prompt, at, at + len(tokens))
        return self.media.text(tokens, self._tokenizer.decode, known or {})

    def _n_rows(self) -> Counter[str]:
        """Tokens of the prompt that are rows of each kind of media."""
        found: Counter[str] = Counter()
        for start, stop, medium in self.media.spans(self._prompt):
            found[medium.kind] += stop - start
        return found
