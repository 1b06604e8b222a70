"""Tokenizers made from GGUF metadata and from SentencePiece models."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mlxkv.convert import convert
from mlxkv.convert.gguf.file import open_gguf
from mlxkv.convert.gguf.pretokenizers import PRE_TOKENIZERS
from mlxkv.convert.gguf.tokenizer import gguf_tokenizer, write_tokenizer
from mlxkv.convert.hub.merges import open_merges
from mlxkv.convert.hub.sentencepiece import open_sentencepiece
from mlxkv.errors import TokenizerError
from mlxkv.sampling.params import recommended
from tests.support import tiny
from tests.support.gguf_files import write_gguf
from tests.support.sentencepiece_reference import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Reference,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then the dog jumps over the fox.",
    "Sliding windows keep 512 tokens; the cache grows in steps of 256 tokens, never more.",
    "def f(x):\n    return [y ** 2 for y in range(x) if y % 3 == 0]  # 12345\n\n",
    "Über den Wolken: naïve café, déjà vu, ÅNGSTRÖM.",
    "日本語のテキストと한국어 텍스트、そして emoji 🙂🎉👩‍👩‍👧.",
    "    indented    by    many    spaces\t\tand tabs\r\n",
]
ALPHABET = [
    *"ab e.t0159=-_'\n\t",
    "  ", "    ", " the", "ing", "1234567", "é", "e\u0301", "日本", "語", "한", "🙂", "👩‍👩‍👧",
    "\u00a0", "\u2581", "'LL", "I'm", "ABCdef", "<b>", "\r\n", "\x00", "\ufffd", "ﬁ", "²",
]  # fmt: skip


def texts(n: int = 400, avoid: str = "") -> list[str]:
    rng = random.Random(0)
    found = [*CORPUS, "", " ", "  x", "x  ", "\n\n\n"]
    found += [c * k for c in "a 0=\n" for k in (1, 2, 3, 5, 8, 13, 40)]
    found += ["".join(rng.choices(ALPHABET, k=rng.randint(1, 30))) for _ in range(n)]
    return [text for text in found if not any(c in text for c in avoid)]


def gguf(tmp_path: Path, keys: dict[str, Any]) -> Path:
    tensors = {"x": np.zeros(4, np.float32)}
    named = {f"tokenizer.ggml.{k}" if "." not in k else k: v for k, v in keys.items()}
    return write_gguf(tmp_path / "t.gguf", tensors, "llama", named)


def byte_level(pre: pre_tokenizers.PreTokenizer) -> tuple[Tokenizer, dict[str, Any]]:
    """A trained byte-level BPE as `tokenizers` has it, and as a GGUF file holds it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|end|>", "<|start|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_tokens(["<b>"])
    model = json.loads(tokenizer.to_str())["model"]
    n = len(model["vocab"])
    tokens = [*sorted(model["vocab"], key=model["vocab"].__getitem__), "<b>"]
    keys = {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": [CONTROL, CONTROL, *[NORMAL] * (n - 2), USER_DEFINED],
        "merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 0,
    }
    return tokenizer, keys


SMOLLM = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
)
# As Llama 3's and Qwen 2's tokenizer.json have it.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def with_regex(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.mark.parametrize(("pre", "original"), [
    ("smollm", SMOLLM),
    ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False)),
    ("qwen2", with_regex(LLAMA3.replace("{1,3}", ""))),
    ("glm4", with_regex(LLAMA3)),
])  # fmt: skip
def test_a_byte_level_vocabulary_gives_the_ids_of_the_tokenizer_it_was_made_of(
    tmp_path: Path, pre: str, original: pre_tokenizers.PreTokenizer
):
    tokenizer, keys = byte_level(original)
    made = gguf_tokenizer(open_gguf(gguf(tmp_path, {**keys, "pre": pre})))
    for text in [*texts(), "<|start|>a <b> b<|end|>"]:
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert made.encode(text, add_special_tokens=False).ids == expected, text
        assert made.decode(expected, skip_special_tokens=False) == text


