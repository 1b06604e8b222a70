"""Prompts with pictures and sound: computed once, found again by content, exact wherever they fork.

The oracle of every answer is the same prompt in a new process without anything kept.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mlxkv
from mlxkv.engine import prompt as prompts
from mlxkv.errors import MediaError, UsageError
from mlxkv.generation.asleep import request_from_json, request_to_json
from mlxkv.generation.context_shift import Bound
from mlxkv.generation.outputs import Result
from mlxkv.generation.request import Request
from mlxkv.kv.types import STEP
from mlxkv.llm.llm import LLM
from mlxkv.memory.media import Rows
from mlxkv.saved_kv.manifest import NamedKV
from tests.support.command_line import of_each_kind
from tests.support.seeing import ROWS, load_seeing, picture, seeing_model, shown

LONG = "The weir was built in 1874 of granite from the upper quarry, and mended twice. "
A, B = picture(1), picture(2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model whose layers see all tokens, and one whose windows slide."""
    return of_each_kind(tmp_path_factory.mktemp("models"), seeing_model)


@pytest.fixture(params=["llama", "gemma3"])
def llm(request, folder, kv) -> LLM:
    return load_seeing(folder / request.param)


def answer(llm: LLM, *parts: Any, **options: Any) -> Result:
    return llm.generate(shown(*parts), **{"max_tokens": 8, **options})


def nothing_kept(llm: LLM, two_way: bool = False) -> LLM:
    """The same model, which keeps no KV between prompts."""
    fresh = load_seeing(llm.path, two_way)
    fresh.pages = None
    fresh._pages.update({"": None})
    return fresh


def alone(llm: LLM, *parts: Any, **options: Any) -> list[int]:
    """The answer of a model that keeps nothing."""
    return answer(nothing_kept(llm), *parts, **options).tokens


def n_encoded(llm: LLM) -> int:
    return llm.budget.rows.n_encoded


def test_the_rows_of_a_picture_stand_where_the_template_put_it(llm):
    """Not at the placeholder that the user typed, and another picture is another answer."""
    asked = "Is <image> this one? "
    one, other = answer(llm, asked, A, "!"), answer(llm, asked, B, "!")
    assert one.tokens != other.tokens
    assert one.stats.prompt_tokens == other.stats.prompt_tokens
    at = other.stats.diverged_at
    assert at == len("\x00user\n") + len(asked) + len("\n\x00")
    assert other.stats.miss is not None
    assert other.stats.miss.prompt.endswith(f"|[picture 1: {B[0, 0]:.3f}.png]")


def test_what_is_kept_of_a_picture_is_of_its_owner_alone(llm):
    """Else the time to the first token would tell one key what another has shown."""
    (part,) = [each for each in shown(A)[0]["content"] if each["type"] == "image"]
    (one,), (again,), (other,) = (llm.media.read("image", part, owner) for owner in "aab")
    assert one.data is again.data and other.data is not one.data
    assert one.ids == other.ids
    rows = Rows(1 << 20)
    rows.encode(llm.model, one)
    assert rows.get(again) is not None and rows.get(other) is None


def test_a_miss_says_which_picture_of_the_prompt_it_is(llm):
    """By its place, also where it has no name, and where the same one stands before it."""
    text, sound = "t" * 20, {"type": "audio", "audio": B.tobytes()}
    one, two, three = ({"type": "image", "image": picture(seed).tobytes()} for seed in (1, 2, 3))

    def asked(*parts: Any) -> str:
        content = [{"type": "text", "text": text}, *parts, {"type": "text", "text": text}]
        miss = llm.generate([{"role": "user", "content": content}], max_tokens=1).stats.miss
        assert miss is None or miss.held.endswith(("|[another picture or sound]", "|[picture]"))
        return "" if miss is None else miss.prompt.partition("|")[2]

    assert asked(one, sound, two) == ""
    assert asked(one, sound, three).startswith("[picture 2]")
    assert asked(one, sound, one).startswith("[picture 2]")
    assert asked({**two, "name": "b.png"}, sound).startswith("[picture 1: b.png]")
    assert asked(one, {**sound, "audio": A.tobytes()}).startswith("[sound 1]")


FORKS = (
    (LONG * 4 + "!", A, "one", B, "two"),  # before the pictures
    (LONG * 4, picture(3), "one", B, "two"),  # another first picture, of the same size
    (LONG * 4, A, "ONE", B, "two"),  # between
    (LONG * 4, A, "one", picture(3), "two"),  # another second picture
    (LONG * 4, A, "one", B, "TWO"),  # behind
    (LONG * 4, A, "one", A, "two"),  # the same picture twice
)


