#!/bin/bash
# transformers 5.24.0, `AutoTokenizer` of a folder with tokenizer.json and tokenizer_config.json.
#
# Expected: tokenizer.json says how text is split; `tokenizer_class` in tokenizer_config.json names
# what holds special tokens and templates, and changes no ids.
# Seen: a class that transformers 5 builds itself (GPT2Tokenizer, Qwen2Tokenizer and others) takes
# vocabulary and merges from tokenizer.json and its own way of splitting and normalizing: a
# checkpoint whose tokenizer.json splits otherwise gets other ids than from the `tokenizers` library,
# which other engines use, and no warning is given (for LlamaTokenizer there is one).
#
#   as written: ['12', '34', 'x']
#   PreTrainedTokenizerFast: ['12', '34', 'x']
#   GPT2Tokenizer: ['1234', 'x']
#   Qwen2Tokenizer: ['1', '2', '3', '4', 'x']
#
# Exits 1 if that has changed. Needs python3 and a network.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check transformers==5.24.0 jinja2==3.1.6
cat > finding.py <<'P'
import json
import pathlib

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

tokens = ["1", "2", "3", "4", "x", "12", "34", "1234"]
merges = [("1", "2"), ("3", "4"), ("12", "34")]
tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
pairs = pre_tokenizers.Split(Regex("[0-9]{2}"), "isolated")  # digits in groups of two
level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pairs, level])
tokenizer.decoder = decoders.ByteLevel()
folder = pathlib.Path("model")
folder.mkdir()
tokenizer.save(str(folder / "tokenizer.json"))


def split(name):
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    loaded = AutoTokenizer.from_pretrained(folder)
    return [tokens[i] for i in loaded.encode("1234x", add_special_tokens=False)]


seen = {"as written": tokenizer.encode("1234x").tokens}
for name in ("PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer"):
    seen[name] = split(name)
for name, found in seen.items():
    print(f"{name}: {found}")
own = ["12", "34", "x"]
wanted = [own, own, ["1234", "x"], ["1", "2", "3", "4", "x"]]
assert list(seen.values()) == wanted, "the behaviour has changed"
P
venv/bin/python finding.py 2> /dev/null
