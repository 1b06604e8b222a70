"""Byte vocabularies with ranks, tiktoken's and Mistral's, as tokenizer.json.

A tiktoken file (Llama 3's `tokenizer.model`, Kimi's `tiktoken.model`) has a line for each token,
its bytes in base64 and its rank, and nothing else: how text is split into words, and the special
tokens, are the model's. Mistral's `tekken.json` has it all. Both join the neighbours whose bytes
have the lowest rank, and take a word whole that is a token.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxkv.base import regular
from mlxkv.checkpoint.config import read_json
from mlxkv.errors import TokenizerError, one_line

from ..gguf.pretokenizers import PRE_TOKENIZERS
from ..pieces import set_template
from ..sources import write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n?")
_HAN = r"[\p{Han}]+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_KIMI = "|".join(
    (
        _HAN,
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
_LLAMA3 = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip
_HARMONY = {
    0: "<|startoftext|>", 1: "<|endoftext|>", 4: "<|return|>", 5: "<|constrain|>",
    7: "<|channel|>", 8: "<|start|>", 9: "<|end|>", 10: "<|message|>", 14: "<|call|>",
}  # fmt: skip
_TEKKEN = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]",
    "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RankedTokens:
    """A vocabulary of bytes.

    Attributes:
        tokens: by rank.
        special: id -> text.
        first: id of rank 0; special tokens lie before it or behind the last.
        pattern: a match of it is a word.
        bos, eos: texts of the tokens around a document.
        config: tokenizer_config.json, empty if there is none.
    """

    path: Path
    tokens: Sequence[bytes]
    special: Mapping[int, str]
    first: int
    pattern: str
    bos: str | None
    eos: str | None
    config: Mapping[str, Any]

    @property
    def files(self) -> tuple[str, ...]:
        """The files that `write` writes."""
        return ("tokenizer.json",) if self.config else ("tokenizer.json", "tokenizer_config.json")

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer.

        Raises:
            TokenizerError: the vocabulary cannot be used.
        """
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

        names = [visible(token) for token in self.tokens]
        vocabulary = {text: i for i, text in self.special.items()}
        vocabulary |= {name: self.first + rank for rank, name in enumerate(names)}
        if len(vocabulary) != len(self.special) + len(names):
            raise TokenizerError(f"{self.path}: holds a token twice")
        try:
            model = models.BPE(vocab=vocabulary, merges=_merges(names), ignore_merges=True)
            tokenizer = Tokenizer(model)
            tokenizer.add_special_tokens(
                [AddedToken(t, special=True, normalized=False) for _, t in self._in_order()]
            )
            split = pre_tokenizers.Split(Regex(self.pattern), "isolated")
        except Exception as error:  # the `tokenizers` package raises nothing narrower
            raise TokenizerError(
                f"{self.path}: the vocabulary cannot be used: {one_line(error)}"
            ) from error
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore
        tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
        adds = self.config.get("add_bos_token", True)
        i = tokenizer.token_to_id(self.bos) if self.bos and adds else None
        set_template(tokenizer, {} if self.bos is None or i is None else {self.bos: i}, {})
        return tokenizer

    def _in_order(self) -> list[tuple[int, str]]:
        return sorted(self.special.items())

    def write(self, folder: Path) -> None:
        self.tokenizer().save(str(folder / "tokenizer.json"), pretty=False)
        if not self.config:
            named = {"bos_token": self.bos, "eos_token": self.eos}
            config = {"tokenizer_class": "PreTrainedTokenizerFast"}
            config |= {key: text for key, text in named.items() if text is not None}
            write_json(folder / "tokenizer_config.json", config)


def is_tiktoken(path: Path) -> bool:
    """Whether a `tokenizer.model` is tiktoken's; raises OSError where it cannot be read."""
    with regular.open_file(path) as file:
        return _LINE.fullmatch(file.readline(1024)) is not None


def open_tiktoken(folder: Path, name: str = "tokenizer.model") -> RankedTokens:
    """Read a tiktoken file, of a model whose `model_type` says the rest.

    Raises:
        TokenizerError: it is damaged, or of a model that is not known.
    """
    path, config = folder / name, _config(folder)
    by_rank: dict[int, bytes] = {}
    for number, line in enumerate(regular.read_bytes(path).splitlines(), start=1):
        if not line:
            continue
        if _LINE.fullmatch(line) is None:
            raise TokenizerError(f"{path}: line {number} is no token and rank: damaged")
        text, rank = line.split()
        by_rank[int(rank)] = _bytes(text, f"{path}: line {number}")
    if sorted(by_rank) != list(range(len(by_rank))):
        raise TokenizerError(f"{path}: its ranks are not 0 to {len(by_rank) - 1}: damaged")
    tokens, n = [by_rank[i] for i in range(len(by_rank))], len(by_rank)
    kind = read_json(folder / "config.json").get("model_type")
    pattern, special, bos, eos = _tiktoken_model(str(kind), n, f"{path}: model_type {kind!r}")
    listed = _listed(config, n)
    return RankedTokens(path, tokens, listed or special, 0, pattern, bos, eos, config)


