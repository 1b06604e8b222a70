"""Mutate files of every GGUF family, other quantizer and kind of tokenizer: only our errors, one
line each.

python -m tests.support.fuzz_readers --count 10000 --seconds 200 --only gguf:llama,hub:awq

Not a test that is collected: 10,000 mutations of each reader take minutes. `--start` goes on after
so many mutations of each; a failure prints the reader and the mutation's number.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from mlxkv.convert.open import open_source
from mlxkv.convert.plan import MAX_SHARD_BYTES, make_plan, parse_options
from mlxkv.errors import MlxkvError
from tests.support import tiny
from tests.support.gguf_files import write_model

MEMORY_BYTES = 3 << 30
SLOW_S = 10.0
IN_MEMORY = Path("/dev/shm")
WEIGHTS, KIND = "model.safetensors", "kind"
_NUMBERS = ("0", "-1", "1", "7", "65536", "4294967296", "1e400", "0.5", "null", '"x"', "[]", "{}")


def gguf_files(folder: Path) -> dict[str, Path]:
    """A tiny GGUF file of each family."""
    from tests.convert import test_convert_gguf_families as families

    found = {}
    for name, case in families.CASES.items():
        config, weights = families.checkpoint(case)
        path = folder / f"{name}.gguf"
        families.write_family(path, config, weights)
        found[f"gguf:{name}"] = path
    for name, config in (("llama", tiny.llama_config()), ("gemma3", tiny.gemma3_config())):
        found[f"gguf:{name}"] = write_model(folder / f"{name}.gguf", config)
    return found


def tokenizer_files(root: Path) -> dict[str, Path]:
    """Folders with a tokenizer in another form than tokenizer.json."""
    from tests.convert import test_convert_ranks as ranked
    from tests.convert import test_convert_tokenizer as trained

    ranks = ranked.learned(ranked.PATTERN, 40)
    kinds = ("tekken", "tiktoken", "sentencepiece", "merges")
    folders = {f"tokens:{kind}": root / kind for kind in kinds}
    for folder in folders.values():
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama"}')
    (root / "tekken/tekken.json").write_text(json.dumps(ranked.tekken(ranks)))
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (root / "tiktoken/tokenizer.model").write_text("".join(lines))
    trained.train(root / "sentencepiece", {"model_type": "bpe", "byte_fallback": True})
    made, _ = trained.byte_level(trained.SMOLLM)
    made.model.save(str(root / "merges"))
    (root / "merges/tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (root / "sentencepiece/corpus.txt").unlink()
    (root / "sentencepiece/tokenizer.vocab").unlink()
    return folders


def folders(root: Path) -> dict[str, Path]:
    """A tiny checkpoint of each other quantizer."""
    from tests.support.other_formats import CASES, checkpoint

    found = {}
    for name, (settings, case, *_) in CASES.items():
        found[f"hub:{name}"], _ = checkpoint(root / name, settings, case)
    return found


def mutated(data: bytes, draw: random.Random, head: int) -> bytes:
    """A file with one to four faults, most of them in its first `head` bytes."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(head, len(changed)) if draw.random() < 0.9 else len(changed))
        kind = draw.randrange(6)
        if kind == 0:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[at] = draw.randrange(256)
        elif kind == 2:
            value = draw.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
            changed[at : at + 8] = struct.pack("<Q", value)
        elif kind == 3:
            del changed[at : at + draw.randint(1, 16)]
        elif kind == 4:
            changed[at:at] = draw.randbytes(draw.randint(1, 16))
        else:
            other = draw.randrange(max(1, min(head, len(changed))))
            changed[at : at + 4] = changed[other : other + 4]
        if len(changed) < 8:
            break
    return bytes(changed[: draw.randrange(len(changed))] if draw.random() < 0.05 else changed)


def mutated_json(text: str, draw: random.Random) -> str:
    """A config with another value for one to three of its numbers, words or brackets."""
    import re

    for _ in range(draw.randint(1, 3)):
        places = list(re.finditer(r"-?\d+(?:\.\d+)?|true|false|null|\"[^\"]*\"", text))
        if not places:
            break
        place = draw.choice(places)
        text = text[: place.start()] + draw.choice(_NUMBERS) + text[place.end() :]
    return text


def _read(source: Path) -> None:
    """Open a source, plan it, and read some rows of every tensor; or make its tokenizer."""
    if source.is_dir() and not (source / WEIGHTS).exists():
        _read_tokenizer(source)
        return
    opened = open_source(source)
    options = parse_options(None, None, None, None, MAX_SHARD_BYTES)
    make_plan(opened, options)
    for tensor in opened.tensors.values():
        import mlx.core as mx

        mx.eval(tensor.rows(0, tensor.row_step))


def _read_tokenizer(folder: Path) -> None:
    from mlxkv.convert.hub.merges import open_merges
    from mlxkv.convert.hub.ranks import open_tekken, open_tiktoken
    from mlxkv.convert.hub.sentencepiece import open_sentencepiece

    kinds = {"tekken": open_tekken, "tiktoken": open_tiktoken, "sentencepiece": open_sentencepiece,
             "merges": open_merges}  # fmt: skip
    made = kinds[(folder / KIND).read_text()](folder).tokenizer()
    made.encode("a text, 123 \u00e4")


