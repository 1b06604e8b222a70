"""The context is a bound: a sequence stops there, or is shortened and goes on as if it were new."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlxkv
from mlxkv.errors import ContextExceeded, UsageError
from mlxkv.generation.context_shift import Bound, most_kept, n_dropped
from mlxkv.generation.decoder import Row, decode
from mlxkv.generation.session import Session, n_shared
from mlxkv.kv.layout import Positions
from mlxkv.llm.llm import LLM
from mlxkv.sampling.params import SamplingParams
from mlxkv.sampling.sampler import Sampler
from mlxkv.store.settings import Given
from mlxkv.terminal import repl
from mlxkv.terminal.answer_options import AnswerOptions
from mlxkv.terminal.local import LocalSpeaker
from mlxkv.terminal.slash_commands import Chat
from tests.llm.test_llm import turns
from tests.support import tiny
from tests.support.command_line import chat_model

KINDS = [("llama", "native"), ("llama", "q8"), ("gemma3", "native"), ("gemma3", "q8")]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "gemma3"):
        chat_model(folder / family, family=family)
    return folder


def load(models: Path, family: str = "llama", **options: Any) -> LLM:
    return mlxkv.load(models / family, dtype="float32", **options)


def prompt_of(n: int) -> list[int]:
    return [token + 3 for token in tiny.tokens(n)]  # no special ones


def watch(llm: LLM) -> list[range]:
    """The positions that the model computes, chunk by chunk."""
    computed = []
    real = llm.model.last_logits

    def last_logits(tokens: mx.array, caches: Any) -> mx.array:
        start = caches[0].offset
        if isinstance(start, Positions):  # with a draft
            computed.append(range(start.of[0], start.of[-1] + 1))
            return real(tokens, caches)
        computed.append(range(start, start + tokens.shape[1]))
        return real(tokens, caches)

    llm.model.last_logits = last_logits  # pyright: ignore[reportAttributeAccessIssue]
    return computed


def longest(computed: Sequence[range]) -> int:
    return max(chunk.stop for chunk in computed)


def by_fresh_runs(
    llm: LLM, prompt: Sequence[int], n: int, context: int, n_kept: int, **sampling: Any
) -> list[int]:
    """An answer of `n` tokens of which each part behind a shift comes from empty caches."""
    sampler = Sampler(SamplingParams(**sampling), llm.config.vocab_size)
    whole = list(prompt)
    while len(whole) < len(prompt) + n:
        dropped = n_dropped(len(whole), n_kept, context)
        held = whole[:n_kept] + whole[n_kept + dropped :]
        room = min(context - len(held), len(prompt) + n - len(whole))
        session = Session(llm.model, llm.kv_type)
        whole += decode(Row(session, session.prefill(held), sampler, room))
    return whole[len(prompt) :]


# What goes and what stays.

contexts = st.integers(2, 5000)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[int, int, int]:
    """(tokens, kept, context)"""
    context = draw(contexts)
    return draw(st.integers(0, 4 * context)), draw(st.integers(0, most_kept(context))), context


@given(sequences())
def test_what_remains_fits_and_holds_more_than_what_is_kept(sequence):
    n_tokens, n_kept, context = sequence
    left = n_tokens - n_dropped(n_tokens, n_kept, context)
    assert left < context
    assert left == n_tokens < context or left > n_kept


@given(sequences())
def test_a_sequence_that_became_full_has_a_quarter_to_a_half_free(sequence):
    _, n_kept, context = sequence
    free = n_dropped(context, n_kept, context)
    assert context // 4 <= free <= context // 2


@given(sequences())
def test_what_goes_follows_from_the_length_alone(sequence):
    """Shifting step by step, as decode does, drops what shifting the whole at once does."""
    n_tokens, n_kept, context = sequence
    held, dropped = min(n_tokens, context - 1), 0
    for _ in range(n_tokens - held):
        held += 1
        if held == context:
            step = n_dropped(context, n_kept, context)
            held, dropped = held - step, dropped + step
    assert dropped == n_dropped(n_tokens, n_kept, context)


@given(sequences())
def test_the_beginning_and_the_end_remain(sequence):
    n_tokens, n_kept, context = sequence
    bound = Bound(context, lambda: n_kept)
    left = bound.remaining(range(n_tokens))
    assert left[:n_kept] == list(range(n_tokens))[:n_kept]
    tail = left[n_kept:]
    assert tail == list(range(n_tokens))[n_tokens - len(tail) :]
    assert len(left) == n_tokens - bound.n_dropped(n_tokens)


def test_nothing_is_counted_before_it_is_needed():
    def never() -> int:
        raise AssertionError("counted")

    bound = Bound(100, never)
    bound.check(50, None, keep=50)
    bound.check(90, 10, keep=80)
    assert bound.remaining(range(99)) == list(range(99))
    assert Bound(100).remaining(range(200)) == list(range(200)), "to stop drops nothing"


@pytest.mark.parametrize("n_kept", [51, 99, 100, 1000])
def test_to_keep_more_than_half_is_refused_with_numbers(n_kept):
    with pytest.raises(UsageError, match=rf"keep {n_kept:,} tokens .*of 100 allows 50"):
        Bound(100, lambda: n_kept).check(60, None, keep=0)


# Stopping.


@pytest.mark.parametrize(("family", "kv_type"), KINDS)
@pytest.mark.parametrize(("context", "n_prompt"), [(41, 40), (48, 40), (255, 250), (257, 250)])
def test_an_answer_stops_where_the_context_is_full(models, family, kv_type, context, n_prompt):
    llm = load(models, family, kv_type=kv_type, context=context)
    assert llm.context == context
    computed = watch(llm)
    result = llm.generate(prompt_of(n_prompt))
    assert (len(result.tokens), result.finish_reason) == (context - n_prompt, "length")
    assert result.stats.shifted_tokens == 0
    assert longest(computed) == context - 1, "the last token is chosen and not fed"


@pytest.mark.parametrize("context", [32, 255, 256, 257])
def test_a_prompt_leaves_room_for_a_token_or_is_refused(models, context):
    llm = load(models, context=context)
    assert len(llm.generate(prompt_of(context - 1)).tokens) == 1
    for n in (context, context + 1):
        with pytest.raises(ContextExceeded, match=f"{n:,} tokens and the context is {context:,}"):
            llm.stream(prompt_of(n))
        assert len(llm.generate(prompt_of(n), truncate=True, max_tokens=2).tokens) == 2


# Shifting.


@pytest.mark.parametrize(("family", "kv_type"), KINDS)
@pytest.mark.parametrize(
    ("context", "n_prompt", "n"), [(64, 40, 100), (41, 40, 30), (257, 256, 9), (256, 300, 90)]
)
def test_what_follows_a_shift_is_what_a_fresh_run_gives(
    models, family, kv_type, context, n_prompt, n
):
    llm = load(models, family, kv_type=kv_type, context=context, overflow="shift")
    computed, prompt = watch(llm), prompt_of(n_prompt)
    result = llm.generate(prompt, max_tokens=n)
    assert longest(computed) <= context
    assert result.tokens == by_fresh_runs(llm, prompt, n, context, 0)
    assert (len(result.tokens), result.finish_reason) == (n, "length")
    assert result.stats.shifted_tokens == n_dropped(n_prompt + n - 1, 0, context) > 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("keep", [1, 20, 32])
def test_the_first_tokens_are_kept_on_request(models, family, keep):
    llm, prompt = load(models, family, context=64, overflow="shift", keep=keep), prompt_of(40)
    assert llm.generate(prompt, max_tokens=90).tokens == by_fresh_runs(llm, prompt, 90, 64, keep)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_is_kept_is_not_computed_again(models, family):
    llm = load(models, family, context=600, overflow="shift", keep=290)
    computed = watch(llm)
    llm.generate(prompt_of(590), max_tokens=20, draft="off")  # wrong drafts are computed again
    again = [b for a, b in itertools.pairwise(computed) if b.start != a.stop]
    assert again == [range(290, 600 - 155)]


@pytest.mark.parametrize("sampling", [{"temperature": 0.9, "seed": 3}, {"repeat_penalty": 1.3}])
def test_seeds_and_penalties_go_on_over_a_shift(models, sampling):
    llm, prompt = load(models, context=200, overflow="shift"), prompt_of(190)
    options = {**sampling, "logit_bias": {2: -100.0}}  # it does not end by itself
    result = llm.generate(prompt, max_tokens=130, **options)
    assert result.tokens == by_fresh_runs(llm, prompt, 130, 200, 0, **options)


def test_stop_texts_and_the_text_go_on_over_a_shift(models):
    llm, prompt = load(models, context=64, overflow="shift"), prompt_of(40)
    whole = llm.generate(prompt, max_tokens=60)
    assert whole.text == llm.tokenizer.decode(whole.tokens)
    # The first shift is behind 24 tokens of one byte each.
    end = next(i for i in range(30, 58) if whole.text.find(whole.text[i : i + 3]) == i)
    result = llm.generate(prompt, stop=whole.text[end : end + 3])
    assert (result.text, result.finish_reason) == (whole.text[:end], "stop")
    assert result.stats.shifted_tokens == 32


def test_an_answer_that_ends_where_the_context_is_full_drops_nothing(models):
    llm = load(models, context=64, overflow="shift")
    assert llm.generate(prompt_of(40), max_tokens=24).stats.shifted_tokens == 0
    assert llm.generate(prompt_of(40), max_tokens=25).stats.shifted_tokens == 32


def test_a_prompt_that_is_too_long_is_shortened_first(models):
    llm, prompt = load(models, context=64, overflow="shift", keep=5), prompt_of(500)
    dropped = n_dropped(500, 5, 64)
    result = llm.generate(prompt, max_tokens=1)
    assert result.stats.prompt_tokens == 500 - dropped < 64
    assert result.stats.shifted_tokens == dropped
    left = prompt[:5] + prompt[5 + dropped :]
    assert result.tokens == llm.generate(left, max_tokens=1).tokens


def test_to_truncate_means_what_it_did_and_keeps_no_head(models):
    llm, prompt = load(models, context=64, overflow="shift"), prompt_of(100)
    result = llm.generate(prompt, truncate=True, max_tokens=50)
    assert result.stats.prompt_tokens == 32
    assert result.tokens == by_fresh_runs(llm, prompt[-32:], 50, 64, 0)


def test_a_request_goes_before_the_settings(models):
    llm, prompt = load(models), prompt_of(40)
    assert len(llm.generate(prompt, context=50).tokens) == 10
    options = {"context": 64, "overflow": "shift", "keep": 7}
    result = llm.generate(prompt, max_tokens=80, **options)
    assert result.tokens == by_fresh_runs(llm, prompt, 80, 64, 7)
    assert llm.context == 1024
    shifting = load(models, context=64, overflow="shift")
    assert len(shifting.generate(prompt, overflow="stop").tokens) == 24
    assert len(shifting.generate(prompt, context=70, overflow="stop").tokens) == 30


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context": 1025}, "context must be at most the model's own context, 1,024; got 1,025"),
        ({"context": 1}, "context must be a whole number, 2 or more; got 1"),
        ({"context": "64"}, "context must be a whole number"),
        ({"overflow": "wrap"}, "overflow must be one of stop, shift; got 'wrap'"),
        ({"keep": -1}, "keep must be a whole number, 0 or more; got -1"),
        ({"overflow": "shift", "keep": 600}, "would keep 600 tokens .* 1,024 allows 512"),
    ],
)
def test_what_a_request_cannot_have_is_said_before_anything_is_computed(models, options, said):
    llm = load(models)
    computed = watch(llm)
    with pytest.raises(UsageError, match=said):
        llm.stream(prompt_of(40), **options)
    assert computed == []


# The head of a prompt.


def test_messages_keep_their_system_prompt(models):
    llm = load(models, context=128, overflow="shift")
    system = {"role": "system", "content": "Be brief."}
    long = [system, *({"role": "user", "content": f"{i} and so on"} for i in range(9))]
    tokens = llm.encode(long)
    head = llm.encode_text(llm.render([system, {"role": "user", "content": "Hm"}]))
    n_kept = n_shared(tokens, head)
    assert llm.tokenizer.decode(tokens[:n_kept]).endswith("Be brief.\nuser\n")
    result = llm.chat(long, max_tokens=100)
    assert result.tokens == by_fresh_runs(llm, tokens, 100, 128, n_kept)
    assert result.stats.shifted_tokens > 0


def test_a_system_prompt_that_leaves_no_room_is_refused(models):
    llm = load(models, context=128, overflow="shift")
    messages = [{"role": "system", "content": "x" * 60}, {"role": "user", "content": "y"}]
    n = len(llm.encode(messages))
    with pytest.raises(UsageError, match=r"would keep \d\d tokens .* 128 allows 64"):
        llm.stream(messages)
    assert len(llm.chat(messages, max_tokens=128 - n).tokens) == 128 - n, "it needs no shift"


def test_the_first_token_of_every_text_is_kept(models, tmp_path):
    llm = mlxkv.load(chat_model(tmp_path / "m"), dtype="float32", context=64, overflow="shift")
    prompt = prompt_of(40)
    llm.tokenizer.bos_token_id = prompt[0]
    assert llm.generate(prompt, max_tokens=60).tokens == by_fresh_runs(llm, prompt, 60, 64, 1)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_conversation_goes_on_behind_its_context_with_its_system_prompt(models, family):
    llm = load(models, family, context=300, overflow="shift")
    talk = llm.conversation("You are a lighthouse.")
    others = [[*talk.messages, {"role": "user", "content": text}] for text in ("Hm", "So")]
    head, other = map(llm.encode, others)
    head = head[: n_shared(head, other)]
    shifted, restored = [], []
    for _ in range(8):
        for stats in turns(talk, "and what then?", max_tokens=40):
            shifted.append(stats.shifted_tokens)
            restored.append(stats.restored_tokens / stats.prompt_tokens)
        tokens = talk._session.tokens
        assert len(tokens) <= 300
        assert tokens[: len(head)] == head
    assert shifted[0] == 0
    assert len(set(shifted)) > 2, "it was shifted more than once"
    # A turn that is not the first behind a shift computes only what is new.
    assert sum(share > 0.6 for share in restored) >= 5
    whole = talk._tokens
    answer = [c.token for c in talk.send("go on", max_tokens=60)]
    prompt = talk._tokens[: -len(answer)]
    assert prompt[: len(whole)] == whole, "the history is whole"
    assert answer == by_fresh_runs(llm, prompt, 60, 300, len(head))


def test_saved_kv_is_kept(models, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXKV_KV", str(tmp_path / "kv"))
    monkeypatch.setenv("MLXKV_KV_DISK", "1GiB")
    with load(models, context=1000, overflow="shift") as llm:
        text = "The weir was built in 1874 of granite from the upper quarry. " * 5
        saved = llm.save_kv("weir", text)
        prompt = [*llm.encode(text), *prompt_of(680)]
        result = llm.generate(prompt[saved.n_tokens :], kv_from="weir", max_tokens=40)
        assert result.tokens == by_fresh_runs(llm, prompt, 40, 1000, saved.n_tokens)
        assert result.stats.shifted_tokens > 0
        with pytest.raises(UsageError, match="would keep 305 tokens"):
            llm.stream("x", kv_from="weir", context=400)


def test_kv_is_saved_within_the_context(models, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXKV_KV", str(tmp_path / "kv"))
    monkeypatch.setenv("MLXKV_KV_DISK", "1GiB")
    with load(models, context=64) as llm, pytest.raises(ContextExceeded, match="64"):
        llm.save_kv("long", prompt_of(64))


# Saying so.


def test_a_chat_says_each_time_that_more_was_dropped(models, capsys):
    llm = load(models, context=256, overflow="shift")
    chat = Chat(LocalSpeaker(llm, "llama", Given()), AnswerOptions(max_tokens=60))
    chat.begin("Be brief.")
    said = []
    for _ in range(5):
        repl.answer(chat, "hello")
        said.append(capsys.readouterr().err.count("the context of 256 tokens was full: the oldest"))
    # A turn is 80 tokens or so, and what is dropped at once 115.
    assert said == [0, 0, 1, 0, 1]