@pytest.mark.parametrize(("pre", "text", "words"), [
    ("smollm", "Hi there 123!", ["Hi", " there", " ", "1", "2", "3", "!"]),
    ("gpt-2", "it's 123  x", ["it", "'s", " 123", " ", " x"]),
    ("llama-bpe", "It'S 12345\n\n x", ["It", "'S", " ", "123", "45", "\n\n", " x"]),
    ("qwen2", "It's 123", ["It", "'s", " ", "1", "2", "3"]),
    ("qwen2", "e\u0301t 1", ["e", "\u0301t", " ", "1"]),
    ("qwen35", "e\u0301t 12.\u0301", ["e\u0301t", " ", "1", "2", ".\u0301"]),
    ("gpt-4o", "camelCase 1234/", ["camel", "Case", " ", "123", "4", "/"]),
    ("tekken", "camelCase 12", ["camel", "Case", " ", "1", "2"]),
    ("default", "a, 1234", ["a", ",", " ", "123", "4"]),
])  # fmt: skip
def test_words_are_split_as_the_name_says(pre: str, text: str, words: list[str]):
    split = PRE_TOKENIZERS[pre].build(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    expected = ["".join(w for w, _ in alphabet.pre_tokenize_str(word)) for word in words]
    assert [word for word, _ in split.pre_tokenize_str(text)] == expected


def test_llama_3_takes_a_word_of_the_vocabulary_as_it_is(tmp_path: Path):
    """`ignore_merges`: no merge leads to the token, and it is used."""
    keys = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": ["a", "b", "ab", "aba"],
        "token_type": [NORMAL] * 4,
        "merges": ["a b"],
    }
    made = gguf_tokenizer(open_gguf(gguf(tmp_path, keys)))
    assert made.encode("aba").tokens == ["aba"]


def test_an_unknown_pre_tokenizer_is_named_with_those_that_are_known(tmp_path: Path):
    _, keys = byte_level(SMOLLM)
    path = gguf(tmp_path, {**keys, "pre": "klingon"})
    with pytest.raises(
        TokenizerError, match=r"t\.gguf: tokenizer\.ggml\.pre must be one of .*'klingon'"
    ):
        gguf_tokenizer(open_gguf(path))


@pytest.mark.parametrize(("keys", "message"), [
    ({"model": "rwkv"}, "model must be gpt2, llama or gemma4; got 'rwkv'"),
    ({"tokens": None}, "tokens is missing"),
    ({"token_type": [1, 1]}, "token_type must be a list of 4 numbers"),
    ({"merges": ["ab"]}, r"merges entry 0 is not a pair: 'ab'"),
    ({"merges": ["a c"]}, "merges do not fit the tokens"),
    ({"model": "llama"}, "scores is missing"),
])  # fmt: skip
def test_a_broken_vocabulary_is_one_line(tmp_path: Path, keys: dict[str, Any], message: str):
    whole = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab", "c"], "merges": ["a b"]}
    with pytest.raises(TokenizerError, match=message) as raised:
        gguf_tokenizer(open_gguf(gguf(tmp_path, {**whole, **keys})))
    assert "t.gguf" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_start_and_end_tokens_are_added_as_the_file_says(tmp_path: Path):
    _, keys = byte_level(SMOLLM)

    def ids(**flags: bool) -> list[int]:
        path = gguf(tmp_path, {**keys, "pre": "smollm", **flags})
        return gguf_tokenizer(open_gguf(path)).encode("a").ids

    (plain,) = ids()
    assert ids(add_bos_token=True) == [1, plain]
    assert ids(add_bos_token=True, add_eos_token=True) == [1, plain, 0]
    path = gguf(tmp_path, {**keys, "pre": "llama-bpe"})
    assert gguf_tokenizer(open_gguf(path)).encode("a").ids == [1, plain]


def test_the_files_beside_the_tokenizer_hold_end_tokens_and_template(tmp_path: Path):
    tokens = ["<s>", "</s>", "<|im_end|>", "<|eot_id|>", "a"]
    keys = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [CONTROL, CONTROL, CONTROL, NORMAL, NORMAL],
        "merges": ["a a"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "padding_token_id": 2**32 - 1,
        "tokenizer.chat_template": "{{ messages }}",
    }
    keys["tokens"] = [*tokens, "aa"]
    keys["token_type"].append(NORMAL)
    write_tokenizer(open_gguf(gguf(tmp_path, keys)), tmp_path)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    # <|eot_id|> is an ordinary token here and ends nothing.
    assert generation == {"bos_token_id": 0, "eos_token_id": [1, 2]}
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages }}"
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")
    assert "pad_token" not in config


def small_vocabulary(**more: Any) -> dict[str, Any]:
    plain = {"model": "gpt2", "pre": "gpt-2", "tokens": ["<s>", "a", "aa"], "merges": ["a a"]}
    return {**plain, "token_type": [CONTROL, NORMAL, NORMAL], "eos_token_id": 0, **more}


