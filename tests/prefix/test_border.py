"""What a model and its adapters share below the first layer that differs, bit for bit.

Prompts share two pages and are computed in chunks of a page, so that a run without pages computes
every token in the same chunk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxkv
from mlxkv.base.stepwise import finished
from mlxkv.cache import make_caches
from mlxkv.checkpoint.adapter import first_layer
from mlxkv.engine.adapter_pool import layers_to_cut
from mlxkv.generation.session import Session
from mlxkv.kv.types import STEP
from mlxkv.llm.llm import LLM
from mlxkv.prefix.border import StreamPages
from mlxkv.server.results import details
from mlxkv.store.adapter_names import add
from mlxkv.store.adapters import AdapterRef
from mlxkv.terminal.stats_text import describe_prompt
from tests.families.test_parity import Golden
from tests.models.test_adapters import mlx_lm
from tests.support.command_line import chat_model
from tests.support.tiny import GEMMA, LLAMA
from tests.support.tiny import tokens as random_tokens

DOCUMENT = random_tokens(2 * STEP)
LAYERS = 4
CONFIGS = {
    "llama": {},
    # Layers 1 and 3 have a full window, 0 and 2 slide.
    "gemma3": {"sliding_window_pattern": 2, "sliding_window": 100},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("border")
    for name, config in CONFIGS.items():
        chat_model(root / name, family=name, num_hidden_layers=LAYERS, **config)
    return lambda name: root / name


@pytest.fixture
def load(checkpoints, tmp_path, monkeypatch) -> Iterator[Callable[..., LLM]]:
    monkeypatch.setenv("MLXKV_KV", str(tmp_path / "kv"))
    monkeypatch.setenv("MLXKV_KV_DISK", "1GiB")
    opened: list[LLM] = []

    def load(name: str = "llama", **options) -> LLM:
        opened.append(mlxkv.load(checkpoints(name), dtype="float32", **options))
        return opened[-1]

    yield load
    for llm in opened:
        llm.close()


@pytest.fixture
def adapter(tmp_path) -> Callable[..., tuple[str]]:
    """(first layer, number) -> an adapter of the layers from there on."""

    def adapter(first: int, number: int = 0, name: str = "llama") -> tuple[str]:
        config = {"llama": LLAMA, "gemma3": GEMMA}[name]
        E, hidden = config["hidden_size"], config["intermediate_size"]
        paths = [f"model.layers.{i}.mlp.down_proj" for i in range(first, LAYERS)]
        folder = tmp_path / f"{name}-{first}-{number}"
        if not folder.exists():
            mlx_lm(folder, dict.fromkeys(paths, (hidden, E)), scale=1.0 + number)
        return (str(folder),)

    return adapter


def prompt(question: int, n: int = 40) -> list[int]:
    """The document and a question, which begins like no other."""
    return [*DOCUMENT, 3 + question, *random_tokens(n - 1, seed=question)]


def following(session: Session, logits: mx.array) -> list[np.ndarray]:
    found = [np.array(logits)]
    for token in (5, 9):
        found.append(np.array(session.model.last_logits(mx.array([[token]]), session.caches)))
    return found


def ask(
    llm: LLM, tokens: list[int], adapter: tuple[str, ...] = (), owner: str = ""
) -> tuple[int, int]:
    """Tokens of a prompt that were restored, and of which only the upper layers were computed;
    what follows is that of a run without pages."""
    session = llm.session(owner, adapter)
    n = session.restore(tokens).n_tokens
    logits = session.prefill(tokens, chunk=STEP)
    mx.eval(logits)
    session.finish()
    alone = Session(session.model, llm.kv_type)
    expected = following(alone, alone.prefill(tokens, chunk=STEP))
    for ours, theirs in zip(following(session, logits), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    return n, session.n_lifted


@pytest.mark.parametrize("kv_type", ["native", "q8"])
def test_a_switch_of_adapter_computes_the_upper_layers_alone(load, adapter, kv_type):
    llm = load(kv_type=kv_type)
    assert ask(llm, prompt(0), adapter(2)) == (0, 0)  # the first, from which the border is known
    assert ask(llm, prompt(1)) == (0, 512)  # the base behind an adapter
    assert ask(llm, prompt(2), adapter(2, 1)) == (0, 512)
    assert ask(llm, prompt(3), adapter(3)) == (0, 512)  # one that changes less
    for i, given in enumerate(((), adapter(2), adapter(2, 1), adapter(3))):
        assert ask(llm, prompt(4 + i), given) == (512, 0)


def test_an_owner_whose_first_request_is_of_the_base_shares_its_lower_layers(load, adapter):
    llm = load()
    ask(llm, prompt(0), adapter(2))
    assert ask(llm, prompt(1), owner="another") == (0, 0)  # sees nothing of the first owner's
    assert ask(llm, prompt(2), adapter(2), owner="another") == (0, 512)


def test_adapters_with_other_borders_move_it_down(load, adapter):
    llm = load()
    ask(llm, prompt(0), adapter(3))
    assert ask(llm, prompt(1)) == (0, 512)
    ask(llm, prompt(2), adapter(1))
    assert llm.adapted.border == 1
    assert ask(llm, prompt(3), adapter(3)) == (0, 512)  # it has moved, and gone on from the other
    assert ask(llm, prompt(4), adapter(0)) == (0, 0)  # it changes all layers
    assert llm.adapted.border == 1
    assert ask(llm, prompt(5), adapter(2)) == (0, 512)


def test_a_lift_that_has_to_start_over_keeps_its_reservation(load, adapter, monkeypatch):
    """Behind a page of the stream that cannot be read; the windows below do not go back."""
    llm, tokens = load("gemma3"), prompt(1)
    ask(llm, prompt(0), adapter(2, 0, "gemma3"))
    rows = StreamPages.rows
    monkeypatch.setattr(StreamPages, "rows", lambda *x: rows(*x) if x[2] < STEP else None)
    session = llm.session(adapter=adapter(2, 1, "gemma3"))
    session.restore(tokens)
    steps = session.prefilling(tokens, lambda: STEP)
    reserved = [llm.budget._accounts[session].n_admitted for _ in range(2) if next(steps)]
    assert reserved == [len(tokens)] * 2 and session.n_held == STEP


def test_windows_are_restored_at_the_border(load, adapter):
    """The base's pages have the rows of all windows, which those below have overwritten."""
    llm, given = load("gemma3"), [adapter(2, i, "gemma3") for i in range(3)]
    ask(llm, prompt(0), given[0])
    assert ask(llm, prompt(1), given[1]) == (0, 512)
    assert ask(llm, prompt(2)) == (0, 512)
    assert ask(llm, prompt(3), given[2]) == (0, 512)
    for i, each in enumerate(((), *given)):
        assert ask(llm, prompt(4 + i), each) == (512, 0)


