"""The tokenizer in a GGUF file's metadata as tokenizer.json and the files beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxkv.errors import TokenizerError, one_line

from ..pieces import (
    CONTROL,
    SPACE,
    USER_DEFINED,
    Pieces,
    added_tokens,
    build,
    set_template,
    vocabulary_of,
)
from ..sources import write_json
from .file import GGUFFile
from .metadata import short_number
from .pretokenizers import PRE_TOKENIZERS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Tokens that may end a turn beside eos_token_id, as in llama.cpp.
_END_TOKENS = frozenset(
    {
        "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>",
        "<|endoftext|>", "<|end_of_text|>", "<|return|>", "<|call|>", "<EOT>",
    }
)  # fmt: skip
_MARK = re.compile(r"<\|.+>|<.+\|>")
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True, slots=True)
class _Keys:
    """A typed reader of `tokenizer.ggml.*`."""

    file: GGUFFile

    def error(self, key: str, message: str) -> TokenizerError:
        return TokenizerError(f"{self.file.path}: tokenizer.ggml.{key} {message}")

    def any(self, key: str) -> Any:
        return self.file.metadata.get(f"tokenizer.ggml.{key}")

    def text(self, key: str, default: str | None = None) -> str:
        value = self.any(key)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.error(key, f"must be a text; got {value!r}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.any(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, f"must be true or false; got {value!r}")
        return default if value is None else value

    def strings(self, key: str) -> list[str]:
        value = self.any(key)
        if not isinstance(value, list):
            raise self.error(key, "is missing or not a list of texts")
        return value

    def numbers(self, key: str, length: int) -> list[Any] | None:
        value = self.any(key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or len(value) != length:
            raise self.error(key, f"must be a list of {length:,} numbers, one for each token")
        return value.tolist()

    def token_id(self, name: str, n_tokens: int) -> int | None:
        value = self.any(f"{name}_token_id")
        # Some converters write 2**32 - 1 for "none".
        return value if isinstance(value, int) and 0 <= value < n_tokens else None


def write_tokenizer(file: GGUFFile, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json.

    Raises:
        TokenizerError: there is no tokenizer, or its kind is not supported.
    """
    gguf_tokenizer(file).save(str(folder / "tokenizer.json"), pretty=False)
    keys = _Keys(file)
    tokens = keys.strings("tokens")
    write_json(folder / "tokenizer_config.json", _tokenizer_config(keys, tokens))
    write_json(folder / "generation_config.json", _generation_config(keys, tokens))


def gguf_tokenizer(file: GGUFFile) -> Tokenizer:
    """The tokenizer of a GGUF file; raises as `write_tokenizer` does."""
    keys = _Keys(file)
    kind = keys.text("model", "")
    tokens = keys.strings("tokens")
    if not tokens:
        raise keys.error("tokens", "is empty")
    types = keys.numbers("token_type", len(tokens)) or [1] * len(tokens)
    if kind == "gpt2" and _has_visible_spaces(tokens):
        tokenizer, add_bos = _ranked(keys, tokens, types), True
    elif kind == "gpt2":
        tokenizer, add_bos = _byte_level(keys, tokens, types)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece(keys, tokens, types), True
    elif kind == "gemma4":
        tokenizer, add_bos = _ranked(keys, tokens, _with_special_marks(tokens, types)), True
    else:
        raise keys.error("model", f"must be gpt2, llama or gemma4; got {kind!r}")
    bos = keys.token_id("bos", len(tokens)) if keys.flag("add_bos_token", add_bos) else None
    eos = keys.token_id("eos", len(tokens)) if keys.flag("add_eos_token", False) else None
    before, after = ({} if i is None else {tokens[i]: i} for i in (bos, eos))
    set_template(tokenizer, before, after)
    return tokenizer


def _has_visible_spaces(tokens: Sequence[str]) -> bool:
    """Whether a vocabulary has SentencePiece's form: that of a Gemma whose files lacked its model,
    which llama.cpp's converter takes for byte-level."""
    return {"<0x00>", "<0xFF>", SPACE}.issubset(tokens)


def _sentencepiece(keys: _Keys, tokens: list[str], types: list[int]) -> Tokenizer:
    scores = keys.numbers("scores", len(tokens))
    if scores is None:
        raise keys.error("scores", "is missing: a SentencePiece vocabulary needs it")
    if len(tokens) > 1 and len(set(scores)) == 1:
        # Converters write one number for all where a checkpoint lacks its SentencePiece model.
        if keys.any("merges") is None:
            raise keys.error(
                "scores",
                f"are all {scores[0]}, which says nothing of how to join pieces: convert the "
                "model again with its tokenizer.model",
            )
        return _ranked(keys, tokens, types, prefix=True)
    # As in llama.cpp the space also follows every added token; user-defined pieces hold plain
    # spaces in a GGUF file.
    pieces = Pieces(tokens, scores, types, add_prefix=keys.flag("add_space_prefix", True))
    return build(pieces, str(keys.file.path))