def test_recommended_sampling_is_kept(tmp_path: Path):
    keys = {"temp": 0.7, "top_k": 20, "penalty_repeat": 1.05, "mirostat": 0}
    named = {f"general.sampling.{key}": value for key, value in keys.items()}
    write_tokenizer(open_gguf(gguf(tmp_path, small_vocabulary(**named))), tmp_path)
    found = recommended(tmp_path)
    assert (found.temperature, found.top_k, found.repeat_penalty) == (0.7, 20, 1.05)
    greedy = {"general.sampling.temp": 0.0}
    write_tokenizer(open_gguf(gguf(tmp_path, small_vocabulary(**greedy))), tmp_path)
    assert recommended(tmp_path).temperature == 0
    assert not json.loads((tmp_path / "generation_config.json").read_text())["do_sample"]


def test_named_templates_stand_beside_the_default(tmp_path: Path):
    templates = {
        "tokenizer.chat_template": "plain",
        "tokenizer.chat_template.tool_use": "{{ tools }}",
        "tokenizer.chat_template.rag": "{{ documents }}",
    }
    write_tokenizer(open_gguf(gguf(tmp_path, small_vocabulary(**templates))), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["chat_template"] == [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools }}"},
        {"name": "rag", "template": "{{ documents }}"},
    ]


