#!/bin/bash
# llguidance 1.9.1, grammars of JSON schemas.
#
# Expected: a grammar made of a schema takes every JSON text of a value that the schema allows, or at
# least takes no fewer spellings of a number when a bound is added that the number keeps.
# Seen: {"type": "number"} takes 1e2; with "minimum": 0 or "maximum": 1000 it does not, exponents are
# gone. {"type": "integer"} takes -0, with "minimum": 0 it does not. A string never takes the escapes
# \u00e9 and \/ of JSON. A model that writes numbers in exponents, or non-ASCII letters in escapes,
# is forced into another spelling in the middle of it.
#
#   number 1e2: True
#   number, minimum 0, 1e2: False
#   number, maximum 1000, 1e2: False
#   integer -0: True
#   integer, minimum 0, -0: False
#   string with a letter as an escape: False
#   string with an escaped slash: False
#
# Exits 1 if that has changed. Needs python3 and a network.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check llguidance==1.9.1
cat > finding.py <<'P'
import json

from llguidance import LLMatcher, LLTokenizer

tokenizer = LLTokenizer("byte")


def takes(schema, text):
    json.loads(text)  # valid JSON
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


seen = {
    "number 1e2": takes({"type": "number"}, "1e2"),
    "number, minimum 0, 1e2": takes({"type": "number", "minimum": 0}, "1e2"),
    "number, maximum 1000, 1e2": takes({"type": "number", "maximum": 1000}, "1e2"),
    "integer -0": takes({"type": "integer"}, "-0"),
    "integer, minimum 0, -0": takes({"type": "integer", "minimum": 0}, "-0"),
    "string with a letter as an escape": takes({"type": "string"}, '"\\u00e9"'),
    "string with an escaped slash": takes({"type": "string"}, '"a\\/b"'),
}
for what, taken in seen.items():
    print(f"{what}: {taken}")
assert list(seen.values()) == [True, False, False, True, False, False, False], "it has changed"
P
venv/bin/python finding.py