def test_forks_are_exact_in_memory_and_after_a_restart(llm):
    asked = [(LONG * 4, A, "one", B, "two"), *FORKS]
    fresh = nothing_kept(llm)
    expected = [answer(fresh, *parts).tokens for parts in asked]
    assert len(set(map(tuple, expected))) == len(expected)
    assert [answer(llm, *parts).tokens for parts in asked] == expected
    llm.close()
    again = load_seeing(llm.path)
    for parts, tokens in zip(reversed(asked), reversed(expected), strict=True):
        result = answer(again, *parts)
        assert result.tokens == tokens
        assert result.stats.restored_tokens >= STEP
    again.close()


def test_the_same_picture_again_is_neither_computed_nor_encoded(llm):
    answer(llm, A, LONG * 4)
    assert n_encoded(llm) == 1
    asked = answer(llm, A, LONG * 4, "And why?")
    assert asked.stats.computed_tokens <= len("And why?\x00\n\x00assistant\n") + 1
    assert n_encoded(llm) == 1
    llm.close()
    again = load_seeing(llm.path)
    assert answer(again, A, LONG * 4, "And why?").stats.restored_tokens >= STEP
    assert n_encoded(again) == 0
    other = answer(again, B, "Two.")
    assert other.stats.restored_tokens == 0  # for the few tokens of text no page is loaded
    again.close()


@pytest.mark.parametrize("two_way", [False, True])
def test_no_picture_is_encoded_again_wherever_a_page_ends_in_it(folder, kv, two_way):
    """Also where so little of it is on the next page that text would be computed again."""
    asked = [("q" * (STEP - 8 - ROWS + n), A) for n in (1, 5, 9, 15)]
    with load_seeing(folder / "gemma3", two_way) as llm:
        for parts in asked:
            answer(llm, *parts, "One.")
    again = load_seeing(folder / "gemma3", two_way)
    expected = nothing_kept(again, two_way)
    for parts in asked:
        told = answer(again, *parts, "Two.")
        assert told.tokens == answer(expected, *parts, "Two.").tokens
        assert told.stats.restored_tokens > STEP
    assert n_encoded(again) == 0
    again.close()


def test_a_second_picture_computes_itself_and_what_follows(llm):
    chat = llm.conversation()
    list(chat.send(shown(LONG, A, "What is it?")[0]["content"], max_tokens=4))
    *_, last = chat.send(shown(B, "And this?")[0]["content"], max_tokens=4)
    assert last.stats is not None and last.stats.computed_tokens < ROWS + 60
    assert n_encoded(llm) == 2
    *_, last = chat.send(shown(A, "The first?")[0]["content"], max_tokens=4)
    assert last.stats is not None and last.stats.computed_tokens < ROWS + 60
    assert n_encoded(llm) == 2  # its rows are kept
    whole = load_seeing(llm.path)
    expected = whole.generate(chat.messages[:-1], max_tokens=4)
    assert chat.turns[-1]["content"] == expected.text


def test_a_file_is_found_again_by_its_content(llm, tmp_path):
    parts = []
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(A.tobytes())
        parts.append({"type": "image", "image": tmp_path / name})
    for i, part in enumerate(parts):
        message = [{"role": "user", "content": [part, {"type": "text", "text": LONG}]}]
        result = llm.generate(message, max_tokens=1)
        assert (result.stats.restored_tokens > len(LONG)) == bool(i)
    assert llm.media.reader is not None and llm.media.reader.n_read == 2  # pyright: ignore


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_chunks_do_not_end_inside_a_picture_that_sees_itself_both_ways(folder, kv, chunk):
    llm = load_seeing(folder / "gemma3", two_way=True)
    ends: list[int] = []
    real = llm.model.last_logits

    def noted(tokens: Any, caches: Any, media: Any = ()) -> Any:
        ends.append(caches[0].offset + tokens.shape[1])
        assert all(rows.shape[0] == ROWS for _, _, rows in media)
        return real(tokens, caches, media)

    llm.model.last_logits = noted  # pyright: ignore[reportAttributeAccessIssue]
    prepared = prompts.prepare(llm, Request(shown("ab", A, "c", B, "d")))
    session = llm.session()
    session.media = prepared.media
    logits = session.prefill(prepared.tokens, chunk=chunk)
    assert logits.shape[0] == 1
    for start, stop, _ in prepared.media.spans(prepared.tokens):
        assert not any(start < end < stop for end in ends)
    assert max(b - a for a, b in zip([0, *ends], ends, strict=False)) <= max(chunk, ROWS)