def fuzz(name: str, source: Path, numbers: range, until_s: float, scratch: Path) -> tuple[int, int]:
    """Mutate a source; how many mutations ran, and how many of them did something that is no error.

    Only an `MlxkvError` of one line may be raised, within `SLOW_S`.
    """
    ran = failed = 0
    make = _folder_mutation if (source / WEIGHTS).exists() else _tokenizer_mutation
    make = _gguf_mutation if source.is_file() else make
    write = make(source)
    for i in numbers:
        if time.monotonic() > until_s:
            break
        target = scratch / ("m.gguf" if source.is_file() else "m")
        write(random.Random(f"{name} {i}"), target)
        start, problem = time.process_time(), ""
        try:
            _read(target)
        except MlxkvError as error:
            problem = "more than one line" if "\n" in str(error) else ""
        except Exception:
            problem = traceback.format_exc(limit=-3)
        if (took_s := time.process_time() - start) > SLOW_S:
            problem = f"took {took_s:.0f} s"
        ran += 1
        if problem:
            failed += 1
            print(f"{name} {i}: {problem}", flush=True)
    return ran, failed


def _gguf_mutation(source: Path) -> Callable[[random.Random, Path], None]:
    from mlxkv.convert.gguf.file import open_gguf

    data = source.read_bytes()
    head = min(tensor.offset for tensor in open_gguf(source).tensors.values())
    return lambda draw, target: _write(target, mutated(data, draw, head))


def _write(target: Path, data: bytes) -> None:
    target.write_bytes(data)


class _Copy:
    """A copy of a folder in which one file at a time has other content."""

    def __init__(self, source: Path, more: Mapping[str, bytes] = MappingProxyType({})) -> None:
        self.contents = {file.name: file.read_bytes() for file in source.iterdir()} | dict(more)
        self.changed: str | None = None

    def write(self, target: Path, name: str, data: bytes) -> None:
        back = self.contents if self.changed is None else {}
        if self.changed is None:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
        elif self.changed != name:
            back = {self.changed: self.contents[self.changed]}
        for file, content in {**back, name: data}.items():
            (target / file).unlink(missing_ok=True)  # what is mapped keeps the old one
            (target / file).write_bytes(content)
        self.changed = name


def _tokenizer_mutation(source: Path) -> Callable[[random.Random, Path], None]:
    copy = _Copy(source, {KIND: source.name.encode()})
    names = sorted(name for name in copy.contents if name not in ("config.json", KIND))

    def write(draw: random.Random, target: Path) -> None:
        name = draw.choice(names)
        data = copy.contents[name]
        if name.endswith(".json") and draw.random() < 0.5:
            copy.write(target, name, mutated_json(data.decode(), draw).encode())
        else:
            copy.write(target, name, mutated(data, draw, len(data)))

    return write


def _folder_mutation(source: Path) -> Callable[[random.Random, Path], None]:
    copy, config = _Copy(source), "config.json"
    data, text = copy.contents[WEIGHTS], copy.contents[config].decode()
    head = 8 + struct.unpack("<Q", data[:8])[0]
    header = data[8:head].decode()

    def write(draw: random.Random, target: Path) -> None:
        kind = draw.randrange(4)
        if kind == 0:
            copy.write(target, config, mutated_json(text, draw).encode())
        elif kind == 1:
            new = mutated_json(header, draw).encode()
            copy.write(target, WEIGHTS, struct.pack("<Q", len(new)) + new + data[head:])
        elif kind == 2:
            copy.write(target, WEIGHTS, mutated(data, draw, head))
        else:
            # The header stays: values of scales, orders and states go wrong.
            spoiled = bytearray(data)
            for _ in range(draw.randint(1, 200)):
                spoiled[draw.randrange(head, len(data))] = draw.randrange(256)
            copy.write(target, WEIGHTS, bytes(spoiled))

    return write


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="mutations of each reader")
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="in all")
    parser.add_argument("--only", default="", help="readers, by the beginning of their names")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES * 4, MEMORY_BYTES * 4))
    warnings.simplefilter("error", RuntimeWarning)  # which would be a line on the user's screen
    begins = tuple(args.only.split(","))
    ends_s, failures, counts = time.monotonic() + args.seconds, 0, {}
    in_memory = str(IN_MEMORY) if IN_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=in_memory) as folder:
        root = Path(folder)
        sources = {**gguf_files(root), **folders(root), **tokenizer_files(root)}
        chosen = {name: path for name, path in sources.items() if name.startswith(begins)}
        for i, (name, path) in enumerate(chosen.items()):
            share = (ends_s - time.monotonic()) / (len(chosen) - i)
            numbers = range(args.start, args.start + args.count)
            until_s = time.monotonic() + share
            counts[name], failed = fuzz(name, path, numbers, until_s, root)
            failures += failed
            print(f"{name}: {counts[name]:,} mutations, {failed} failures", flush=True)
    print(json.dumps(counts), f"{failures} failures", file=sys.stderr)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