def _tiktoken_model(
    kind: str, n: int, where: str
) -> tuple[str, dict[int, str], str | None, str | None]:
    """Words, special tokens, and the first and last token of the models that have such a file."""
    if kind == "llama":
        names = [*_LLAMA3, *(f"<|reserved_special_token_{i}|>" for i in range(2, 247))]
        pattern = PRE_TOKENIZERS["llama-bpe"].patterns[0]
        return pattern, dict(enumerate(names, n)), names[0], names[1]
    if kind == "gpt_oss":
        special = {n + i: _HARMONY.get(i, f"<|reserved_{n + i}|>") for i in range(1090)}
        return PRE_TOKENIZERS["gpt-4o"].patterns[0], special, _HARMONY[0], _HARMONY[4]
    if kind.startswith("kimi") or kind == "deepseek_v3":
        return _KIMI, {}, "[BOS]", "[EOS]"
    raise TokenizerError(f"{where} does not say how its tiktoken vocabulary splits text")


def _listed(config: Mapping[str, Any], n: int) -> dict[int, str]:
    """Special tokens of tokenizer_config.json, behind the vocabulary."""
    listed = config.get("added_tokens_decoder")
    found = {
        int(key): entry["content"]
        for key, entry in (listed.items() if isinstance(listed, Mapping) else ())
        if key.isdecimal() and isinstance(entry, Mapping) and isinstance(entry.get("content"), str)
    }
    return {i: text for i, text in found.items() if i >= n}


def open_tekken(folder: Path) -> RankedTokens:
    """Read tekken.json.

    Raises:
        TokenizerError: it is damaged.
    """
    path = folder / "tekken.json"
    raw = read_json(path)
    settings, entries = raw.get("config"), raw.get("vocab")
    if not isinstance(settings, Mapping) or not isinstance(entries, list):
        raise TokenizerError(f"{path}: has no 'config' and 'vocab'")
    pattern, size = settings.get("pattern"), settings.get("default_vocab_size")
    n_special = settings.get("default_num_special_tokens")
    if not isinstance(pattern, str) or type(size) is not int or type(n_special) is not int:
        raise TokenizerError(f"{path}: config must have a pattern, a vocabulary's size and counts")
    n = min(len(entries), size - n_special)
    if not 0 < n_special < size or n <= 0:
        raise TokenizerError(f"{path}: has {n_special} special tokens of {size}")
    tokens = []
    for rank, entry in enumerate(entries[:n]):
        if not isinstance(entry, Mapping) or entry.get("rank") != rank:
            raise TokenizerError(f"{path}: entry {rank} of vocab has another rank")
        tokens.append(_bytes(str(entry.get("token_bytes")).encode(), f"{path}: token {rank}"))
    special = {i: f"<SPECIAL_{i}>" for i in range(n_special)}
    listed = raw.get("special_tokens")
    special |= {i: text for i, text in enumerate(_TEKKEN) if listed is None and i < n_special}
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, Mapping) and entry.get("rank") in special:
            special[entry["rank"]] = str(entry.get("token_str"))
    return RankedTokens(path, tokens, special, n_special, pattern, "<s>", "</s>", _config(folder))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def _bytes(text: bytes, where: str) -> bytes:
    try:
        found = base64.b64decode(text, validate=True)
    except binascii.Error:
        found = b""
    if not found:
        raise TokenizerError(f"{where} is not in base64: damaged")
    return found


def _letters() -> list[str]:
    """GPT-2's visible letter of each byte."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


_LETTER_OF = _letters()


def visible(token: bytes) -> str:
    """Bytes as a byte-level vocabulary writes them."""
    return "".join(_LETTER_OF[byte] for byte in token)


def _merges(names: Sequence[str]) -> list[tuple[str, str]]:
    """Every way to cut a token into two, in the order of ranks."""
    known = set(names)
    return [
        (name[:cut], name[cut:])
        for name in names
        for cut in range(1, len(name))
        if name[:cut] in known and name[cut:] in known
    ]
