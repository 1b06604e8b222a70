"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

KVType = Annotated[
    str | None, typer.Option("--kv-type", help="Format of the KV cache: native, q8, q4 or auto.")
]


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Name, path, .gguf file or Hugging Face org/name.")
]