def test_a_switch_after_a_restart_reads_the_pages_from_disk(load, adapter):
    llm = load()
    ask(llm, prompt(0), adapter(2))
    ask(llm, prompt(1), adapter(2, 1))
    llm.close()
    llm = load()
    llm.session(adapter=adapter(2))  # from which the border is known
    assert ask(llm, prompt(2)) == (0, 512)
    assert ask(llm, prompt(3), adapter(2, 1)) == (512, 0)
    assert ask(llm, prompt(4), adapter(2, 2)) == (0, 512)
    llm.close()
    llm = load()
    llm.session(adapter=adapter(2))
    assert ask(llm, prompt(5)) == (512, 0)
    assert ask(llm, prompt(6), adapter(2, 2)) == (512, 0)
    assert ask(llm, prompt(7), adapter(2, 3)) == (0, 512)


def test_ten_adapters_keep_the_lower_layers_once(load, adapter):
    """Also where an adapter comes first: the base's pages take the place of those below it."""
    llm, n, n_rest = load(), len(DOCUMENT), 40
    for i in range(10):
        ask(llm, prompt(i, n_rest), adapter(3, i))
        if i == 5:
            assert ask(llm, prompt(99, n_rest)) == (0, n)
    of_kv = 2 * 2 * 16 * 4  # a layer's bytes a token: two heads of 16 values
    below, above = (LAYERS - 1) * (n + 11 * n_rest), n + n_rest + 10 * (n + n_rest)
    of_stream = 64 * 4 * (n + 11 * n_rest)
    assert llm.pages_bytes(None) == of_kv * (below + above) + of_stream
    rooms = {pages.weight: pages.room.budget_bytes for pages in llm._pages.values() if pages}
    assert sorted(rooms) == [1 / LAYERS, 1 - 1 / LAYERS, 1]  # the stream is as large as a layer
    assert rooms[1] == pytest.approx(LAYERS * rooms[1 / LAYERS], abs=LAYERS)


