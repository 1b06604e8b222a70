"""Prefixes are computed once: through the Python API, between conversations and processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import mlxkv
from mlxkv.errors import CheckpointError, ModelNotFound, OutputError, UsageError
from mlxkv.generation.outputs import Stats
from mlxkv.kv.types import STEP
from mlxkv.llm.llm import LLM
from mlxkv.saved_kv.registry import KVNames
from tests.support.command_line import chat_model

DOCUMENT = "The weir was built in 1874 of granite from the upper quarry, and mended twice. " * 12
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'][:4] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


pytestmark = pytest.mark.usefixtures("kv")


@pytest.fixture(scope="module")
def folder(reused) -> Path:
    chat_model(reused / "rewriting", family="gemma3", template=REWRITING)
    return reused


@pytest.fixture
def llm(either) -> LLM:
    return either


def restored(stats: Stats) -> tuple[int, int]:
    assert stats.restored_ram_tokens + stats.restored_ssd_tokens == stats.restored_tokens
    assert stats.restored_tokens + stats.computed_tokens == stats.prompt_tokens
    return stats.restored_ram_tokens, stats.restored_ssd_tokens


def reload(llm: LLM) -> LLM:
    """The same model in what might be another process."""
    llm.close()
    return mlxkv.load(llm.path)


# Between requests.


def test_another_question_about_a_document_computes_the_question(llm):
    first = llm.generate(DOCUMENT + "Who built it?", max_tokens=3)
    second = llm.generate(DOCUMENT + "When was that?", max_tokens=3)
    assert restored(first.stats) == (0, 0)
    assert restored(second.stats) == (len(DOCUMENT) + len("Wh"), 0)


def test_an_answer_from_pages_is_the_answer_without_them(llm):
    prompts = [DOCUMENT + "Who?", DOCUMENT + "When?", DOCUMENT[:700] + "!" + DOCUMENT[700:]]
    expected = [mlxkv.load(llm.path).generate(prompt, max_tokens=12).tokens for prompt in prompts]
    for _ in range(2):
        assert [llm.generate(p, max_tokens=12).tokens for p in prompts] == expected


def test_an_agent_that_resends_its_history_computes_what_is_new(llm):
    tokens = llm.encode(DOCUMENT[:400])
    for turn in range(12):
        result = llm.generate(tokens, max_tokens=9)
        if turn:
            # All but the tokens behind the tip: the new ones, and the last of the answer.
            assert restored(result.stats) == (len(tokens) - 91, 0)
            assert result.stats.miss is None
        tokens = [*tokens, *result.tokens, *llm.encode(f"{turn:03}" + DOCUMENT[:87])]


def test_what_a_cancelled_answer_computed_is_kept(llm):
    chunks = llm.stream(DOCUMENT, max_tokens=50)
    answer = [next(chunks).token for _ in range(10)]
    chunks.close()
    tokens = [*llm.encode(DOCUMENT), *answer]
    assert restored(llm.generate([*tokens, 5], max_tokens=1).stats)[0] >= len(tokens) - 1


def test_the_same_prompt_again_computes_its_last_token(llm):
    llm.generate(DOCUMENT, max_tokens=2)
    assert llm.generate(DOCUMENT, max_tokens=2).stats.computed_tokens == 1


def test_conversations_share_their_system_prompt(llm):
    for n, text in enumerate(("hello", "good morning")):
        talk = llm.conversation(system=DOCUMENT)
        *_, last = talk.send(text, max_tokens=3)
        assert (restored(last.stats)[0] > len(DOCUMENT) - STEP) is (n == 1)


def test_a_template_that_rewrites_a_turn_costs_that_turn_and_not_the_conversation(folder):
    llm = mlxkv.load(folder / "rewriting")
    talk = llm.conversation(system=DOCUMENT[:700])
    for turn, text in enumerate(("one", "two", "three", "four")):
        *_, last = talk.send(text, max_tokens=30)
        if turn:
            assert last.stats.computed_tokens < STEP + 60
            assert last.stats.restored_tokens >= 512
    assert talk.append_only is False


# A miss explains itself.


def test_a_miss_says_where_and_what_and_how_much(llm):
    llm.generate(DOCUMENT, max_tokens=1)
    at = DOCUMENT.index("granite", 500)
    edited = DOCUMENT[:at] + "marble!" + DOCUMENT[at + 7 :]
    stats = llm.generate(edited, max_tokens=1).stats
    miss = stats.miss
    assert miss is not None
    assert (miss.reason, miss.token) == ("diverged", at)
    assert (miss.held, miss.prompt) == (" in 1874 of |granite from", " in 1874 of |marble! from")
    assert miss.n_tokens == len(edited) - 1 - at
    assert 0 < miss.cost_s <= stats.prefill_s
    assert stats.diverged_at == at


def test_noise_at_the_head_of_a_prompt_is_named(llm):
    llm.generate("session 4711. " + DOCUMENT, max_tokens=1)
    stats = llm.generate("session 4712. " + DOCUMENT, max_tokens=1).stats
    assert stats.restored_tokens == 0
    assert stats.miss is not None
    assert (stats.miss.token, stats.miss.prompt[:15]) == (11, "session 471|2. ")


def test_what_was_given_up_for_memory_is_said(folder):
    llm = mlxkv.load(folder / "gemma3")
    llm.generate(DOCUMENT, max_tokens=1)
    assert llm.pages is not None
    # Room for the tip's window parts and not for those of the middle.
    llm.pages.room.budget_bytes = llm.pages.nbytes * 6 // 10
    llm.generate("x", max_tokens=1)
    stats = llm.generate(DOCUMENT[:500], max_tokens=1).stats
    assert stats.restored_tokens == 0
    assert stats.miss is not None
    assert (stats.miss.reason, stats.miss.token, stats.miss.n_tokens) == ("dropped", 0, 499)


def test_a_prompt_with_nothing_in_common_is_no_miss(llm):
    llm.generate(DOCUMENT, max_tokens=1)
    stats = llm.generate("Zebras.", max_tokens=1).stats
    assert (stats.miss, stats.diverged_at) == (None, None)


# After a restart.


def test_a_restart_reads_the_conversation_from_disk(llm):
    first = llm.generate(DOCUMENT, max_tokens=20)
    tokens = [*llm.encode(DOCUMENT), *first.tokens, 7]
    again = reload(llm)
    stats = again.generate(tokens, max_tokens=3).stats
    assert restored(stats) == (0, len(tokens) - 2)
    assert restored(again.generate(tokens, max_tokens=3).stats) == (len(tokens) - 1, 0)


def test_a_damaged_file_is_computed_again(llm, kv):
    expected = llm.generate(DOCUMENT, max_tokens=8).tokens
    llm = reload(llm)
    files = sorted(kv.glob("pages/*/*.safetensors"))
    assert files
    for file in files[::2]:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    result = llm.generate(DOCUMENT, max_tokens=8)
    assert result.tokens == expected
    assert result.stats.restored_tokens < 512


def test_another_dtype_or_other_weights_find_nothing(folder, kv, tmp_path):
    mlxkv.load(folder / "llama").generate(DOCUMENT, max_tokens=1)
    with mlxkv.load(folder / "llama") as llm:
        llm.generate(DOCUMENT, max_tokens=1)
    half = mlxkv.load(folder / "llama", dtype="float16")
    assert half.generate(DOCUMENT, max_tokens=1).stats.restored_tokens == 0
    other = chat_model(tmp_path / "other", family="llama", rope_theta=20000.0)
    assert mlxkv.load(other).generate(DOCUMENT, max_tokens=1).stats.restored_tokens == 0


def test_kv_on_disk_can_be_switched_off(llm, kv, monkeypatch):
    monkeypatch.setenv("MLXKV_KV_DISK", "0")
    llm.generate(DOCUMENT, max_tokens=1)
    stats = reload(llm).generate(DOCUMENT, max_tokens=1).stats
    assert stats.restored_tokens == 0
    assert not kv.exists()


def test_a_process_that_ends_has_written_its_pages(folder, kv):
    code = (
        "import sys, mlxkv; llm = mlxkv.load(sys.argv[1]); "
        "print(llm.generate(sys.argv[2], max_tokens=2).stats.restored_ssd_tokens)"
    )
    command = [sys.executable, "-c", code, str(folder / "gemma3"), DOCUMENT]
    printed = [
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        for _ in range(2)
    ]
    assert [int(text) for text in printed] == [0, len(DOCUMENT) - 1]


def test_short_prompts_touch_no_disk(llm, kv):
    llm.generate("hello", max_tokens=5)
    llm.close()
    assert not kv.exists()


# Named KV.


def test_many_answers_start_from_saved_text(llm):
    saved = llm.save_kv("weir", DOCUMENT)
    assert (saved.n_tokens, saved.messages) == (len(DOCUMENT), None)
    llm = reload(llm)
    stats = llm.generate(" Who?", kv_from="weir", max_tokens=3).stats
    assert restored(stats) == (0, len(DOCUMENT))
    assert stats.prompt_tokens == len(DOCUMENT) + 5
    result = llm.generate(" When?", kv_from="weir", max_tokens=6)
    assert restored(result.stats) == (len(DOCUMENT + " Wh"), 0)
    assert result.tokens == mlxkv.load(llm.path).generate(DOCUMENT + " When?", max_tokens=6).tokens


def test_many_chats_start_from_saved_messages(llm):
    saved = llm.save_kv("weir", [{"role": "system", "content": DOCUMENT}])
    assert saved.text.startswith(f"<|im_start|>system\n{DOCUMENT}<|im_end|>\n<|im_start|>user")
    llm = reload(llm)
    for n, question in enumerate(("Was it?", "Is it?")):
        ask = [{"role": "user", "content": question}]
        result = llm.chat(ask, kv_from="weir", max_tokens=5)
        assert restored(result.stats) == ((0, saved.n_tokens), (saved.n_tokens, 0))[n]
        whole = [{"role": "system", "content": DOCUMENT}, *ask]
        assert result.tokens == mlxkv.load(llm.path).chat(whole, max_tokens=5).tokens


def test_a_conversation_starts_from_saved_messages(llm):
    saved = llm.save_kv("weir", [{"role": "system", "content": DOCUMENT}])
    talk = llm.conversation(kv_from="weir")
    *_, first = talk.send("Who?", max_tokens=4)
    *_, second = talk.send("When?", max_tokens=4)
    assert first.stats.restored_tokens == saved.n_tokens
    assert second.stats.restored_tokens == first.stats.prompt_tokens + 3
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user",
                                                  "assistant"]  # fmt: skip


def test_a_system_prompt_goes_below_the_saved_one(llm):
    llm.save_kv("weir", [{"role": "system", "content": DOCUMENT}])
    talk = llm.conversation(system="Be brief.", kv_from="weir")
    assert talk.messages == [{"role": "system", "content": f"{DOCUMENT}\n\nBe brief."}]
    *_, last = talk.send("Who?", max_tokens=2)
    assert last.stats.restored_tokens >= len(DOCUMENT) // STEP * STEP


def test_a_name_is_for_its_model_alone(folder, tmp_path):
    mlxkv.load(folder / "llama").save_kv("weir", DOCUMENT)
    with pytest.raises(UsageError, match=r"weir is KV of /.*/llama "):
        mlxkv.load(folder / "gemma3").generate("Who?", kv_from="weir")


def test_messages_do_not_go_on_from_a_text(llm):
    llm.save_kv("weir", DOCUMENT)
    with pytest.raises(UsageError, match="is a saved text"):
        llm.chat([{"role": "user", "content": "Who?"}], kv_from="weir")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 300])
def test_a_bad_name_is_refused_before_anything_is_computed(llm, name):
    calls = []
    with pytest.raises(UsageError, match="name"):
        llm.save_kv(name, DOCUMENT, on_progress=lambda done, total: calls.append(done))
    assert not calls


def test_a_name_spelled_in_other_case_is_refused_before_anything_is_computed(llm):
    llm.save_kv("weir", DOCUMENT)
    calls = []
    with pytest.raises(UsageError, match="differs from the saved 'weir' in case only"):
        llm.save_kv("Weir", DOCUMENT, on_progress=lambda done, total: calls.append(done))
    assert not calls


def test_an_unknown_name_is_refused(llm):
    with pytest.raises((UsageError, ModelNotFound), match="nothing-here"):
        llm.generate("Who?", kv_from="nothing-here")


def test_saving_again_replaces_and_keeps_the_pin(llm, kv):
    llm.save_kv("weir", DOCUMENT)
    KVNames(kv).pin("weir")
    llm.save_kv("weir", DOCUMENT + "More.")
    assert KVNames(kv).load("weir").pinned
    assert KVNames(kv).load("weir").n_tokens == len(DOCUMENT) + 5


def test_a_pinned_name_stays_in_ram_too(llm, kv):
    llm.save_kv("weir", DOCUMENT)
    KVNames(kv).pin("weir")
    llm = reload(llm)
    llm.generate(" Who?", kv_from="weir", max_tokens=1)
    assert llm.pages is not None
    llm.pages.room.budget_bytes = 0
    llm.generate("y" * 900, max_tokens=1)
    stats = llm.generate(" Why?", kv_from="weir", max_tokens=1).stats
    assert restored(stats)[0] >= len(DOCUMENT)


def test_what_does_not_fit_the_disk_is_said(llm, monkeypatch):
    monkeypatch.setenv("MLXKV_KV_DISK", "100KB")
    with pytest.raises(OutputError, match="does not fit"):
        llm.save_kv("weir", DOCUMENT)


def test_saving_needs_the_disk(llm, monkeypatch):
    monkeypatch.setenv("MLXKV_KV_DISK", "0")
    with pytest.raises(UsageError, match="MLXKV_KV_DISK"):
        llm.save_kv("weir", DOCUMENT)


def test_saving_more_than_ram_may_hold_goes_through_to_disk(llm):
    assert llm.pages is not None
    n_window = len(llm.pages.kinds.window)
    llm.pages.room.budget_bytes = 2 * STEP * 400 * (2 if n_window else 1)
    saved = llm.save_kv("weir", DOCUMENT * 3)
    stats = reload(llm).generate("!", kv_from="weir", max_tokens=1).stats
    assert restored(stats) == (0, saved.n_tokens)


def test_lost_files_of_a_name_are_computed_again(llm, kv):
    llm.save_kv("weir", DOCUMENT)
    expected = llm.generate("?", kv_from="weir", max_tokens=6).tokens
    llm = reload(llm)
    for file in sorted(kv.glob("pages/*/*.safetensors"))[::2]:
        file.unlink()
    result = llm.generate("?", kv_from="weir", max_tokens=6)
    assert result.tokens == expected
    assert result.stats.restored_tokens < len(DOCUMENT)


def test_a_damaged_manifest_is_one_error(llm, kv):
    llm.save_kv("weir", DOCUMENT)
    (kv / "names" / "weir.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(CheckpointError, match="mlxkv kv rm weir"):
        llm.generate("?", kv_from="weir")
