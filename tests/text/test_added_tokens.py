"""Tokens that only a file beside tokenizer.json names, and Mistral's words.

What is expected was compared with transformers 5.24 on the same files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mlxkv.errors import TokenizerError
from mlxkv.text.tokenizer import Tokenizer

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
LETTERS = [chr(code) for code in range(33, 127)]
VOCABULARY = [*LETTERS, "Ġ", "<x1>", "<x2>", "th", "the", "<s>", "</s>"]
ID = {text: i for i, text in enumerate(VOCABULARY)}
LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


def tokenizer(folder: Path, files: dict[str, Any]) -> Tokenizer:
    backend = Backend(models.BPE(vocab=ID, merges=[("t", "h"), ("th", "e")]))
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"model_type": "mistral", "vocab_size": len(VOCABULARY) + 1}
    for name, content in {"config.json": config, **files}.items():
        (folder / name).write_text(json.dumps(content))
    return Tokenizer.from_dir(folder)


@pytest.mark.parametrize(
    "files",
    [
        {CONFIG: {"additional_special_tokens": ["<x1>"]}},
        {CONFIG: {"extra_special_tokens": ["<x1>"]}},
        {CONFIG: {"extra_special_tokens": {"image_token": {"content": "<x1>"}}}},
        {MAP: {"additional_special_tokens": ["<x1>"]}},
        {CONFIG: {"additional_special_tokens": ["<x1>"], "added_tokens_decoder": {}}},
    ],
)
def test_a_token_that_is_only_named_stays_whole_and_is_special(
    tmp_path: Path, files: dict[str, Any]
):
    made = tokenizer(tmp_path, files)
    ids = made.encode("a<x1>the<x2>")
    assert ids == [ID["a"], ID["<x1>"], ID["the"], *(ID[c] for c in "<x2>")]
    assert made.decode(ids) == "athe<x2>"


def test_tokens_of_added_tokens_json_count_without_a_list_in_the_config(tmp_path: Path):
    new = len(VOCABULARY)
    made = tokenizer(tmp_path, {ADDED: {"<x2>": ID["<x2>"], "<new>": new}})
    assert made.encode("<x2>a<new>") == [ID["<x2>"], ID["a"], new]
    assert made.decode([ID["<x2>"], new]) == "<x2><new>"  # no special tokens
    made = tokenizer(tmp_path, {ADDED: {"<new>": 7}, CONFIG: {"added_tokens_decoder": {}}})
    assert made.id_of("<new>") is None


def test_a_named_token_beyond_the_models_rows_is_not_added(tmp_path: Path):
    named = {CONFIG: {"additional_special_tokens": ["<new>", "<newer>"]}}
    made = tokenizer(tmp_path, named)
    assert (made.id_of("<new>"), made.id_of("<newer>")) == (len(VOCABULARY), None)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({CONFIG: {"extra_special_tokens": "x"}}, "extra_special_tokens must be a list"),
        ({CONFIG: {"additional_special_tokens": [3]}}, "must hold texts; got 3"),
        ({ADDED: {"a": "b"}}, "added_tokens.json must map texts to ids"),
        ({ADDED: {"<new>": 500}}, "added_tokens.json gives '<new>' the id 500"),
    ],
)
def test_a_wrong_value_names_its_file(tmp_path: Path, files: dict[str, Any], said: str):
    with pytest.raises(TokenizerError) as caught:
        tokenizer(tmp_path, files)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "is_fixed"),
    [
        ({"model_type": "mistral"}, True),
        ({"model_type": "mistral3", "transformers_version": "4.57.1"}, True),
        ({"model_type": "llama"}, False),
        ({"model_type": "mistral", "transformers_version": "5.1.0"}, False),
    ],
)
def test_mistral_words_are_fixed_where_the_files_ask_for_it(
    tmp_path: Path, config: dict[str, Any], is_fixed: bool
):
    """A word ends where a capital follows a small letter: the two are not joined."""
    files = {CONFIG: {"fix_mistral_regex": True}, "config.json": config}
    made = tokenizer(tmp_path, files)
    split = made._backend.pre_tokenizer.pre_tokenize_str("tHe12")  # pyright: ignore
    expected = ["t", "He", "1", "2"] if is_fixed else ["tHe", "12"]
    assert [word for word, _ in split] == expected
