#!/bin/bash
# mlx-lm 0.32.2 on mlx 0.32.4, the streaming detokenizer of byte-level BPE tokenizers (Llama 3, Qwen,
# GPT-OSS), through which `generate`, `stream_generate` and its server give text out.
#
# Expected: the pieces of a stream, joined, are what the tokenizer decodes all tokens to.
# Seen: a blank at the very beginning is gone. An answer that goes on with indented code ("    return
# x" behind "def f(x):\n") begins one column too far left, and the text that a client sends back is
# not the one whose KV is kept.
#
#   decoded: '    return x'
#   streamed: '   return x'
#
# Exits 1 if that has changed. Needs python3 and a network.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
on_linux=; [ "$(uname)" = Linux ] && on_linux=mlx-cpu==0.32.4
# shellcheck disable=SC2086  # one package or none
venv/bin/pip install --quiet --disable-pip-version-check mlx-lm==0.32.2 mlx==0.32.4 $on_linux
cat > finding.py <<'P'
import json
import pathlib

from mlx_lm.tokenizer_utils import load
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
folder = pathlib.Path("model")
folder.mkdir()
tokenizer.save(str(folder / "tokenizer.json"))
config = {"tokenizer_class": "PreTrainedTokenizerFast"}
(folder / "tokenizer_config.json").write_text(json.dumps(config))

tokens = tokenizer.encode("    return x").ids
detokenizer = load(folder).detokenizer
detokenizer.reset()
streamed = ""
for token in tokens:
    detokenizer.add_token(token)
    streamed += detokenizer.last_segment
detokenizer.finalize()
streamed += detokenizer.last_segment
print("decoded:", repr(tokenizer.decode(tokens)))
print("streamed:", repr(streamed))
assert tokenizer.decode(tokens) == "    return x", "the behaviour has changed"
assert streamed == "   return x", "the behaviour has changed"
P
venv/bin/python finding.py
