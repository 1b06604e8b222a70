"""Make the small tokenizers of this folder, and the ids that transformers gives with them.

    pip install -e '.[oracle]'
    python -m tests.support.tokenizers.make_golden

Each directory holds what a checkpoint holds, and golden.json: texts with their ids, and ids with
their texts.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers import decoders as d
from tokenizers import models as m
from tokenizers import normalizers as n
from tokenizers import pre_tokenizers as p
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent
CORPUS = [
    "The quick brown fox jumps over the lazy dog. Then the dog jumps over the fox, and they rest.",
    "Tokens are counted in steps of 256, and the cache grows with them: one step, then another.",
    "Über den Wolken muss die Freiheit wohl grenzenlos sein; naïve café, déjà vu.",
    "日本語のテキスト。日本の日。",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXTS = [
    "",
    " ",
    "Hello  world",
    " leading and trailing ",
    "a\\tb is not a\tb\n\n\r\n",
    "日本語 🙂👩‍👩‍👧 e\u0301",
    "\ufffd and \x00",
    "<s>twice",
    "<|user|>the dog<|end|>\n<|assistant|> the fox <|end|>",
    "a <|tool|>  b",
    "<0x41><unk></s>",
    "quz qux",
]


def special(*tokens: str) -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False) for token in tokens]


CHAT = special("<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")


def first_token(tokenizer: Tokenizer) -> Any:
    return TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(m.BPE())
    tokenizer.pre_tokenizer = p.Sequence(
        [p.Split(Regex(r"\p{N}{1,3}"), "isolated"), p.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = d.ByteLevel()
    alphabet = sorted(p.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Characters outside of the byte alphabet, as in DeepSeek's tokens.
    tokenizer.add_tokens([*CHAT, *special("<\uff5ctool\u2581call\uff5c>"), "<|tool|>", "qu"])
    return tokenizer


def with_byte_fallback(normalizer: Any, pre_tokenizer: Any, decoder: Any) -> Tokenizer:
    """A SentencePiece model's pieces: byte tokens first, then what BPE learns."""
    teacher = Tokenizer(m.BPE())
    teacher.normalizer, teacher.pre_tokenizer = (
        n.Replace(" ", "\u2581"),
        p.Split("\u2581", "merged_with_next"),
    )
    teacher.train_from_iterator(CORPUS[:3], BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(teacher.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *BYTES, *sorted(model["vocab"], key=model["vocab"].get)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "\u2581"]))}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(
        m.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    tokenizer.add_tokens([*special("<unk>"), *CHAT])
    tokenizer.post_processor = first_token(tokenizer)
    return tokenizer


def llama() -> Tokenizer:
    """As Llama 2 and Mistral 7B."""
    return with_byte_fallback(
        n.Sequence([n.Prepend("\u2581"), n.Replace(" ", "\u2581")]),
        None,
        d.Sequence([d.Replace("\u2581", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)]),
    )


def gemma() -> Tokenizer:
    """As Gemma: no space in front."""
    return with_byte_fallback(
        n.Replace(" ", "\u2581"),
        p.Split(" ", "merged_with_previous"),
        d.Sequence([d.Replace("\u2581", " "), d.ByteFallback(), d.Fuse()]),
    )


def metaspace() -> Tokenizer:
    """As newer conversions of SentencePiece models."""
    return with_byte_fallback(
        None,
        p.Metaspace(prepend_scheme="first", split=False),
        d.Sequence([d.ByteFallback(), d.Metaspace(prepend_scheme="first", split=False)]),
    )


CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "byte_level": {
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "eos_token": {"__type": "AddedToken", "content": "<|end|>", "special": True},
            "pad_token": "qu",
            # A plain piece of the vocabulary, which becomes special.
            "unk_token": "the",
            # Not in the vocabulary at all: left alone here, given an id past it by transformers.
            "mask_token": "<mask>",
        }
    },
    "llama": {
        "tokenizer_config.json": {"add_bos_token": True, "clean_up_tokenization_spaces": False},
        "special_tokens_map.json": {
            "bos_token": {"content": "<s>", "lstrip": False, "rstrip": False},
            "eos_token": "</s>",
            "unk_token": "<unk>",
        },
    },
    "gemma": {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"}},
    "metaspace": {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"}},
}


def write(name: str, tokenizer: Tokenizer) -> None:
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    files = json.loads(json.dumps(CONFIGS[name]))
    if name == "byte_level":
        # <|tool|> is plain in tokenizer.json, and takes the white space around it here.
        tool = {"content": "<|tool|>", "lstrip": True, "rstrip": True, "special": True}
        files["tokenizer_config.json"]["added_tokens_decoder"] = {
            str(tokenizer.token_to_id("<|tool|>")): {**tool, "normalized": False}
        }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    (folder / "golden.json").write_text(json.dumps(golden(folder), ensure_ascii=False) + "\n")


def golden(folder: Path) -> dict[str, Any]:
    oracle = PreTrainedTokenizerFast.from_pretrained(folder)
    encoded = [
        {
            "text": text,
            "ids": oracle.encode(text),
            "plain_ids": oracle.encode(text, add_special_tokens=False),
        }
        for text in TEXTS
    ]
    rng = random.Random(0)
    lists = [entry["ids"] for entry in encoded]
    lists += [[rng.randrange(len(oracle)) for _ in range(rng.randrange(9))] for _ in range(40)]
    decoded = [
        {
            "ids": ids,
            "text": oracle.decode(ids, skip_special_tokens=True),
            "full_text": oracle.decode(ids),
        }
        for ids in lists
    ]
    return {"encoded": encoded, "decoded": decoded}


def main() -> None:
    for make in (byte_level, llama, gemma, metaspace):
        write(make.__name__, make())


if __name__ == "__main__":
    main()
