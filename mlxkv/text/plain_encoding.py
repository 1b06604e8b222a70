"""Encode rendered text in which some control tokens' texts are ordinary text.

`tokenizers` cuts a text at its added tokens and encodes what is between on its own. So does this:
what spells a control token inside a plain span is hidden from the search for added tokens, and a
run between two of them that holds such a place is encoded by a model that has no control tokens.
All else is encoded as ever.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mlxkv.chat.control import Controls, overlapping
from mlxkv.chat.rendered import Rendered, Span
from mlxkv.text.growing import COUNTED, TooManyTokens
from mlxkv.text.pieces import Pieces, encode_free

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import Model

_HIDDEN = "\ufdef"
"""Takes the place of a first character, so that a control token is not found. A noncharacter."""
_OTHER = "\ufdee"
"""Name of a token that stands before a run, for the models that treat a text's start apart."""


Encode = Callable[[str, str, int | None], list[int]]


class PlainEncoder:
    """Encodes rendered texts of one tokenizer.

    What it needs besides is made when a text first spells a control token.

    Args:
        backend: the tokenizer.
        controls: its control tokens.
        encode: gives the ids of a text of an owner, without a first token; see
            `GrowingTexts.encode`.
    """

    def __init__(self, backend: Backend, controls: Controls, encode: Encode):
        self._backend = backend
        self._controls = controls
        self._encode_text = encode

    def encode(self, rendered: Rendered, most: int | None = None) -> list[int]:
        """Token ids of a rendered text; no first token is added.

        Raises:
            TooManyTokens: more than `most`, see `GrowingTexts.encode`.
        """
        ids: list[int] = []
        done = 0
        for start, end, tokens in rendered.known:
            self._encode(rendered.before(start).behind(done), ids, most)
            ids += tokens
            done = end
        self._encode(rendered.behind(done), ids, most)
        return ids

    def _encode(self, rendered: Rendered, ids: list[int], most: int | None) -> None:
        """Append the ids of a text without known spans."""
        text = rendered.text
        hidden = overlapping(self._controls.found(text), rendered.plain)
        if not hidden:
            return self._append(text, rendered.owner, ids, most)
        done = 0
        for start, end in self._runs(text, hidden):
            self._append(text[done:start], rendered.owner, ids, most)
            for part_start, part_end in self._parts.of(text, start, end):
                part = text[part_start:part_end]
                ids += self._plain_ids(part, at_start=part_start == 0)
                if most is not None and len(ids) > most and len(text) - part_end > COUNTED:
                    raise TooManyTokens(len(ids))
            done = end
        return self._append(text[done:], rendered.owner, ids, most)

    def _append(self, text: str, owner: str, ids: list[int], most: int | None) -> None:
        if not text:
            return
        try:
            ids += self._encode_text(text, owner, None if most is None else most - len(ids))
        except TooManyTokens as error:
            raise TooManyTokens(len(ids) + error.n_tokens) from None

    def _plain_ids(self, text: str, *, at_start: bool) -> list[int]:
        text = text if at_start else _OTHER + text
        ids = encode_free(self._plain, text).ids
        # Some models have the name of a control token among the words that they find.
        if not self._control_ids.isdisjoint(ids[not at_start :]):
            ids = encode_free(self._stripped, text).ids
        return ids[not at_start :]

    def _runs(self, text: str, hidden: list[Span]) -> Iterator[Span]:
        """The runs between two added tokens that hold hidden ones."""
        tokens = list(self._added_in(text, hidden))
        starts = iter(start for start, _ in hidden)
        place = next(starts, None)
        done = 0
        for start, end in [*tokens, (len(text), len(text))]:
            if place is not None and place < start:
                yield done, start
                while place is not None and place < start:
                    place = next(starts, None)
            done = max(done, end)

    def _added_in(self, text: str, hidden: list[Span]) -> Iterator[Span]:
        """Where a text has added tokens that are not hidden."""
        shown, done = [], 0
        for start, _ in hidden:
            shown += [text[done:start], _HIDDEN]
            done = start + 1
        marked = "".join([*shown, text[done:]])
        for at, end in self._parts.of(marked, 0, len(marked)):
            found = encode_free(self._added, marked[at:end])
            for (start, stop), token in zip(found.offsets, found.ids, strict=True):
                if token:
                    yield at + start, at + stop

    @cached_property
    def _parts(self) -> Pieces:
        return Pieces(self._backend)

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        ids = (self._backend.token_to_id(text) for text in self._controls.all)
        return frozenset(i for i in ids if i is not None)

    @cached_property
    def _added(self) -> Backend:
        """Finds the added tokens as the tokenizer does, and gives all other text the id 0."""
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import WordLevel

        added = self._backend.get_added_tokens_decoder()
        vocab = {token.content: i for i, (_, token) in enumerate(sorted(added.items()), 1)}
        found = Backend(WordLevel({_OTHER: 0} | vocab, unk_token=_OTHER))
        found.normalizer = self._backend.normalizer
        found.add_tokens([token for _, token in sorted(added.items())])
        return found

    @cached_property
    def _plain(self) -> Backend:
        """The tokenizer's own model, with no added tokens around it."""
        return self._around(self._backend.model)

    @cached_property
    def _stripped(self) -> Backend:
        """A copy of the model that cannot make a control token. Large: built only if needed."""
        from tokenizers import Tokenizer as Backend

        source = json.loads(self._backend.to_str())
        _take_out(source["model"], self._controls.all)
        source |= {"added_tokens": [], "post_processor": None}
        return self._around(Backend.from_str(json.dumps(source)).model)

    def _around(self, model: Model) -> Backend:
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        made = Backend(model)
        made.normalizer = self._backend.normalizer
        made.pre_tokenizer = self._backend.pre_tokenizer
        made.add_special_tokens([AddedToken(_OTHER, special=True, normalized=False)])
        return made


def _take_out(model: dict[str, Any], controls: frozenset[str]) -> None:
    """Leave no way for a model to make a control token of characters.

    Its entry gets a name that no text has: the other ids stay what they are.
    """
    unknown = model.get("unk_token")
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {
            _HIDDEN + piece if piece in controls and piece != unknown else piece: i
            for piece, i in vocab.items()
        }
    elif isinstance(vocab, list):  # Unigram: pieces and their scores
        unknown = model.get("unk_id")
        model["vocab"] = [
            [_HIDDEN + piece if piece in controls and i != unknown else piece, score]
            for i, (piece, score) in enumerate(vocab)
        ]
    if isinstance(merges := model.get("merges"), list):
        model["merges"] = [merge for merge in merges if not _makes(merge, controls)]


def _makes(merge: str | list[str], controls: frozenset[str]) -> bool:
    first, _, second = merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[1])
    return first + second in controls or first in controls or second in controls
