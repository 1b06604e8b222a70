"""Make golden.json: what openai-harmony renders of the conversations and schemas of cases.py.

scripts/gpt-oss-tokenizer
python -m tests.support.harmony.make_golden
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

from tests.support.harmony import reference
from tests.support.harmony.cases import CONVERSATIONS, DATE, GOLDEN, VERSION, schemas


def main() -> None:
    assert version("openai-harmony") == VERSION
    with tempfile.TemporaryDirectory() as scratch:
        encoding = reference.encoding(reference.tokenizer_folder(), Path(scratch))
    texts = {
        name: encoding.decode_utf8(reference.render(encoding, {**DATE, **case}))
        for name, case in CONVERSATIONS.items()
    }
    lines = [
        json.dumps([schema, reference.namespace(encoding, schema)], ensure_ascii=False)
        for schema in schemas()
    ]
    head = json.dumps({"version": VERSION, "conversations": texts}, ensure_ascii=False, indent=1)
    body = ",\n".join(lines)
    GOLDEN.write_text(head[:-2] + f',\n "schemas": [\n{body}\n]}}\n')


if __name__ == "__main__":
    main()
