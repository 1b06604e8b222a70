"""vocab.json and merges.txt, a byte-level BPE as slow tokenizers keep it, as tokenizer.json.

How text is split into words is not in the files: the class in tokenizer_config.json says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxkv.base import regular
from mlxkv.checkpoint.config import read_json
from mlxkv.errors import TokenizerError, one_line

from ..gguf.pretokenizers import PRE_TOKENIZERS
from .sentencepiece import add_listed, listed_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CLASSES = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}
"""Class, without "Fast" -> the name of its expressions in `PRE_TOKENIZERS`."""
FILES = ("vocab.json", "merges.txt")


@dataclass(frozen=True, slots=True)
class MergedTokens:
    """A vocabulary of byte-level tokens.

    Attributes:
        path: merges.txt.
        vocabulary: token -> id.
        merges: best first.
        kind: of `_CLASSES`.
        config: tokenizer_config.json.
        added: tokens behind the vocabulary, id -> (text, special).
    """

    path: Path
    vocabulary: Mapping[str, int]
    merges: list[tuple[str, str]]
    kind: str
    config: Mapping[str, Any]
    added: Mapping[int, tuple[str, bool]]
    files = ("tokenizer.json",)

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer.

        Raises:
            TokenizerError: the files do not fit together.
        """
        from tokenizers import Tokenizer, decoders, models, normalizers

        try:
            model = models.BPE(vocab=dict(self.vocabulary), merges=self.merges)
        except Exception as error:  # the `tokenizers` package raises nothing narrower
            raise TokenizerError(
                f"{self.path}: does not fit vocab.json: {one_line(error)}"
            ) from error
        made = Tokenizer(model)
        if self.kind == "qwen2":
            made.normalizer = normalizers.NFC()  # pyright: ignore
        before = self.config.get("add_prefix_space") is True
        made.pre_tokenizer = PRE_TOKENIZERS[self.kind].build(before)  # pyright: ignore
        made.decoder = decoders.ByteLevel()  # pyright: ignore
        add_listed(made, self.added, len(self.vocabulary), self.path)
        return made

    def write(self, folder: Path) -> None:
        self.tokenizer().save(str(folder / "tokenizer.json"), pretty=False)


def open_merges(folder: Path) -> MergedTokens:
    """Read vocab.json and merges.txt.

    Raises:
        TokenizerError: they are damaged, or of a class whose words are not known.
    """
    path, listed = folder / "merges.txt", folder / "tokenizer_config.json"
    config = read_json(listed) if listed.exists() else {}
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    if name not in _CLASSES:
        raise TokenizerError(
            f"{folder}: there is no tokenizer.json, and tokenizer_class {name!r} does not say how "
            f"vocab.json splits text; known are {', '.join(_CLASSES)}"
        )
    vocabulary = read_json(folder / "vocab.json")
    if sorted(vocabulary.values(), key=str) != sorted(range(len(vocabulary)), key=str):
        raise TokenizerError(f"{folder / 'vocab.json'}: its ids are not 0 to {len(vocabulary) - 1}")
    try:
        lines = regular.read_text(path).split("\n")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: cannot be read as UTF-8 text") from error
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#version"):
            continue
        pair = line.strip().split(" ")
        if len(pair) != 2:
            raise TokenizerError(f"{path}: line {number} is no pair of tokens: damaged")
        merges.append((pair[0], pair[1]))
    added = listed_tokens(folder, config, len(vocabulary))
    return MergedTokens(path, vocabulary, merges, _CLASSES[name], config, added)
