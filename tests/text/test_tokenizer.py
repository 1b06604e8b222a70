"""The tokenizer: transformers' ids, files and their errors, end tokens, and the streaming text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from mlxkv.errors import TokenizerError, UsageError
from mlxkv.text import tokenizer as tokenizer_module
from mlxkv.text.tokenizer import Tokenizer
from tests.support.paths import ROOT
from tests.support.paths import TOKENIZERS as FOLDER

NAMES = sorted(path.parent.name for path in FOLDER.glob("*/golden.json"))
GOLDEN = {name: json.loads((FOLDER / name / "golden.json").read_text("utf-8")) for name in NAMES}
TOKENIZERS = {name: Tokenizer.from_dir(FOLDER / name) for name in NAMES}
FALLBACK = [name for name in NAMES if name != "byte_level"]
TEXT = st.text() | st.text("a dogé日🙂\u0301\u200d\ufffd\u2581 \n<s>|endtool")


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens=skip)
    return [*[stream.add(token) for token in ids], stream.finish()]


def tokens_of(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    ids = [tokenizer.id_of(token) for token in tokens]
    assert None not in ids
    return [token for token in ids if token is not None]


# Encoding and decoding ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_transformers(name: str):
    tokenizer = TOKENIZERS[name]
    for case in GOLDEN[name]["encoded"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        plain = tokenizer.encode(case["text"], add_special_tokens=False)
        assert plain == case["plain_ids"], case["text"]


@pytest.mark.parametrize("name", NAMES)
def test_decoded_text_is_that_of_transformers(name: str):
    tokenizer = TOKENIZERS[name]
    for case in GOLDEN[name]["decoded"]:
        for skip, key in ((True, "text"), (False, "full_text")):
            text = tokenizer.decode(case["ids"], skip_special_tokens=skip)
            if name in FALLBACK and "\ufffd" in case[key]:
                # transformers blanks out a whole run of byte tokens where one is not UTF-8.
                assert "\ufffd" in text
            else:
                assert text == case[key]


def test_the_goldens_tell_special_tokens_from_none():
    llama = GOLDEN["llama"]["encoded"]
    assert all(case["ids"] == [1, *case["plain_ids"]] for case in llama)
    assert any("\ufffd" not in case["text"] for case in GOLDEN["llama"]["decoded"])


def test_a_rendered_first_token_is_not_doubled_without_special_tokens():
    tokenizer = TOKENIZERS["llama"]
    assert tokenizer.encode("<s>twice", add_special_tokens=False).count(1) == 1
    assert tokenizer.encode("<s>twice").count(1) == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_backslash_and_a_t_stay_two_characters(name: str):
    tokenizer = TOKENIZERS[name]
    assert tokenizer.decode(tokenizer.encode("a\\tb\tc")) == "a\\tb\tc"


@pytest.mark.parametrize("name", NAMES)
@given(text=TEXT)
@settings(max_examples=60, deadline=None)
def test_text_survives_encoding_and_decoding(name: str, text: str):
    if name == "metaspace":
        # Its decoder cannot tell a mark from a space, and drops the first token's.
        text = text.replace("\u2581", " ").lstrip(" ")
    if name in FALLBACK:
        text = text.replace("\u2581", " ")
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not any(token in tokenizer.special_ids for token in ids):
        assert tokenizer.decode(ids) == text


def test_a_leading_space_is_kept_and_nothing_is_cleaned_up():
    tokenizer = TOKENIZERS["byte_level"]
    for text in (" lazy dog", "dog . It 's n't , yes ?", "  two"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # SentencePiece's own first space is dropped once, the text's is not.
    llama = TOKENIZERS["llama"]
    assert llama.decode(llama.encode(" the dog . yes ?")) == " the dog . yes ?"
    assert llama.decode(llama.encode("the dog")) == "the dog"


@pytest.mark.parametrize("name", NAMES)
@given(text=TEXT)
@settings(max_examples=60, deadline=None)
def test_a_text_that_goes_on_keeps_its_first_blanks(name: str, text: str):
    tokenizer = TOKENIZERS[name]
    before = tokenizer.encode("x", add_special_tokens=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = tokenizer.stream(continues=True)
    got = "".join([*map(stream.add, ids), stream.finish()])
    assert got == tokenizer.decode([*before, *ids]).removeprefix("x")


@pytest.mark.parametrize("bad", [-1, 10**6, 2**40])
def test_an_id_out_of_range_is_a_usage_error(bad: int):
    tokenizer = TOKENIZERS["gemma"]
    stream = tokenizer.stream()
    calls: list[Callable[[], Any]] = [
        lambda: tokenizer.decode([5, bad]),
        lambda: tokenizer.check_ids([5, bad]),
        lambda: tokenizer.token_of(bad),
        lambda: stream.add(bad),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=rf"from 0 to \d+; got {bad}"):
            call()


def test_text_that_is_not_unicode_is_a_usage_error():
    with pytest.raises(UsageError, match="lone surrogates"):
        TOKENIZERS["gemma"].encode("half \ud800")


# Streaming ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_streamed_text_of_any_ids_is_the_decoded_text(name: str, skip: bool, data: st.DataObject):
    tokenizer = TOKENIZERS[name]
    # Half of the tokens are bytes, so that characters are often broken and often whole.
    token = st.integers(0, tokenizer.n_vocab - 1) | st.integers(0, 260)
    ids = data.draw(st.lists(token, max_size=12))
    if data.draw(st.booleans()):
        ids += tokenizer.encode(data.draw(TEXT)) + ids[:3]
    text = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(streamed(tokenizer, ids, skip)) == text
    # The `tokenizers` library says the same wherever every byte is part of a character.
    theirs = tokenizer._backend.decode(ids, skip_special_tokens=skip)
    if name == "byte_level" or "\ufffd" not in theirs:
        assert text == theirs


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_the_bytes_of_tokens_are_those_of_their_text(name: str, data: st.DataObject):
    tokenizer = TOKENIZERS[name]
    token = st.integers(0, tokenizer.n_vocab - 1) | st.integers(0, 260)
    first = tokenizer.encode("x", add_special_tokens=False)
    ids = data.draw(st.lists(token, max_size=12)) + tokenizer.encode(data.draw(TEXT))
    whole = tokenizer.decode([*first, *ids], skip_special_tokens=False)
    joined = b"".join(map(tokenizer.bytes_of, ids))
    assert "x" + joined.decode(errors="replace") == whole


def test_a_part_of_a_character_is_its_bytes():
    for name in ("llama", "gemma"):
        assert TOKENIZERS[name].bytes_of(TOKENIZERS[name].id_of("<0xF0>") or -1) == b"\xf0"
    tokenizer = TOKENIZERS["byte_level"]
    assert [tokenizer.bytes_of(token) for token in tokenizer.encode("🙂")] == [
        b"\xf0",
        b"\x9f",
        b"\x99",
        b"\x82",
    ]


@pytest.mark.parametrize("name", NAMES)
@given(text=TEXT)
@settings(max_examples=80, deadline=None)
def test_no_piece_of_a_text_holds_half_a_character(name: str, text: str):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")
    assert pieces[-1] == "" or name == "metaspace"  # nothing is held once the text is whole


def test_a_character_of_several_tokens_comes_with_its_last_token():
    byte_tokens = [f"<0x{byte:02X}>" for byte in "🙂".encode()]
    for name in ("llama", "gemma"):
        tokenizer = TOKENIZERS[name]
        ids = tokens_of(tokenizer, "o", *byte_tokens, *byte_tokens)
        assert streamed(tokenizer, ids) == ["o", "", "", "", "🙂", "", "", "", "🙂", ""]
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("🙂")
    assert len(ids) == 4
    assert streamed(tokenizer, ids) == ["", "", "", "🙂", ""]


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_off_character_comes_out_at_finish(name: str):
    tokenizer = TOKENIZERS[name]
    if name == "byte_level":
        ids = tokenizer.encode("🙂")[:3]
    else:
        ids = tokens_of(tokenizer, "<0xF0>", "<0x9F>", "<0x99>")
    assert streamed(tokenizer, ids) == ["", "", "", "\ufffd"]


def test_the_valid_part_of_a_run_of_bytes_is_kept():
    tokenizer = TOKENIZERS["gemma"]
    ids = tokens_of(tokenizer, "<0xC3>", "<0xA9>", "<0xFF>", "<0xC3>", "o")
    assert streamed(tokenizer, ids) == ["", "é", "\ufffd", "", "\ufffdo", ""]
    assert tokenizer.decode(ids) == "é\ufffd\ufffdo"


def test_a_replacement_character_in_the_text_is_text():
    for name in NAMES:
        tokenizer = TOKENIZERS[name]
        ids = tokenizer.encode("a\ufffdb", add_special_tokens=False)
        assert "".join(streamed(tokenizer, ids)) == "a\ufffdb"


def test_special_tokens_are_left_out_or_written():
    for name in NAMES:
        tokenizer = TOKENIZERS[name]
        ids = tokenizer.encode("dog<|end|>fox", add_special_tokens=False)
        skipped = "".join(streamed(tokenizer, ids))
        assert "<|end|>" not in skipped
        written = "".join(streamed(tokenizer, ids, skip=False))
        assert written.replace("<|end|>", "") == skipped
        assert "<|end|>" in written


def test_a_space_inside_an_answer_is_kept_where_the_first_one_is_dropped():
    tokenizer = TOKENIZERS["llama"]
    ids = tokens_of(tokenizer, "\u2581", "o", "\u2581", "o")
    assert streamed(tokenizer, ids) == ["", "o", " ", "o", ""]
    # A special token that is left out is not the first token.
    assert "".join(streamed(tokenizer, [1, *ids])) == "o o"


def small(decoder: Any, *tokens: str) -> Tokenizer:
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    if decoder is not None:
        backend.decoder = decoder
    return Tokenizer(backend, special_tokens={}, eos_token_ids=frozenset(), n_vocab=len(tokens) + 2)


REPLACE = decoders.Replace("\u2581", " ")
PIECES = [
    "\u2581",
    "\u2581a",
    "b\u2581\u2581",
    "<0xE2>",
    "<0x96>",
    "<0x81>",
    "<0xA9>",
    "##s",
    "é",
    " ",
]


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        REPLACE,
        decoders.Fuse(),
        decoders.ByteLevel(),
        decoders.ByteFallback(),
        decoders.Strip(" ", 1, 0),
        decoders.Strip("a", 0, 1),
        decoders.Metaspace(),
        decoders.Metaspace(prepend_scheme="never"),
        decoders.WordPiece(),
        decoders.BPEDecoder("a"),
        decoders.Replace("a\u2581", "x"),
        decoders.Sequence([]),
        decoders.Sequence([REPLACE, decoders.Strip(" ", 2, 0)]),
        decoders.Sequence([REPLACE, decoders.Fuse(), decoders.Strip(" ", 3, 0)]),
        decoders.Sequence([decoders.Fuse(), REPLACE]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "x")]),
        decoders.Sequence([decoders.Fuse(), decoders.Metaspace()]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
        decoders.Sequence([decoders.ByteFallback(), REPLACE, decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([REPLACE, decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Sequence([decoders.Metaspace(), decoders.ByteLevel()]),
    ],
    ids=str,
)
@given(ids=st.lists(st.integers(0, len(PIECES) + 1), max_size=10))
@settings(max_examples=80, deadline=None)
def test_every_kind_of_decoder_streams_what_it_decodes(decoder: Any, ids: list[int]):
    tokenizer = small(decoder, *PIECES)
    text = tokenizer.decode(ids)
    assert "".join(streamed(tokenizer, ids)) == text
    theirs = tokenizer._backend.decode(ids)
    if "\ufffd" not in theirs:
        assert text == theirs


def test_a_decoder_that_cannot_stream_gives_its_text_at_finish():
    tokenizer = small(decoders.WordPiece(), "dog", "##s", "run")
    assert not tokenizer.stream().is_live
    assert streamed(tokenizer, [0, 1, 2]) == ["", "", "", "dogs run"]
    assert TOKENIZERS["llama"].stream().is_live


def test_the_work_for_a_token_does_not_grow_with_the_text():
    tokenizer = TOKENIZERS["gemma"]
    byte = tokens_of(tokenizer, "<0xC3>", "<0xA9>")

    def seconds(n: int) -> float:
        stream, start = tokenizer.stream(), time.thread_time()
        for _ in range(n):
            stream.add(byte[0])
            stream.add(byte[1])
        return time.thread_time() - start

    # Eight times the tokens take about eight times as long; 64 times if it were quadratic.
    assert min(seconds(8000) for _ in range(3)) < 30 * min(seconds(1000) for _ in range(3))


# Files --------------------------------------------------------------------------------------------


def model_dir(folder: Path, added: Sequence[Any] = (), /, **files: Any) -> Path:
    """A model directory with a small tokenizer; `files` by name, "__" for the dot."""
    backend = Backend(models.BPE({"a": 0, "b": 1, "</s>": 2, "<unk>": 3}, [], unk_token="<unk>"))
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_tokens(list(added))
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def special(*tokens: str) -> list[Any]:
    return [AddedToken(token, special=True, normalized=False) for token in tokens]


def refused(folder: Path) -> str:
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_dir(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def test_a_directory_with_tokenizer_json_alone_is_enough(tmp_path: Path):
    tokenizer = Tokenizer.from_dir(model_dir(tmp_path))
    assert tokenizer.encode("ab") == [0, 1]
    assert (tokenizer.n_vocab, tokenizer.bos_token, tokenizer.bos_token_id) == (4, None, None)
    assert tokenizer.eos_token_ids == frozenset()
    assert tokenizer.chat_template is None


def test_a_directory_without_tokenizer_json_says_what_makes_one(tmp_path: Path):
    assert "`mlxkv convert`" in refused(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    said = refused(tmp_path)
    assert "has tokenizer.model and no tokenizer.json" in said
    assert "`mlxkv convert`" in said


@pytest.mark.parametrize("text", ["", "{}", "[1]", "{", '{"model": {"type": "BPE"}}', "\x00\xff"])
def test_a_damaged_tokenizer_json_is_one_line_naming_the_file(tmp_path: Path, text: str):
    (tmp_path / "tokenizer.json").write_text(text, encoding="latin-1")
    assert "tokenizer.json: cannot be read: " in refused(tmp_path)


@pytest.mark.parametrize(
    "name", ["tokenizer_config", "special_tokens_map", "generation_config", "config"]
)
@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": NaN', "[" * 100_000])
def test_a_damaged_side_file_is_one_line_naming_the_file(tmp_path: Path, name: str, text: str):
    said = refused(model_dir(tmp_path, **{f"{name}__json": text}))
    assert f"{name}.json: " in said


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tokenizer_config__json": {"eos_token": 5}}, "eos_token must be a string; got 5"),
        ({"tokenizer_config__json": {"eos_token": "<no>"}}, "eos_token '<no>' is not in the voc"),
        ({"tokenizer_config__json": {"bos_token": "<no>"}}, "bos_token '<no>' is not in the voc"),
        ({"special_tokens_map__json": {"eos_token": "<no>"}}, "special_tokens_map.json: eos_token"),
        ({"generation_config__json": {"eos_token_id": "2"}}, "eos_token_id must be a token id"),
        ({"generation_config__json": {"eos_token_id": [2, -1]}}, "got [2, -1]"),
        ({"config__json": {"eos_token_id": True}}, "config.json: eos_token_id"),
        ({"config__json": {"text_config": {"eos_token_id": 1.5}}}, "config.json: eos_token_id"),
        ({"config__json": {"text_config": [1]}}, "text_config must be an object"),
        ({"tokenizer_config__json": {"added_tokens_decoder": [1]}}, "must be an object"),
        ({"tokenizer_config__json": {"added_tokens_decoder": {"x": {}}}}, "map ids to objects"),
        ({"tokenizer_config__json": {"added_tokens_decoder": {"0": {}}}}, "content must be a str"),
        (
            {"tokenizer_config__json": {"added_tokens_decoder": {"9": {"content": "<new>"}}}},
            "gives '<new>' the id 9, tokenizer.json 4",
        ),
        ({"tokenizer_config__json": {"chat_template": 3}}, "chat_template must be text or a list"),
        (
            {"tokenizer_config__json": {"chat_template": [{"name": "rag", "template": "x"}]}},
            "no template named 'default'; it has 'rag'",
        ),
    ],
)
def test_a_wrong_value_is_one_line_naming_the_file_and_the_key(
    tmp_path: Path, files: dict[str, Any], said: str
):
    assert said in refused(model_dir(tmp_path, **files))


def test_an_unknown_end_token_is_never_the_unknown_token(tmp_path: Path):
    files = {"special_tokens_map__json": {"eos_token": "<no>", "unk_token": "<unk>"}}
    assert "'<no>'" in refused(model_dir(tmp_path, **files))


def test_end_tokens_are_those_of_all_files(tmp_path: Path):
    tokenizer = Tokenizer.from_dir(
        model_dir(
            tmp_path,
            special("<a>", "<b>"),
            tokenizer_config__json={"eos_token": {"content": "<a>"}, "added_tokens_decoder": {}},
            special_tokens_map__json={"eos_token": "<b>"},
            generation_config__json={"eos_token_id": [0, 1]},
            config__json={"eos_token_id": 2, "text_config": {"eos_token_id": [3]}},
        )
    )
    assert tokenizer.eos_token == "<a>"
    assert tokenizer.eos_token_ids == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<|endoftext|>", "<|im_end|>"]),
        (["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|start_header_id|>"], 3),
        (["<eos>", "<start_of_turn>", "<end_of_turn>"], ["<end_of_turn>"]),
        (["<|turn>", "<turn|>"], ["<turn|>"]),
        # Phi-3 and gpt-oss use the same name for different things.
        (["<|end|>", "<|user|>", "<|assistant|>"], ["<|end|>"]),
        (
            ["<|end|>", "<|channel|>", "<|return|>", "<|call|>", "<|message|>"],
            ["<|return|>", "<|call|>"],
        ),
        # GLM has no end of turn.
        (
            ["[gMASK]", "<|user|>", "<|assistant|>", "<|observation|>"],
            ["<|user|>", "<|observation|>"],
        ),
        (["<|call|>", "<|return|>", "<|observation|>"], []),
        # What the template writes before a tool's result.
        (["<|tool_call>", "<tool_call|>", "<|tool_response>"], ["<|tool_response>"]),
        (["<start_function_response>", "<end_function_call>"], ["<start_function_response>"]),
    ],
)
def test_well_known_end_tokens_are_found(tmp_path: Path, tokens: list[str], ends: Any):
    tokenizer = Tokenizer.from_dir(model_dir(tmp_path, special(*tokens)))
    names = {tokenizer.token_of(token) for token in tokenizer.eos_token_ids}
    assert names == set(tokens[:ends] if isinstance(ends, int) else ends)


def test_a_well_known_name_that_is_ordinary_text_ends_nothing(tmp_path: Path):
    added = [AddedToken("<|im_end|>", special=False), *special("<b>")]
    tokenizer = Tokenizer.from_dir(model_dir(tmp_path, added))
    assert tokenizer.eos_token_ids == frozenset()


def test_the_ids_of_a_padded_embedding_are_in_range_and_decode_to_nothing(tmp_path: Path):
    tokenizer = Tokenizer.from_dir(model_dir(tmp_path, config__json={"vocab_size": 64}))
    assert tokenizer.n_vocab == 64
    assert tokenizer.decode([0, 63, 1]) == "ab"
    assert streamed(tokenizer, [0, 63, 1]) == ["a", "", "b", ""]
    nested = {"text_config": {"vocab_size": 72}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert Tokenizer.from_dir(tmp_path).n_vocab == 72


def test_a_vocabulary_with_gaps_counts_its_last_id(tmp_path: Path):
    Backend(models.BPE({"a": 0, "b": 2, "c": 3}, [])).save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_dir(tmp_path).n_vocab == 4


def test_truncation_and_padding_in_tokenizer_json_are_ignored(tmp_path: Path):
    folder = model_dir(tmp_path)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(folder / "tokenizer.json"))
    assert Tokenizer.from_dir(folder).encode("ababa") == [0, 1, 0, 1, 0]


def test_templates_are_looked_for_in_order(tmp_path: Path):
    folder = model_dir(
        tmp_path,
        tokenizer_config__json={"chat_template": "config", "eos_token": "</s>"},
        chat_template__json={"chat_template": "json"},
        chat_template__jinja="jinja {{ eos_token }}",
    )

    def rendered() -> str:
        template = Tokenizer.from_dir(folder).chat_template
        assert template is not None
        return template.render([{"role": "user", "content": "x"}])

    assert rendered() == "jinja </s>"
    (folder / "chat_template.jinja").unlink()
    assert rendered() == "json"
    (folder / "chat_template.json").unlink()
    assert rendered() == "config"


def test_named_templates_are_default_and_for_tools(tmp_path: Path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    template = Tokenizer.from_dir(
        model_dir(tmp_path, tokenizer_config__json={"chat_template": named})
    ).chat_template
    assert template is not None
    assert template.render([{"role": "user"}]) == "plain"
    assert template.render([{"role": "user"}], tools=[]) == "tools"


def test_a_broken_template_fails_when_it_renders_and_names_its_file(tmp_path: Path):
    folder = model_dir(tmp_path, chat_template__jinja="{% if %}")
    template = Tokenizer.from_dir(folder).chat_template
    assert template is not None
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja: line 1: syntax error"):
        template.render([{"role": "user"}])


def test_loading_imports_neither_transformers_nor_the_hub_nor_mlx():
    code = (
        "import sys; from pathlib import Path; from mlxkv.text.tokenizer import Tokenizer;"
        f"t = Tokenizer.from_dir(Path({str(FOLDER / 'llama')!r})); t.decode(t.encode('x'));"
        "heavy = {'transformers', 'huggingface_hub', 'torch', 'jinja2'} & set(sys.modules);"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


class PanicException(BaseException):
    """As pyo3 names what a panic inside a library in Rust raises."""


class Panics:
    """A backend that panics on every text."""

    def __init__(self, backend):
        self._backend = backend

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def encode(self, *args, **options):
        raise PanicException("no entry\nfound for key")

    decode = encode


def test_a_panic_of_the_library_is_one_line_that_names_the_file(monkeypatch):
    tokenizer = Tokenizer.from_dir(FOLDER / "byte_level")
    monkeypatch.setattr(tokenizer, "_backend", Panics(tokenizer._backend))
    for fails in (lambda: tokenizer.encode("a"), lambda: tokenizer.decode([1])):
        with pytest.raises(TokenizerError, match=r"tokenizer\.json fails on .*: no entry found"):
            fails()


def test_a_file_that_the_library_panics_on_later_is_named(monkeypatch):
    def panics(*_):
        raise PanicException("index out of bounds")

    monkeypatch.setattr(tokenizer_module, "apply_added_tokens", panics)
    with pytest.raises(TokenizerError, match=r"byte_level.tokenizer\.json: cannot be used: index"):
        Tokenizer.from_dir(FOLDER / "byte_level")


NOTE = b"note: run with `RUST_BACKTRACE=1` to show a trace\n"


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("index out of\nbounds", b"index out of\nbounds\n"),
        ("index out of\nbounds", b"index out of\nbounds\n" + NOTE),
        ("other", b"index out of\nbounds\n" + NOTE),
        ("other", b"index out of bounds\n"),
    ],
)
def test_a_panic_at_load_leaves_no_trace_and_takes_no_other_line_with_it(
    monkeypatch, capfd, said, written
):
    """What Rust 1.8x writes on the descriptor itself; the note with a process's first panic."""

    def panics(*_):
        os.write(2, b"before\n\nthread '<unnamed>' (12) panicked at src/lib.rs:3:5:\n" + written)
        os.write(2, b"behind\n")
        raise PanicException(said)

    monkeypatch.delenv("RUST_BACKTRACE", raising=False)
    monkeypatch.setattr(tokenizer_module, "apply_added_tokens", panics)
    with pytest.raises(TokenizerError):
        Tokenizer.from_dir(FOLDER / "byte_level")
    assert capfd.readouterr().err == "before\nbehind\n"