def _ranked(keys: _Keys, tokens: list[str], types: list[int], *, prefix: bool = False) -> Tokenizer:
    """SentencePiece's form, with merges in the scores' place."""
    add_prefix = keys.flag("add_space_prefix", prefix)
    pieces = Pieces(tokens, (), types, add_prefix=add_prefix, ranked=_merges(keys))
    return build(pieces, str(keys.file.path))


def _with_special_marks(tokens: list[str], types: list[int]) -> list[int]:
    """The types of Gemma 4's tokens: marks of tool calls and thoughts are special in the model's
    own tokenizer. llama.cpp's converter makes them plain, to see them in its output."""
    return [
        CONTROL if kind == USER_DEFINED and _MARK.fullmatch(token) else kind
        for token, kind in zip(tokens, types, strict=True)
    ]


def _byte_level(keys: _Keys, tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    from tokenizers import Tokenizer, decoders, models

    pre = keys.text("pre", "default")
    split = PRE_TOKENIZERS.get(pre)
    if split is None:
        raise keys.error("pre", f"must be one of {', '.join(sorted(PRE_TOKENIZERS))}; got {pre!r}")
    try:
        model = models.BPE(
            vocab=vocabulary_of(tokens), merges=_merges(keys), ignore_merges=split.ignore_merges
        )
        tokenizer = Tokenizer(model)
        tokenizer.add_tokens(added_tokens(tokens, types))
    except TokenizerError:
        raise
    except Exception as error:  # the `tokenizers` package raises nothing narrower
        raise keys.error("merges", f"do not fit the tokens: {one_line(error)}") from error
    tokenizer.pre_tokenizer = split.build(  # pyright: ignore
        keys.flag("add_space_prefix", False)
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    return tokenizer, split.add_bos


def _merges(keys: _Keys) -> list[tuple[str, str]]:
    pairs = []
    for i, merge in enumerate(keys.strings("merges")):
        # A part may begin with a space where a vocabulary is not fully byte-level.
        left, space, right = merge[1:].partition(" ")
        if not space or not right:
            raise keys.error("merges", f"entry {i:,} is not a pair: {merge!r}")
        pairs.append((merge[:1] + left, right))
    return pairs


def _tokenizer_config(keys: _Keys, tokens: Sequence[str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for ours, name in names.items():
        if (i := keys.token_id(name, len(tokens))) is not None:
            config[f"{ours}_token"] = tokens[i]
    for key in ("add_bos_token", "add_eos_token"):
        if isinstance(keys.any(key), bool):
            config[key] = keys.any(key)
    context = keys.file.metadata.get(f"{keys.file.architecture}.context_length")
    if isinstance(context, int):
        config["model_max_length"] = context
    return config | _chat_templates(keys.file.metadata)


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The template, or that and further ones under their names, as transformers reads them."""
    names = {"default": "tokenizer.chat_template"}
    begin = "tokenizer.chat_template."
    names |= {key.removeprefix(begin): key for key in metadata if key.startswith(begin)}
    texts = {name: metadata.get(key) for name, key in names.items()}
    found = {name: text for name, text in texts.items() if isinstance(text, str) and text}
    if "default" not in found:
        return {}
    if len(found) == 1:
        return {"chat_template": found["default"]}
    return {"chat_template": [{"name": n, "template": text} for n, text in found.items()]}


def _generation_config(keys: _Keys, tokens: Sequence[str]) -> Mapping[str, Any]:
    types = keys.numbers("token_type", len(tokens)) or [1] * len(tokens)
    ends = {keys.token_id(name, len(tokens)) for name in ("eos", "eot", "eom")}
    ends |= {
        i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == CONTROL and token in _END_TOKENS
    }
    config = {
        "bos_token_id": keys.token_id("bos", len(tokens)),
        "pad_token_id": keys.token_id("padding", len(tokens)),
        "eos_token_id": sorted(i for i in ends if i is not None) or None,
    }
    config |= _sampling(keys.file.metadata)
    return {key: value for key, value in config.items() if value is not None}


def _sampling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's makers recommend: `general.sampling.*`, as far as transformers has it."""
    given = {ours: metadata.get(f"general.sampling.{key}") for key, ours in _SAMPLING.items()}
    numbers = {
        key: short_number(value) if isinstance(value, float) else value
        for key, value in given.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    return numbers | ({"do_sample": numbers.get("temperature") != 0} if numbers else {})
