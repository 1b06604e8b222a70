"""A text that goes on from an earlier one gets the ids that it has alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from mlxkv.text import growing
from mlxkv.text.growing import GrowingTexts
from mlxkv.text.pieces import Pieces

FOLDER = Path(__file__).parent.parent / "support" / "tokenizers"
FAMILIES = ("byte_level", "gemma", "llama", "metaspace")
MARKERS = ("<|im_start|>", "<|im_end|>", "<|call|>")
PIECES = (
    *(" ", "  ", "\n", "\n\n", "a", " word", "é", "日本", "🙂", "<|im", "_start|>", "|>", "it's"),
    *("12", ' {"a": 1}', "\t", "</s>", "<s>", "<unk>", "."),
)


def backend(family: str, **options: bool) -> Backend:
    made = Backend.from_file(str(FOLDER / family / "tokenizer.json"))
    flags = {"special": True, "normalized": False, **options}
    made.add_tokens([AddedToken(marker, **flags) for marker in MARKERS])
    return made


class Counting(GrowingTexts):
    """Counts the characters that the backend gets."""

    def __init__(self, made: Backend):
        super().__init__(made)
        self.n_encoded = 0
        outer = self

        class Counted(Pieces):
            def encode(self, text: str, start: int = 0):
                outer.n_encoded += len(text) - start
                return super().encode(text, start)

        self._pieces = Counted(made)


@pytest.fixture(autouse=True)
def all_lengths(monkeypatch):
    monkeypatch.setattr(growing, "LEAST", 1)


def turn(pick: random.Random) -> str:
    body = "".join(pick.choices(PIECES, k=pick.randint(0, 12)))
    return pick.choice(MARKERS[:1]) + "user\n" + body + pick.choice(MARKERS) + pick.choice(PIECES)


@pytest.mark.parametrize("flags", [{}, {"rstrip": True}, {"lstrip": True}, {"normalized": True}])
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_whole_text(family, flags):
    made = backend(family, **flags)
    texts, pick = GrowingTexts(made), random.Random(5)
    held = ["".join(pick.choices(PIECES, k=8))]
    for _ in range(300):
        text = pick.choice(held[-3:])
        cut = pick.choice([len(text), len(text), pick.randint(0, len(text))])
        text = text[:cut] + "".join(turn(pick) for _ in range(pick.randint(1, 3)))
        text = text if len(text) < 1500 else turn(pick)
        held.append(text)
        assert texts.encode(text) == made.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_new_turns_are_encoded(family):
    texts, pick = Counting(backend(family)), random.Random(2)
    text = ""
    for _ in range(20):
        last, before = "<|im_start|>user\nword word<|im_end|>\n", texts.n_encoded
        text += last + turn(pick).replace("<|im_start|>", "<|call|>", 1)
        texts.encode(text)
        assert texts.n_encoded - before < 200
    assert len(text) > 1000


def test_a_marker_that_another_token_may_cover_is_no_place_to_cut():
    made = backend("byte_level")
    made.add_tokens([AddedToken("x<|im", special=True), AddedToken("<|call|>>", special=True)])
    texts = GrowingTexts(made)
    ids = made.get_vocab()
    assert [texts._cuts_at(ids[marker]) for marker in MARKERS] == [False, False, False]
    for text in ("a<|im_start|>b", "ax<|im_start|>b", "a<|call|>b", "a<|call|>>b"):
        assert texts.encode(text) == made.encode(text, add_special_tokens=False).ids


def test_few_texts_are_remembered():
    texts = GrowingTexts(backend("byte_level"))
    for i in range(50):
        texts.encode(f"<|im_start|>{i}<|im_end|>" * 3)
    assert len(texts._known[""]) == growing.MAX_TEXTS


def test_what_is_remembered_is_of_use_to_its_own_owner_alone():
    texts = Counting(backend("byte_level"))
    text = "<|im_start|>user some words<|im_end|>" * 200
    texts.encode(text, "a")
    costs = []
    for owner in "ab":
        texts.n_encoded = 0
        assert texts.encode(text + "more", owner)
        costs.append(texts.n_encoded)
    assert costs[0] < len(text) / 10 < len(text) <= costs[1]
    for i in range(growing.MAX_OWNERS):
        texts.encode(text, str(i))
    assert len(texts._known) == growing.MAX_OWNERS and "a" not in texts._known
