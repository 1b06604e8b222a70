"""SentencePiece vocabularies, from GGUF metadata or a `tokenizer.model`, as `tokenizers` objects.

SentencePiece's BPE keeps no merges: it repeatedly joins the two neighbours whose concatenation has
the highest score, the leftmost of equals. `tokenizers` joins by the rank of the *pair*; ranking
every way to cut a piece in two by the score of the piece gives the same result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxkv.errors import TokenizerError, one_line

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # the visible space that pieces hold


@dataclass(frozen=True, slots=True)
class Pieces:
    """A SentencePiece vocabulary.

    Attributes:
        tokens: by id.
        scores: by id; higher is joined first (BPE) or more probable (Unigram).
        types: by id, `NORMAL` to `BYTE`.
        unigram: the Unigram model instead of BPE.
        add_prefix: put a space in front of the text, and after every added token.
        prefix_once: in front of the text only.
        charsmap: SentencePiece's compiled normalization, empty for none.
        squeeze: collapse runs of spaces, and strip them at the ends.
        ranked: BPE's merges, best first; None for those that the scores make.
    """

    tokens: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    unigram: bool = False
    add_prefix: bool = True
    prefix_once: bool = False
    charsmap: bytes = b""
    squeeze: bool = False
    ranked: Sequence[tuple[str, str]] | None = None


def build(pieces: Pieces, source: str) -> Tokenizer:
    """A tokenizer that gives SentencePiece's ids.

    User-defined pieces become added tokens, which are found before pieces are joined, as in
    SentencePiece; so do control tokens, which only chat templates need.

    Raises:
        TokenizerError: the vocabulary is inconsistent.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer(_model(pieces))
        _set_spaces(tokenizer, pieces)
        # A literal visible space in a text counts as a space only in the normalized text; there
        # the text of user-defined pieces would get the prefix.
        tokens = added_tokens(pieces.tokens, pieces.types, normalized=not pieces.add_prefix)
        tokenizer.add_tokens(tokens)
    except TokenizerError:
        raise
    except Exception as error:  # the `tokenizers` package raises nothing narrower
        raise TokenizerError(
            f"{source}: the vocabulary cannot be used: {one_line(error)}"
        ) from error
    return tokenizer


def added_tokens(
    tokens: Sequence[str], types: Sequence[int], *, normalized: bool = False
) -> list[AddedToken]:
    """Control and unknown tokens as special, user-defined ones as plain added tokens.

    `normalized`: whether user-defined ones are looked for in the normalized text.
    """
    from tokenizers import AddedToken

    return [
        AddedToken(
            token, special=kind != USER_DEFINED, normalized=normalized and kind == USER_DEFINED
        )
        for token, kind in zip(tokens, types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and token
    ]


def set_template(tokenizer: Tokenizer, before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Put start and end tokens, text -> id, around every text that asks for special tokens."""
    from tokenizers import processors

    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=list({**before, **after}.items()),
        )


def merges(pieces: Pieces) -> list[tuple[str, str]]:
    """Every pair whose concatenation is a piece that SentencePiece joins, best first.

    The cuts of one piece have one score; their order made no difference in 18,000 random texts over
    random vocabularies of two letters, where such ties are most frequent.
    """
    mergeable = {
        token: i
        for i, (token, kind) in enumerate(zip(pieces.tokens, pieces.types, strict=True))
        if kind in (NORMAL, UNUSED)
    }
    found = []
    for token in sorted(
        mergeable, key=lambda token: (-pieces.scores[mergeable[token]], mergeable[token])
    ):
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                found.append((left, right))
    return found


def _model(pieces: Pieces) -> models.Model:
    from tokenizers import models

    types = list(pieces.types)
    has_bytes = types.count(BYTE) == 256
    unknown = types.index(UNKNOWN) if UNKNOWN in types else None
    if pieces.unigram:
        vocabulary = list(zip(pieces.tokens, map(float, pieces.scores), strict=True))
        return models.Unigram(vocabulary, unk_id=unknown, byte_fallback=has_bytes)
    return models.BPE(
        vocab=vocabulary_of(pieces.tokens),
        merges=merges(pieces) if pieces.ranked is None else list(pieces.ranked),
        unk_token=None if unknown is None else pieces.tokens[unknown],
        fuse_unk=True,
        byte_fallback=has_bytes,
    )


def vocabulary_of(tokens: Sequence[str]) -> dict[str, int]:
    """Token -> id; of equal tokens the first."""
    found: dict[str, int] = {}
    for i, token in enumerate(tokens):
        found.setdefault(token, i)
    return found


def _set_spaces(tokenizer: Tokenizer, pieces: Pieces) -> None:
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    steps: list[normalizers.Normalizer] = []
    if pieces.charsmap:
        steps.append(normalizers.Precompiled(pieces.charsmap))
    if pieces.squeeze:
        steps.append(normalizers.Strip())
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    back: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    if BYTE in pieces.types:
        back.append(decoders.ByteFallback())
    back.append(decoders.Fuse())
    if pieces.add_prefix:
        back.append(decoders.Strip(" ", 1, 0))
    if pieces.add_prefix and pieces.prefix_once:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(  # pyright: ignore
            replacement=SPACE, prepend_scheme="first", split=False
        )
    else:
        if pieces.add_prefix:
            steps.append(normalizers.Prepend(SPACE))
        steps.append(normalizers.Replace(" ", SPACE))
    if steps:
        whole = steps[0] if len(steps) == 1 else normalizers.Sequence(steps)
        tokenizer.normalizer = whole  # pyright: ignore
    tokenizer.decoder = decoders.Sequence(back)  # pyright: ignore
