"""Each request alone, in a process of its own that keeps no prefix: a line of JSON for each.

What an answer of the server is held against: nothing else runs, and every prompt is computed from
its first token on.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--asks", type=Path, required=True, help="JSON of a list of `Ask`")
    args = parser.parse_args()
    import mlxkv

    llm = mlxkv.load(args.model, dtype=args.dtype)
    llm.pages_of = lambda owner: None  # pyright: ignore[reportAttributeAccessIssue]
    for raw in json.loads(args.asks.read_text(encoding="utf-8")):
        made = llm.generate(raw["prompt"], max_tokens=raw["max_tokens"], **raw["options"])
        found: dict[str, Any] = {
            "name": raw["name"],
            "text": made.text,
            "finish_reason": made.finish_reason,
            "n_tokens": made.stats.generated_tokens,
            "restored_tokens": made.stats.restored_tokens,
        }
        print(json.dumps(found), flush=True)
    os._exit(0)  # a step may be in flight, see `worker`


if __name__ == "__main__":
    main()
