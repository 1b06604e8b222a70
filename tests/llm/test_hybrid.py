"""A model with layers that keep a state, through the Python API: reuse, batches, names."""

from __future__ import annotations

from pathlib import Path

import pytest

import mlxkv
from mlxkv.base.paths import kv_dir
from mlxkv.errors import CheckpointError
from mlxkv.llm.imported_kv import export, import_file
from mlxkv.llm.llm import LLM
from mlxkv.prefix.layout import WINDOW
from mlxkv.prefix.on_disk.format import PageFile
from mlxkv.saved_kv.registry import KVNames
from mlxkv.store.info import describe
from mlxkv.terminal import plan_text
from tests.generation.test_speculate import Eager
from tests.llm.test_imported_kv import forged, forget, tensors
from tests.support.hybrid import hybrid_chat_model

pytestmark = pytest.mark.usefixtures("kv")
DOCUMENT = "The weir was built in 1874 of granite from the upper quarry, and mended twice. " * 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return hybrid_chat_model(tmp_path_factory.mktemp("models") / "hybrid")


@pytest.fixture
def llm(folder, kv) -> LLM:
    return mlxkv.load(folder)


def turns(llm: LLM, n: int, system: str = DOCUMENT) -> list:
    """A conversation of n turns, the last one's statistics last."""
    messages, found = [{"role": "system", "content": system}], []
    for i in range(n):
        messages.append({"role": "user", "content": f"Question {i}: why?"})
        answer = llm.chat(messages, max_tokens=6, temperature=0)
        messages.append({"role": "assistant", "content": answer.text})
        found.append(answer)
    return found


def test_a_conversation_computes_what_is_new_alone(llm):
    first, *others = turns(llm, 4)
    assert first.stats.restored_tokens == 0
    for before, after in zip([first, *others], others, strict=False):
        new = after.stats.prompt_tokens - before.stats.prompt_tokens
        assert after.stats.computed_tokens <= new + 32


def test_answers_are_those_of_a_model_that_restores_nothing(llm, folder, monkeypatch, tmp_path):
    ours = [answer.text for answer in turns(llm, 3)]
    monkeypatch.setenv("MLXKV_KV", str(tmp_path / "other"))
    messages = [{"role": "system", "content": DOCUMENT}]
    for i, text in enumerate(ours):
        messages.append({"role": "user", "content": f"Question {i}: why?"})
        fresh = mlxkv.load(folder)
        assert fresh.chat(messages, max_tokens=6, temperature=0).text == text
        messages.append({"role": "assistant", "content": text})


def test_another_question_and_another_conversation_share_the_system_prompt(llm):
    turns(llm, 2)
    system = {"role": "system", "content": DOCUMENT}
    other = llm.chat([system, {"role": "user", "content": "And who?"}], max_tokens=2)
    assert other.stats.computed_tokens < 60 < other.stats.restored_tokens


def test_a_restart_goes_on_from_disk(llm):
    first = turns(llm, 2)[-1]
    llm.close()
    again = mlxkv.load(llm.path)
    after = turns(again, 2)[-1]
    assert after.text == first.text
    assert after.stats.computed_tokens <= 64
    assert turns(again, 1)[0].stats.restored_tokens > 600


def test_a_batch_gives_each_prompt_its_own_answer(llm, folder):
    prompts = ["Granite", DOCUMENT[:300], DOCUMENT[100:170], "Who built it?"]
    together = llm.generate(prompts, max_tokens=20, temperature=0)
    alone = [mlxkv.load(folder).generate(p, max_tokens=20, temperature=0) for p in prompts]
    assert [x.text for x in together] == [x.text for x in alone]


def test_a_saved_prefix_is_gone_on_from_and_checked(llm):
    llm.save_kv("weir", DOCUMENT)
    again = mlxkv.load(llm.path)
    answer = again.generate(DOCUMENT + "Who built it?", max_tokens=3, temperature=0)
    assert answer.stats.computed_tokens <= 32
    assert again.verify_kv("weir").passed


@pytest.mark.parametrize("is_forged", (False, True))
def test_an_import_serves_prompts_once_its_state_was_computed(llm, tmp_path, is_forged):
    def changed(page: PageFile) -> PageFile:
        return tensors(lambda x: x * 2, page.start)(page) if page.key.part == WINDOW else page

    llm.save_kv("weir", DOCUMENT)
    export("weir", file := tmp_path / "weir.kv")
    KVNames(kv_dir()).remove("weir")
    forget(llm)
    import_file(forged(file, page=changed) if is_forged else file, model=str(llm.path))
    if is_forged:
        with pytest.raises(CheckpointError, match="is not what this model computes"):
            llm.generate("Who?", max_tokens=2, kv_from="weir")
        return
    assert llm.generate("Who?", max_tokens=2, kv_from="weir").stats.restored_tokens == len(DOCUMENT)
    assert llm.generate(DOCUMENT + "?", max_tokens=2).stats.computed_tokens <= 2


def test_drafts_of_its_next_token_layer_and_of_earlier_text_change_no_answer(llm, tmp_path):
    folder = hybrid_chat_model(tmp_path / "mtp", mtp_num_hidden_layers=1)
    drafted = mlxkv.load(folder, draft="auto", dtype="float32")
    drafted.drafting.costs = Eager()
    n_of_layer = 0
    for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 3}):
        plain = drafted.generate(DOCUMENT, draft="off", max_tokens=40, **options)
        for draft in ("mtp", "auto"):
            found = drafted.generate(DOCUMENT, draft=draft, max_tokens=40, **options)
            assert found.tokens == plain.tokens
            counts = found.stats.drafts
            n_of_layer += counts.by.get("mtp", (0, 0))[0] if counts else 0
    assert n_of_layer > 5


def test_its_memory_is_planned_with_states_of_one_size(folder):
    short, long = (mlxkv.plan(folder, context=n) for n in (256, 4096))
    states = [next(kind for kind in plan.layers if kind.is_state) for plan in (short, long)]
    assert states[0].nbytes == states[1].nbytes > 0
    assert states[0].n_layers == 2
    assert "in 1 layer, full" in (shown := plan_text.text(long)) and "windows" not in shown
    assert long.kv_bytes - states[0].nbytes == 16 * (short.kv_bytes - states[0].nbytes)


def test_its_card_shows_states_and_drafts(folder):
    card = describe("hybrid", folder)
    assert (card.kv.n_full_layers, card.kv.n_state_layers) == (1, 2)
    assert card.kv.state_bytes == 2 * 4 * (160 * 3 + 4 * 16 * 24)
    assert str(card.settings.draft) == "lookup (default)"
    assert "plus the states" in card.text()