def test_a_model_without_eyes_says_so(folder, kv):
    llm = mlxkv.load(folder / "llama")
    with pytest.raises(MediaError, match=r"takes text only, and no pictures \(.*\.png\)"):
        answer(llm, A)


def test_a_picture_where_the_template_has_no_place_is_refused(llm):
    with pytest.raises(MediaError, match="places for 0 of the 1 parts that are pictures"):
        llm.tokenizer.chat_template.source = "{{ messages[0].role }}"
        answer(llm, A)


def test_penalties_and_log_probabilities_see_tokens_of_the_vocabulary(llm):
    parts = ("Look ", A, "!")
    expected = alone(llm, *parts, repeat_penalty=1.3, repeat_last_n=40)
    told = answer(llm, *parts, repeat_penalty=1.3, repeat_last_n=40, prompt_logprobs=1, logprobs=1)
    assert told.tokens == expected
    tokens = [each.token for each in told.prompt_logprobs]
    assert tokens == llm.encode(shown(*parts))
    assert tokens.count(3) == ROWS


def test_saved_kv_of_pictures_is_gone_on_from_without_them(llm):
    album = shown(LONG * 4, A, "a.png", B, "b.png")
    question = [{"role": "user", "content": "Which of them?"}]
    expected = load_seeing(llm.path).generate([*album, *question], max_tokens=8)
    saved = llm.save_kv("album", album)
    assert [medium.n_tokens for medium in saved.media] == [ROWS, ROWS]
    llm.close()
    again = load_seeing(llm.path)
    asked = again.generate(question, max_tokens=8, kv_from="album")
    assert asked.tokens == expected.tokens
    assert asked.stats.restored_tokens >= saved.n_tokens - 1
    assert n_encoded(again) == 0
    with pytest.raises(
        UsageError, match="2 pictures or pieces of sound, and without their content"
    ):
        again.verify_kv("album")
    for page in Path(os.environ["MLXKV_KV"]).rglob("*.safetensors"):
        page.unlink()
    assert again.pages is not None
    again.pages.clear()
    with pytest.raises(MediaError, match=rf"picture {A[0, 0]:.3f}.png: its KV is not on disk"):
        again.generate(question, max_tokens=8, kv_from="album")
    again.close()


def test_a_manifest_keeps_media_and_refuses_ids_that_are_none_of_theirs(llm):
    saved = llm.save_kv("one", shown(A, "a"))
    assert NamedKV.from_json(saved.to_json()) == saved
    plain = llm.save_kv("plain", [{"role": "user", "content": "text"}])
    assert b'"media"' not in plain.to_json()
    other = replace(saved.media[0], digest=bytes(32))
    for media in ((), (other,)):
        with pytest.raises(ValueError, match="tokens that cannot be"):
            replace(saved, media=media).to_json()


def test_a_context_shift_drops_pictures_whole(llm):
    parts = ("a" * 30, A, "b" * 30, B, "c" * 30)
    prompt = llm.encode(shown(*parts))
    prepared = prompts.prepare(llm, Request(shown(*parts)))
    for context in range(60, len(prompt), 23):
        bound = Bound(context, lambda: 0, [s[:2] for s in prepared.media.spans(prepared.tokens)])
        for n in range(context, len(prompt) + 40, 29):
            sequence = [*prepared.tokens, *[9] * 40][: max(n, len(prompt))]
            left = bound.remaining(sequence)
            assert len(left) < context
            spans = prepared.media.spans(left)
            assert sum(token < 0 for token in left) == ROWS * len(spans)
    options = {"context": len(prompt) + 8, "overflow": "shift", "max_tokens": 60}
    shifted = answer(llm, *parts, **options)
    assert shifted.tokens == alone(llm, *parts, **options)
    assert shifted.stats.shifted_tokens


def test_a_prompt_that_is_cut_to_the_context_begins_with_no_half_picture(llm):
    prompt = llm.encode(shown("a" * 20, A, "b" * 30))
    for context in range(40, len(prompt), 3):
        result = answer(llm, "a" * 20, A, "b" * 30, truncate=True, context=context, max_tokens=4)
        assert result.stats.prompt_tokens <= context - 4


def test_a_request_with_bytes_is_the_same_after_it_was_put_away(llm):
    request = Request(shown("Look ", A))
    assert request_from_json(json.loads(json.dumps(request_to_json(request)))) == request
    with pytest.raises(TypeError):
        request_to_json(Request([{"role": "user", "content": [{"type": "image", "image": A}]}]))
