"""A model directory's tokenizer: text to token ids and back.

Reads tokenizer.json through the `tokenizers` library and the small JSON files beside it; returns
the ids of transformers' fast tokenizers. Neither transformers nor huggingface_hub is imported.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mlxkv.base import panics
from mlxkv.chat.chat_template import ChatTemplate
from mlxkv.chat.control import Controls
from mlxkv.chat.prompt_writer import PromptWriter
from mlxkv.chat.rendered import Rendered
from mlxkv.chat.replies import Replies
from mlxkv.chat.template_writer import TemplateWriter
from mlxkv.errors import UsageError
from mlxkv.text.added_tokens import apply_added_tokens, fix_mistral_words
from mlxkv.text.detokenizer import (
    Detokenizer,
    bytes_of,
    check_ids,
    has_byte_fallback,
    make_stages,
    pass_start,
)
from mlxkv.text.growing import GrowingTexts
from mlxkv.text.pieces import FREE
from mlxkv.text.plain_encoding import PlainEncoder
from mlxkv.text.tokenizer_files import (
    ModelFiles,
    count_ids,
    read_backend,
    read_chat_template,
    read_end_tokens,
    read_special_tokens,
    told_as_tokenizer_error,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_FAILS = "the model's tokenizer.json fails on this text"


class Tokenizer:
    """One model's tokenizer.

    Attributes:
        n_vocab: ids run from 0 to this, exclusive. At least the `vocab_size` of config.json, which
            is often larger than the vocabulary: the ids between decode to nothing.
        bos_token: text of the first token of a document, None if the model has none.
        bos_token_id: its id.
        eos_token: text of the end token that the tokenizer's files name.
        eos_token_ids: every token that ends an answer.
        chat_template: None if the checkpoint has none.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str],
        eos_token_ids: frozenset[int],
        n_vocab: int,
        chat_template: ChatTemplate | None = None,
    ):
        self._backend, self._growing = backend, GrowingTexts(backend)
        self.special_tokens = dict(special_tokens)
        self.eos_token_ids = eos_token_ids
        self.n_vocab = n_vocab
        self.chat_template = chat_template
        self.bos_token = self.special_tokens.get("bos_token")
        self.bos_token_id = None if self.bos_token is None else self.id_of(self.bos_token)
        self.eos_token = self.special_tokens.get("eos_token")

    @classmethod
    def from_dir(cls, model_dir: Path) -> Tokenizer:
        """Read the tokenizer of a model directory.

        Raises:
            TokenizerError: no tokenizer.json, a file that cannot be read, or an end token that is
                not in the vocabulary; the message names the file and the key.
        """
        model_dir = Path(model_dir)
        what = f"{model_dir / 'tokenizer.json'}: cannot be used"
        with told_as_tokenizer_error(what), panics.without_traces():
            return cls._read(model_dir)

    @classmethod
    def _read(cls, model_dir: Path) -> Tokenizer:
        backend = read_backend(model_dir)
        files = ModelFiles(model_dir)
        special_tokens = read_special_tokens(files)
        apply_added_tokens(backend, files, special_tokens)
        fix_mistral_words(backend, files)
        added = backend.get_added_tokens_decoder()
        return cls(
            backend,
            special_tokens=special_tokens,
            eos_token_ids=read_end_tokens(backend, files, added),
            n_vocab=count_ids(backend, files, added),
            chat_template=read_chat_template(
                files, special_tokens, [token.content for token in added.values()]
            ),
        )

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        owner: str = "",
        most: int | None = None,
    ) -> list[int]:
        """Token ids of a text.

        Special tokens written out in the text become those tokens, as everywhere in the field.

        Args:
            text: taken literally: a backslash followed by a t stays two characters.
            add_special_tokens: add what the model expects around a text, usually the first token.
                Pass False for a rendered chat, which holds it already.
            owner: whose text it is; see `Rendered`.
            most: the tokens that a long text may have, see `GrowingTexts.encode`.

        Raises:
            UsageError: text that is not Unicode (half of a surrogate pair).
            TooManyTokens: see `most`.
            TokenizerError: the model's tokenizer.json cannot encode it.
        """
        with told_as_tokenizer_error(_FAILS, only_panics=True):
            try:
                if not add_special_tokens:
                    return self._growing.encode(text, owner, most)
                if len(text) < FREE or self._around is None:
                    return self._backend.encode(text).ids
                before, behind = self._around
                return [*before, *self._growing.encode(text, owner, most), *behind]
            except TypeError:
                raise _not_unicode() from None

    def cut(self, ids: Sequence[int], most: int) -> list[int]:
        """The first of a text's ids, with those that `encode` adds behind a text."""
        behind = [] if self._around is None else self._around[1]
        kept = max(0, most - len(behind))
        return [*ids[:kept], *behind][:most]

    def encode_rendered(self, rendered: Rendered, most: int | None = None) -> list[int]:
        """Token ids of a rendered conversation; no first token is added.

        Raises:
            UsageError: text that is not Unicode (half of a surrogate pair).
            TooManyTokens: see `encode`.
        """
        if not rendered.plain and not rendered.known:
            return self.encode(
                rendered.text, add_special_tokens=False, owner=rendered.owner, most=most
            )
        with told_as_tokenizer_error(_FAILS, only_panics=True):
            if not rendered.known:
                self._growing.check(rendered.text, most)
            try:
                return self._plain_encoder.encode(rendered, most)
            except TypeError:
                raise _not_unicode() from None

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids: nothing cleaned up, a leading space kept where the decoder keeps it.

        Raises:
            UsageError: an id out of range.
        """
        ids = list(ids)
        check_ids(ids, self.n_vocab)
        with told_as_tokenizer_error("the model's tokenizer.json fails on these tokens"):
            text = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        if "\ufffd" in text and has_byte_fallback(self._decoder_state):
            # `tokenizers` would blank out the valid part of a run of bytes too: see _ByteFallback.
            stream = self.stream(skip_special_tokens=skip_special_tokens)
            if stream.is_live:
                return "".join([*map(stream.add, ids), stream.finish()])
        return text

    def stream(
        self,
        *,
        skip_special_tokens: bool = True,
        keep: Collection[str] = (),
        continues: bool = False,
    ) -> Detokenizer:
        """A detokenizer for one sequence of tokens.

        Args:
            keep: special tokens that are not skipped.
            continues: a text goes before it, so that a blank at its start is the text's own, and
                none that SentencePiece put there.
        """
        skipped = self.special_ids if skip_special_tokens else frozenset()
        if skipped and keep:
            skipped = skipped - {self.id_of(token) for token in keep}

        def token_of(token: int) -> str | None:
            return None if token in skipped else self._backend.id_to_token(token)

        def decode(ids: list[int]) -> str:
            kept = [token for token in ids if token not in skipped]
            return self._backend.decode(kept, skip_special_tokens=False)

        stages = make_stages(self._decoder_state)
        if continues and stages is not None:
            pass_start(stages)
        return Detokenizer(token_of, stages, decode, self.n_vocab)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token by its exact string, special ones included -> its id."""
        return self._backend.get_vocab(with_added_tokens=True)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its exact string, None if there is none."""
        return self._backend.token_to_id(token)

    def token_of(self, token: int) -> str | None:
        """The string of a token as the vocabulary holds it, None for an id without one."""
        self.check_ids((token,))
        return self._backend.id_to_token(token)

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to a text before it: UTF-8, or a part of a character.

        A special token adds its name.
        """
        if token not in self._bytes:
            piece = self.token_of(token)
            data = b"" if piece is None else bytes_of(piece, self._decoder_state)
            if data is None:
                data = self.decode([token], skip_special_tokens=False).encode()
            self._bytes[token] = data
        return self._bytes[token]

    def to_json(self) -> str:
        """The tokenizer as a tokenizer.json, added tokens included."""
        return self._backend.to_str()

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise UsageError unless every id is below `n_vocab` and not negative."""
        check_ids(ids, self.n_vocab)

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        return {}

    @cached_property
    def _decoder_state(self) -> bytes | None:
        decoder = self._backend.decoder
        return None if decoder is None else decoder.__getstate__()

    @cached_property
    def controls(self) -> Controls:
        """The texts that are control tokens where a template writes them."""
        added = self._backend.get_added_tokens_decoder().values()
        template = self.chat_template
        source = "" if template is None else template.source + (template.tools_source or "")
        return Controls.of({token.content: token.special for token in added}, source)

    @cached_property
    def prompt_writer(self) -> PromptWriter | None:
        """Renders conversations for this model; None if the checkpoint has no chat template."""
        template = self.chat_template
        if template is not None and template.is_harmony:
            from mlxkv.chat.gpt_oss.harmony_writer import HarmonyWriter

            return HarmonyWriter(template, Replies())
        return None if template is None else TemplateWriter(template, self.controls)

    @cached_property
    def _plain_encoder(self) -> PlainEncoder:
        return PlainEncoder(self._backend, self.controls, self._growing.encode)

    @cached_property
    def _around(self) -> tuple[list[int], list[int]] | None:
        """The ids that are added before and behind a text; None if that cannot be told."""
        word = self._backend.encode("a", add_special_tokens=False).ids
        whole = self._backend.encode("a").ids
        for i in range(len(whole) - len(word) + 1):
            if word and whole[i : i + len(word)] == word:
                return whole[:i], whole[i + len(word) :]
        return None

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that `decode` skips."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)


def _not_unicode() -> UsageError:
    return UsageError(
        "the text cannot be encoded: it must be a str without lone surrogates (bytes that are not "
        "UTF-8, read as text)"
    )