@pytest.mark.parametrize("what", ["given up", "looked at", "page lost"])
def test_an_interrupted_switch_goes_on_from_what_all_layers_hold(load, adapter, what):
    llm = load()
    ask(llm, prompt(0), adapter(2))
    session, tokens = llm.session(adapter=adapter(2, 1)), prompt(1)
    session.restore(tokens)
    steps = session.prefilling(tokens, lambda: STEP)
    assert next(steps) == (STEP, len(tokens))
    if what == "page lost":
        llm._borders["", 2].stream.clear()
    elif what == "looked at":
        assert session.tokens == tokens[:STEP]
    else:
        steps.close()
        session.finish()
        assert ask(llm, prompt(2), adapter(2, 1)) == (STEP, STEP)
        return
    logits = finished(steps)
    assert (session.n_held, session.n_lifted) == (len(tokens), STEP)
    alone = Session(session.model)
    np.testing.assert_array_equal(logits, alone.prefill(tokens, chunk=STEP))
    session.finish()
    assert ask(llm, prompt(2), adapter(2, 1)) == (2 * STEP, 0)


CUT = ("llama-gqa", "mistral-sliding", "gemma2-text", "gemma3-text", "glm4-moe-lite-plain",
       "gpt-oss-plain", "qwen3-plain")  # fmt: skip
WHOLE = ("gemma3n-text", "gemma4-moe", "qwen3-next-plain", "llama-longrope-long")


@pytest.mark.parametrize("name", [*CUT, *WHOLE])
def test_layers_are_cut_where_one_needs_its_input_alone(tmp_path, name):
    """In two pieces they compute what they do in one, bit for bit."""
    model = mlxkv.load_model(Golden.read(name).write(tmp_path / name, "new"), dtype=mx.float32)
    n_layers = layers_to_cut(model)
    assert n_layers == (len(model.cache_specs()) if name in CUT else 0)
    if n_layers:
        whole, cut, tokens = make_caches(model), make_caches(model), mx.array([DOCUMENT[:60]])
        for chunk in (tokens[:, :40], tokens[:, 40:]):
            expected = model.hidden_states(chunk, whole)
            x = model.below(model.embed(chunk), cut, n_layers - 1)
            np.testing.assert_array_equal(model.above(x, cut, n_layers - 1), expected)


def test_the_border_of_adapters_that_are_kept_is_known_from_the_start(
    load, adapter, checkpoints, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLXKV_MODELS", str(tmp_path / "models"))
    for first in (3, 2, 0):
        folder = Path(adapter(first)[0])
        config = json.loads((folder / "adapter_config.json").read_text())
        config["model"] = "org/llama" if first != 2 else "org/other"
        (folder / "adapter_config.json").write_text(json.dumps(config))
        add(f"of-{first}", AdapterRef(folder))
    llm = load()
    assert llm.adapted.border == 3
    ask(llm, prompt(0))
    assert ask(llm, prompt(1), adapter(3)) == (0, 512)


def test_changes_of_the_head_reach_the_last_layer_and_of_the_embedding_the_first():
    head, layer = "lm_head", "base_model.model.model.layers.5.mlp.up_proj.lora_A.weight"
    assert first_layer([head, f"base_model.model.{head}.lora_A.weight"], 8) == 7
    assert first_layer([head, layer, "language_model.model.layers.6.self_attn.q_proj"], 8) == 5
    assert first_layer([layer, "model.embed_tokens"], 8) == 0


def test_an_answer_says_how_much_was_computed_in_the_upper_layers_alone(load, adapter):
    llm = load()
    for given, n_upper in ((adapter(2), 0), (None, 552), (adapter(2, 1), 552)):
        stats = llm.generate(prompt(0, 41), adapter=given, max_tokens=2).stats
        assert (stats.computed_tokens, stats.upper_tokens) == (553, n_upper)
        assert ("in the adapter's layers alone" in describe_prompt(stats)) == (n_upper > 0)
        assert details(stats).get("upper_tokens", 0) == n_upper
