"""A long text is encoded in parts, or refused by its length: never otherwise than as a whole."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, WordLevel

from mlxkv.chat.interrupt import Interrupted, interruptible
from mlxkv.convert.gguf.pretokenizers import PRE_TOKENIZERS
from mlxkv.text import growing, least_tokens, pieces
from mlxkv.text.growing import GrowingTexts, TooManyTokens
from mlxkv.text.least_tokens import LeastTokens
from mlxkv.text.pieces import Pieces

FOLDER = Path(__file__).parent.parent / "support" / "tokenizers"
FAMILIES = ("byte_level", "gemma", "llama", "metaspace")
WORDS = (
    *(" ", "  ", "\n", "\n\n", "a", "b", " the", "word", " qu", "it's", " 's", "'ll x", "12", "3 "),
    *("é", "e\u0301", "日本", "中 文", "🙂", "<|im_end|>", "</s>", "\t", "\r\n", ".", ", ", "ﬁ"),
    *(
        "def f(x):\n    ",
        "x\ny",
        "A B",
        "aA bB",
        "\u3000",
        " \u0301",
        "▁",
        "각",
        "가\u11a8",
        "\x00",
    ),
)
TEXT = "the quick brown fox jumps over the lazy dog " * 8


def backend(family: str, **flags: bool) -> Backend:
    made = Backend.from_file(str(FOLDER / family / "tokenizer.json"))
    made.add_tokens([AddedToken("<|im_end|>", special=True, normalized=False, **flags)])
    return made


def split_by(name: str, form: str | None) -> Backend:
    """The byte-level vocabulary behind the expressions of another model."""
    made = backend("byte_level")
    made.pre_tokenizer = PRE_TOKENIZERS[name].build(add_prefix_space=False)
    if form is not None:
        made.normalizer = getattr(normalizers, form)()
    return made


KINDS = {
    **{family: backend(family) for family in FAMILIES},
    "rstrip": backend("llama", rstrip=True, lstrip=True),
    **{name: split_by(name, "NFC") for name in ("gpt-2", "smollm", "llama3", "qwen2")},
    **{name: split_by(name, form) for name, form in (("gpt-4o", "NFKD"), ("tekken", None))},
}


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    monkeypatch.setattr(pieces, "SIZE", 8)
    monkeypatch.setattr(pieces, "FREE", 8)
    monkeypatch.setattr(least_tokens, "SIZE", 7)
    monkeypatch.setattr(growing, "LEAST", 1)
    monkeypatch.setattr(growing, "COUNTED", -1)


def ids(made: Backend, text: str) -> list[int]:
    return made.encode(text, add_special_tokens=False).ids


def texts(seed: int, n: int) -> list[str]:
    pick = random.Random(seed)
    made = []
    for _ in range(n):
        words = pick.sample(WORDS, pick.randint(1, len(WORDS)))
        made.append("".join(pick.choices(words, k=pick.randint(1, 50))))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_have_the_ids_of_the_whole(kind):
    made, n_parts = KINDS[kind], 0
    cut = Pieces(made)
    for text in [TEXT, *texts(1, 60)]:
        parts = [part.ids for _, _, part in cut.encode(text)]
        n_parts += len(parts) - 1
        assert [*chain(*parts)] == ids(made, text)
    assert n_parts > 60


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_has_fewer_tokens_than_the_bound(kind):
    made = KINDS[kind]
    least = LeastTokens(made)
    for text in [TEXT, *texts(2, 60)]:
        assert least.of(text) <= len(ids(made, text))
    assert least.of(TEXT) > 0 or kind == "rstrip"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_of_the_longest_tokens_is_taken_and_one_token_more_is_not(family):
    made = backend(family)
    tokens = {i: made.decode([i]) for i in range(made.get_vocab_size())}
    longest = max((i for i in tokens if tokens[i].isalpha()), key=lambda i: len(tokens[i]))
    text = "\n".join([tokens[longest]] * 40)
    n = len(ids(made, text))
    assert GrowingTexts(made).encode(text, most=n) == ids(made, text)
    with pytest.raises(TooManyTokens):
        GrowingTexts(made).encode(text, most=n - 1)
    # With no other token as long the bound is close.
    assert 20 <= LeastTokens(made).of(tokens[longest] * 40) <= n


@pytest.mark.parametrize("kind", KINDS)
def test_what_fits_is_never_refused(kind):
    made = KINDS[kind]
    for text in texts(3, 40):
        n = len(ids(made, text))
        assert GrowingTexts(made).encode(text, most=n) == ids(made, text)
        if n > 1:
            with pytest.raises(TooManyTokens) as refused:
                GrowingTexts(made).encode(text, most=n - 1)
            assert n - 1 < refused.value.n_tokens <= n


def test_a_long_text_is_refused_before_it_is_encoded():
    made = backend("byte_level")

    class Never(Pieces):
        def encode(self, text: str, start: int = 0):
            raise AssertionError("encoded")

    texts = GrowingTexts(made)
    texts._pieces = Never(made)
    with pytest.raises(TooManyTokens):
        texts.encode("a" * 10_000, most=100)


def test_a_text_is_refused_once_it_has_too_many_tokens(monkeypatch):
    made, done = backend("byte_level"), []
    monkeypatch.setattr(LeastTokens, "of", lambda self, text: 0)

    class Noted(Pieces):
        def encode(self, text: str, start: int = 0):
            for part in super().encode(text, start):
                done.append(part)
                yield part

    texts = GrowingTexts(made)
    texts._pieces = Noted(made)
    with pytest.raises(TooManyTokens):
        texts.encode(TEXT, most=20)
    assert sum(len(part.ids) for _, _, part in done[:-1]) <= 20


def test_encoding_ends_between_two_parts():
    def is_unwanted(asked: list[int] = []) -> bool:  # noqa: B006
        asked.append(1)
        return len(asked) > 3

    with pytest.raises(Interrupted), interruptible(is_unwanted):
        GrowingTexts(backend("llama")).encode(TEXT)


def with_pre_tokenizer(pattern: str) -> Backend:
    made = backend("byte_level")
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(use_regex=False)])
    return made


def with_added(content: str, **flags: bool) -> Backend:
    made = backend("byte_level")
    made.add_tokens([AddedToken(content, **flags)])
    return made


def with_normalizer() -> Backend:
    made = backend("byte_level")
    made.normalizer = normalizers.Replace("k b", "kb")
    return made


@pytest.mark.parametrize(
    "made",
    [
        with_pre_tokenizer(r".+fox|\s+"),
        with_added("quick brown"),
        with_added("fox", rstrip=True),
        with_normalizer(),
        Backend(WordLevel({"a": 0}, unk_token="a")),
    ],
)
def test_what_is_not_known_to_stay_the_same_is_not_cut(made):
    assert [(start, end) for start, end, _ in Pieces(made).encode(TEXT)] == [(0, len(TEXT))]


def dropping() -> Sequence[Backend]:
    spaces = backend("byte_level")
    spaces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    shorter = backend("byte_level")
    shorter.normalizer = normalizers.Strip()
    return (spaces, shorter, Backend(WordLevel({"a": 0}, unk_token="a")))


@pytest.mark.parametrize("made", dropping())
def test_no_bound_is_known_where_text_may_be_dropped(made):
    assert LeastTokens(made).of(" " * 1000) == 0


def test_characters_that_are_no_token_count_nothing():
    made = Backend(BPE({"a": 0, "b": 1, "bb": 2}, [("b", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert ids(made, "z" * 1000) == []
    assert LeastTokens(made).of("z" * 1000 + "a" * 100 + "b" * 100) == 149  # less by rounding
    assert len(ids(made, "z" * 1000 + "a" * 100 + "b" * 100)) == 150
