"""What a model and its adapters share below the first layer that differs, bit for bit.

Prompts share two pages and are computed in chunks of a page, so that a run without pages computes
every token in the same chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxkv
from mlxkv.generation.session import Session
from mlxkv.kv.types import STEP
from mlxkv.llm.llm import LLM
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


def ask(llm: LLM, tokens: list[int], adapter: tuple[str, ...] = ()) -> tuple[int, int]:
    """Tokens of a prompt that were restored, and of which only the upper layers were computed;
    what follows is that of a run without pages."""
    session = llm.session(adapter=adapter)
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


def test_windows_are_restored_at_the_border(load, adapter):
    """The base's pages need the rows of all windows, which those below have overwritten."""
    llm, given = load("gemma3"), [adapter(2, i, "gemma3") for i in range(3)]
    ask(llm, prompt(0), given[0])
    assert ask(llm, prompt(1), given[1]) == (0, 512)
    assert ask(llm, prompt(2)) == (0, 0)
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
