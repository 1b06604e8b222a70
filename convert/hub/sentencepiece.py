"""tokenizer.model, a SentencePiece model, as tokenizer.json.

The `sentencepiece` package (an optional extra) defines the file, a protocol buffer. Format:
https://github.com/google/sentencepiece, `sentencepiece_model.proto`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxkv.base import regular
from mlxkv.checkpoint.config import read_json
from mlxkv.errors import TokenizerError

from ..pieces import SPACE, USER_DEFINED, Pieces, build, set_template
from ..sources import write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_UNIGRAM, _BPE = 1, 2


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """A tokenizer.model and the files beside it.

    Attributes:
        pieces: the vocabulary and the normalization.
        ids: "bos", "eos", "unk" and "pad" -> id, of those that exist.
        config: tokenizer_config.json, empty if there is none.
        added: tokens behind the vocabulary, id -> (text, special).
    """

    path: Path
    pieces: Pieces
    ids: Mapping[str, int]
    config: Mapping[str, Any]
    added: Mapping[int, tuple[str, bool]]

    @property
    def files(self) -> tuple[str, ...]:
        """The files that `write` writes."""
        return ("tokenizer.json",) if self.config else ("tokenizer.json", "tokenizer_config.json")

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer.

        Raises:
            TokenizerError: the vocabulary or the added tokens are inconsistent.
        """
        tokenizer = build(self.pieces, str(self.path))
        add_listed(tokenizer, self.added, len(self.pieces.tokens), self.path)
        bos = self._template_token(tokenizer, "bos", True)
        set_template(tokenizer, bos, self._template_token(tokenizer, "eos", False))
        return tokenizer

    def write(self, folder: Path) -> None:
        self.tokenizer().save(str(folder / "tokenizer.json"), pretty=False)
        if not self.config:
            names = {f"{name}_token": self._token(name) for name in self.ids}
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, **names}
            write_json(folder / "tokenizer_config.json", config)

    def _token(self, name: str) -> str | None:
        """The text of a special token; tokenizer_config.json counts before the model."""
        stated = self.config.get(f"{name}_token")
        if isinstance(stated, Mapping):
            stated = stated.get("content")
        if isinstance(stated, str):
            return stated
        return self.pieces.tokens[self.ids[name]] if name in self.ids else None

    def _template_token(self, tokenizer: Tokenizer, name: str, default: bool) -> dict[str, int]:
        """Text and id of the token at one end of a text; {} for none."""
        wanted = self.config.get(f"add_{name}_token", default)
        token = self._token(name) if wanted else None
        i = tokenizer.token_to_id(token) if token else None
        return {token: i} if token and i is not None else {}


def open_sentencepiece(folder: Path) -> SentencePieceModel:
    """Read tokenizer.model and the configuration beside it.

    Raises:
        TokenizerError: the package is missing, the file is damaged, or `tokenizers` has no such
            model.
    """
    path = folder / "tokenizer.model"
    proto = _parse(path)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise TokenizerError(f"{path}: must be a BPE or Unigram model; got {trainer.model_type}")
    if trainer.treat_whitespace_as_suffix:
        raise TokenizerError(f"{path}: treat_whitespace_as_suffix is not supported")
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.exists() else {}
    pieces = Pieces(
        # User-defined pieces match plain spaces in a text.
        [p.piece.replace(SPACE, " ") if p.type == USER_DEFINED else p.piece for p in proto.pieces],
        [p.score for p in proto.pieces],
        [p.type for p in proto.pieces],
        unigram=trainer.model_type == _UNIGRAM,
        add_prefix=normalizer.add_dummy_prefix,
        prefix_once=config.get("legacy") is False,
        charsmap=bytes(normalizer.precompiled_charsmap),
        squeeze=normalizer.remove_extra_whitespaces,
    )
    n = len(pieces.tokens)
    stated = {name: getattr(trainer, f"{name}_id") for name in ("bos", "eos", "unk", "pad")}
    ids = {name: i for name, i in stated.items() if 0 <= i < n}
    return SentencePieceModel(path, pieces, ids, config, listed_tokens(folder, config, n))


def _parse(path: Path) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except (ImportError, TypeError) as error:
        raise TokenizerError(
            f"{path}: there is no tokenizer.json, and making one needs the sentencepiece package: "
            "pip install 'mlxkv[sentencepiece]'"
        ) from error
    from google.protobuf.message import DecodeError

    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore
    try:
        proto.ParseFromString(regular.read_bytes(path))
    except (DecodeError, OSError, RuntimeError) as error:
        raise TokenizerError(f"{path}: not a SentencePiece model: damaged") from error
    if not proto.pieces:
        raise TokenizerError(f"{path}: not a SentencePiece model: it has no pieces")
    for i, piece in enumerate(proto.pieces):
        if not isinstance(piece.piece, str):  # bytes, if they are no UTF-8
            raise TokenizerError(f"{path}: piece {i} is no text: damaged")
    return proto


def listed_tokens(folder: Path, config: Mapping[str, Any], n: int) -> dict[int, tuple[str, bool]]:
    """Tokens that transformers adds behind the vocabulary, from either of its two files."""
    found: dict[int, tuple[str, bool]] = {}
    extra = folder / "added_tokens.json"
    if extra.exists():
        found = {i: (text, True) for text, i in read_json(extra).items() if isinstance(i, int)}
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, Mapping):
        for key, entry in decoder.items():
            if key.isdecimal() and isinstance(entry, Mapping) and "content" in entry:
                found[int(key)] = (str(entry["content"]), bool(entry.get("special", False)))
    return {i: token for i, token in found.items() if i >= n}


def add_listed(
    tokenizer: Tokenizer, added: Mapping[int, tuple[str, bool]], n: int, path: Path
) -> None:
    """Add what `listed_tokens` found behind a vocabulary of `n`.

    Raises:
        TokenizerError: one has an id that it does not get there; `path` is named.
    """
    from tokenizers import AddedToken

    for i, (text, special) in sorted(added.items()):
        tokenizer.add_tokens([AddedToken(text, special=special, normalized=False)])
        if tokenizer.token_to_id(text) != i:
            raise TokenizerError(
                f"{path}: added token {text!r} has id {i}, which the vocabulary of {n:,} leaves no "
                "place for"
            )
