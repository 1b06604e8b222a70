"""tiktoken's and Mistral's vocabularies as tokenizer.json: the ids of a merge by ranks."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

from mlxkv.convert import convert
from mlxkv.convert.hub.ranks import open_tekken, open_tiktoken
from mlxkv.errors import TokenizerError
from mlxkv.text.tokenizer import Tokenizer as Text
from tests.support import tiny

CORPUS = (
    "The quick brown fox, it's 1234 foxes! Ünïcödé 日本 the theatre then\n\n  there THE HTMLx " * 3
)
TEXTS = (
    "the other foxes' theatre: 98765 + 1",
    "It's THERE,  then\n\n\tthé 日本語 🙂",
    "<|eot_id|>x HTMLParser  ",
)
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def words(pattern: str, text: str) -> list[bytes]:
    split = pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)
    return [text[start:stop].encode() for _, (start, stop) in split]


def merged(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """A word's tokens: the neighbours with the lowest rank together are joined, the first first."""
    if word in ranks:
        return [word]
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = [ranks.get(a + b, 1 << 30) for a, b in itertools.pairwise(parts)]
        if not pairs or min(pairs) == 1 << 30:
            return parts
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def learned(pattern: str, n: int) -> dict[bytes, int]:
    """A vocabulary of all bytes and the n most frequent merges of the corpus."""
    ranks, corpus = {bytes([byte]): byte for byte in range(256)}, words(pattern, CORPUS)
    for _ in range(n):
        counts: dict[bytes, int] = {}
        for word in corpus:
            parts = merged(word, ranks)
            for a, b in itertools.pairwise(parts):
                counts[a + b] = counts.get(a + b, 0) + 1
        best = max(counts, key=lambda token: (counts[token], token))
        ranks[best] = len(ranks)
    return ranks


def expected(text: str, pattern: str, ranks: dict[bytes, int], first: int) -> list[int]:
    return [first + ranks[t] for word in words(pattern, text) for t in merged(word, ranks)]


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_a_tiktoken_file_gives_the_ids_of_its_ranks(tmp_path: Path):
    ranks = learned(LLAMA3, 40)
    config = tiny.llama_config(vocab_size=len(ranks) + 256)
    source = tiny.write_checkpoint(tmp_path / "in", config)
    lines = [b"%s %d" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    (source / "tokenizer.model").write_bytes(b"\n".join(lines))
    plan = convert(source, tmp_path / "out").plan
    assert plan.notes == ("tokenizer.json is made from tokenizer.model",)
    made = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in TEXTS[:2]:
        ids = made.encode(text, add_special_tokens=False).ids
        assert ids == expected(text, LLAMA3, ranks, 0)
        assert made.decode(ids) == text
    n = len(ranks)
    assert made.encode(TEXTS[2]).ids[:2] == [n, n + 9]  # the first token, <|eot_id|>
    text = Text.from_dir(tmp_path / "out")
    assert (text.bos_token, text.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")
    (source / "tokenizer.model").write_bytes(b"\n".join(lines[:-9] + lines[-8:]))
    with pytest.raises(TokenizerError, match="its ranks are not 0 to"):
        open_tiktoken(source)
    (source / "tokenizer.model").write_bytes(b"\n".join(lines))
    (source / "tokenizer.model").rename(source / "tiktoken.model")  # Kimi's name for it
    convert(source, tmp_path / "renamed")
    assert (
        Tokenizer.from_file(str(tmp_path / "renamed" / "tokenizer.json")).to_str() == made.to_str()
    )
    (source / "tiktoken.model").rename(source / "tokenizer.model")
    (source / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(TokenizerError, match="'mamba' does not say how"):
        open_tiktoken(source)


def tekken(ranks: dict[bytes, int], **changes: Any) -> dict[str, Any]:
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks.items()
    ]
    settings = {
        "pattern": PATTERN,
        "num_vocab_tokens": len(vocab),
        "default_vocab_size": 20 + 285,
        "default_num_special_tokens": 20,
        "version": "v3",
    }
    return {"config": settings, "vocab": vocab, **changes}


def test_tekken_json_gives_the_ids_of_its_ranks(tmp_path: Path):
    """Special tokens come first; the vocabulary is cut at the model's size."""
    ranks = learned(PATTERN, 40)
    used = {token: rank for token, rank in ranks.items() if rank < 285}
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(ranks)))
    made = open_tekken(tmp_path).tokenizer()
    for text in TEXTS:
        ids = made.encode(text, add_special_tokens=False).ids
        assert ids == expected(text, PATTERN, used, 20)
    assert made.encode("[INST]a").ids[:2] == [1, 3]
    special = [{"rank": i, "token_str": f"[S{i}]", "is_control": True} for i in range(20)]
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(ranks, special_tokens=special)))
    assert open_tekken(tmp_path).tokenizer().token_to_id("[S7]") == 7
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(ranks, vocab=[{"rank": 1}])))
    with pytest.raises(TokenizerError, match="entry 0 of vocab has another rank"):
        open_tekken(tmp_path)
