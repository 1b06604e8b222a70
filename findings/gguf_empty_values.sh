#!/bin/bash
# gguf 0.19.0, `GGUFWriter.add_string` and `add_array`.
#
# Expected: a key that was given an empty text or an empty list is in the file, with that value: the
# format has both, and a reader takes a key that is missing for its default.
# Seen: the key is left out, without a word. What says "no" by an empty value (an empty template, no
# tensor types, no tags) becomes "not said".
#
#   written: a.text a.none a.list a.empty
#   in the file: a.text a.list
#
# Exits 1 if that has changed. Needs python3 and a network.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check gguf==0.19.0
cat > finding.py <<'P'
from gguf import GGUFReader, GGUFWriter

writer = GGUFWriter("file.gguf", "llama")
writer.add_string("a.text", "x")
writer.add_string("a.none", "")
writer.add_array("a.list", ["x"])
writer.add_array("a.empty", [])
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
found = [name for name in GGUFReader("file.gguf").fields if name.startswith("a.")]
print("written: a.text a.none a.list a.empty")
print("in the file:", *found)
assert found == ["a.text", "a.list"], "the behaviour has changed"
P
venv/bin/python finding.py