def test_a_scored_vocabulary_joins_as_sentencepiece_does(tmp_path: Path):
    """A hand-made vocabulary with runs of spaces and newlines as user-defined pieces, as Gemma's,
    against a reference that is independent of the conversion."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(" " * n for n in range(2, 9))]
    tokens += ["\n" * n for n in range(1, 5)] + ["<b>"]
    types = [CONTROL] * 3 + [UNKNOWN] + [USER_DEFINED] * (len(tokens) - 4)
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [BYTE] * 256
    scores = [-1000.0] * len(tokens)
    pieces = ["▁t", "he", "▁the", "in", "ing", "▁a", "an", "aa", "aaa", "aaaa", "▁=", "==", "===="]
    pieces += [
        "日本",
        "本語",
        "e\u0301",
        "\u0301",
        "00",
        "a▁",
        "▁in",
        "st",
        "▁st",
        "str",
        "▁str",
        "ring",
        "tri",
    ]
    pieces += sorted({c for text in CORPUS for c in text.replace(" ", "▁")} - {"\n", "🙂"})
    for i, piece in enumerate(dict.fromkeys(pieces)):
        tokens.append(piece)
        types.append(NORMAL)
        scores.append(-float(i))
    keys = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types}
    keys |= {"add_space_prefix": False, "add_bos_token": True, "bos_token_id": 2}
    made = gguf_tokenizer(open_gguf(gguf(tmp_path, keys)))
    reference = Reference(tokens, scores, types)
    for text in texts(800):
        ids = made.encode(text, add_special_tokens=False).ids
        assert [tokens[i] for i in ids] == [tokens[i] for i in reference.encode(text)]
        if "▁" not in text:
            assert made.decode(ids, skip_special_tokens=False) == text
    assert made.encode("<bos>a").ids[:2] == [2, 2]


SPM_OPTIONS: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe", "byte_fallback": True, "split_digits": True},
    "bpe without prefix": {
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<b>", "▁▁", "▁▁▁▁", "\n"],
    },
    "bpe without bytes": {"model_type": "bpe", "vocab_size": 200},
    "unigram": {"model_type": "unigram", "byte_fallback": True, "vocab_size": 370},
    "unigram, nfkc, squeezed": {
        "model_type": "unigram",
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
        "vocab_size": 110,
    },
}


def train(folder: Path, options: dict[str, Any]) -> sentencepiece.SentencePieceProcessor:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.txt").write_text("\n".join(CORPUS * 4), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        **{
            "input": str(folder / "corpus.txt"),
            "model_prefix": str(folder / "tokenizer"),
            "vocab_size": 450 if options.get("byte_fallback") else 220,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "minloglevel": 2,
            **options,
        }
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def same_as(
    made: Tokenizer, processor: sentencepiece.SentencePieceProcessor, checked: Sequence[str]
) -> None:
    for text in checked:
        ids = made.encode(text, add_special_tokens=False).ids
        assert ids == processor.encode(text), text


@pytest.mark.parametrize("name", SPM_OPTIONS)
def test_a_sentencepiece_model_gives_the_ids_of_the_sentencepiece_package(
    tmp_path: Path, name: str
):
    """NUL is left out: sentencepiece ends a text there."""
    options = SPM_OPTIONS[name]
    processor = train(tmp_path, options)
    made = open_sentencepiece(tmp_path).tokenizer()
    checked = texts(avoid="\x00")
    if "nfkc" in name:
        # Its compiled rules also join characters of a text that no rule names on its own.
        checked = [text for text in checked if text.isascii() or text in CORPUS]
    same_as(made, processor, checked)
    assert made.encode("fox").ids == [processor.bos_id(), *processor.encode("fox")]
    for text in CORPUS:
        ids = processor.encode(text)
        if processor.unk_id() not in ids:  # which sentencepiece shows as U+2047
            assert made.decode(ids) == processor.decode(ids)


@pytest.mark.parametrize("name", ["bpe", "bpe without prefix"])
def test_a_gguf_file_of_a_sentencepiece_model_gives_the_same_ids(tmp_path: Path, name: str):
    processor = train(tmp_path, SPM_OPTIONS[name])
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((tmp_path / "tokenizer.model").read_bytes())
    kinds = [p.type for p in proto.pieces]
    # llama.cpp's converter stores the visible space of user-defined pieces as a space.
    names = [p.piece.replace("▁", " ") if p.type == USER_DEFINED else p.piece for p in proto.pieces]
    keys = {
        "model": "llama",
        "tokens": names,
        "scores": [float(p.score) for p in proto.pieces],
        "token_type": kinds,
        "bos_token_id": 1,
        "add_space_prefix": name == "bpe",
    }
    made = gguf_tokenizer(open_gguf(gguf(tmp_path, keys)))
    same_as(made, processor, texts(avoid="\x00"))


def test_a_checkpoint_with_a_sentencepiece_model_gets_a_tokenizer_json(tmp_path: Path):
    source = tiny.write_checkpoint(tmp_path / "hf", tiny.llama_config())
    processor = train(source, SPM_OPTIONS["bpe"])
    n = processor.get_piece_size()
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "add_bos_token": True,
        "added_tokens_decoder": {str(n): {"content": "<|im_start|>", "special": True}},
    }
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    plan = convert(source, tmp_path / "out").plan
    assert "tokenizer.json" in plan.side_files
    made = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert made.encode("<|im_start|>the fox").ids == [1, n, *processor.encode("the fox")]
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == config


@pytest.mark.parametrize(("kind", "original"), [
    ("GPT2Tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False)),
    ("Qwen2TokenizerFast", with_regex(LLAMA3.replace("{1,3}", ""))),
])  # fmt: skip
def test_a_vocabulary_with_merges_gets_a_tokenizer_json(
    tmp_path: Path, kind: str, original: pre_tokenizers.PreTokenizer
):
    tokenizer, _ = byte_level(original)
    source = tiny.write_checkpoint(tmp_path / "hf", tiny.llama_config())
    tokenizer.model.save(str(source))
    n = tokenizer.get_vocab_size() - 1
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    (source / "added_tokens.json").write_text(json.dumps({"<b>": n}))
    plan = convert(source, tmp_path / "out").plan
    assert plan.notes == ("tokenizer.json is made from merges.txt",)
    made = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in [*texts(100), "a <b> b"]:
        if kind.startswith("Qwen"):
            text = unicodedata.normalize("NFC", text)
        assert made.encode(text).ids == tokenizer.encode(text).ids, text
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer"}')
    with pytest.raises(TokenizerError, match="'CTRLTokenizer' does not say how"):
        open_merges(source)
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    (source / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(TokenizerError, match="line 2 is no pair"):
        open_merges(source)
    (source / "merges.txt").write_text("zz9 yy9\n")
    with pytest.raises(TokenizerError, match=r"does not fit vocab\.json"):
        open_merges(source).tokenizer()


def test_an_added_token_that_leaves_a_gap_is_refused(tmp_path: Path):
    processor = train(tmp_path, SPM_OPTIONS["bpe"])
    n = processor.get_piece_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": n + 5}))
    with pytest.raises(TokenizerError, match=r"added token '<x>' has id"):
        open_sentencepiece(tmp_path).tokenizer()


def test_a_damaged_sentencepiece_model_is_named(tmp_path: Path):
    for data in (b"", b"\xff" * 100, b"not a model"):
        (tmp_path / "tokenizer.model").write_bytes(data)
        with pytest.raises(TokenizerError, match=r"tokenizer\.model: not a SentencePiece model"):
            open_sentencepiece(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x03\n\x01\xff")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: piece 0 is no text"):
        open_sentencepiece(tmp_path)


def test_without_the_sentencepiece_package_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(TokenizerError, match=r"pip install 'mlxkv\[sentencepiece\]'"):
        open_sentencepiece(tmp_path)
