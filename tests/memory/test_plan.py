"""A plan holds: weights and KV to the byte, MLX's peak memory to 5%, on every family."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlxkv
from mlxkv.base import device
from mlxkv.base.units import parse_bytes
from mlxkv.errors import UsageError
from mlxkv.generation.decoder import Row, decode
from mlxkv.generation.session import Session
from mlxkv.kv.types import KV_TYPES
from mlxkv.llm.plan import plan
from mlxkv.memory import needs
from mlxkv.memory.needs import Needs
from mlxkv.memory.trace import hollow
from mlxkv.models.loader import lay_out
from mlxkv.nn.model import CausalLM
from mlxkv.prefix.open import open_pages
from mlxkv.sampling.params import SamplingParams
from mlxkv.sampling.sampler import Sampler
from mlxkv.terminal import plan_text
from tests.families.oracle.cases import CASES, LONG, Case
from tests.families.test_parity import Golden
from tests.support.tiny import gemma3_config, llama_config, tokens, write_checkpoint

FAMILIES = [case for case in CASES if case.n_prompt == LONG and not case.prefill_in_one]
every_family = pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
totals_alone = pytest.mark.usefixtures("totals_alone")
LENGTHS = ((1100, 256), (700, 128))
N_DECODED = 6
TIMES = 256
TOLERANCE = 0.05
"""What a plan promises. How many operations wait for the device varies from run to run, which shows
in models whose weights are smaller than one step's scores: the largest of five runs counts."""


@pytest.fixture(scope="module")
def folder(families) -> Path:
    return families


@functools.cache
def checkpoint(folder: Path, case: Case) -> Path:
    """A tiny model of the family with a vocabulary that gives its weights some size."""
    golden = Golden.read(case.name)
    config, weights = golden.config("new"), golden.weights()
    for part in (config, config.get("text_config", {})):
        if "vocab_size" in part:
            n_vocab, part["vocab_size"] = part["vocab_size"], TIMES * part["vocab_size"]
    for name, array in weights.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")) and len(array) == n_vocab:
            weights[name] = np.tile(array, (TIMES, 1))
    return write_checkpoint(folder / case.name, config, weights)


@functools.cache
def loaded(path: Path) -> CausalLM:
    return mlxkv.load_model(path, dtype=mx.float32)


def weights_of(model: CausalLM) -> int:
    return sum(x.nbytes for _, x in tree_flatten(model.parameters()))


def peak_of(session: Session, n_prompt: int, chunk: int) -> int:
    """MLX's peak above what is there before, over prefill, decode and the end of a sequence."""
    mx.clear_cache()
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    prompt = tokens(n_prompt)
    logits = session.prefill(prompt, chunk=chunk)
    sampler = Sampler(SamplingParams(), logits.shape[-1])
    for _ in decode(Row(session, logits, sampler, N_DECODED)):
        pass
    session.finish()
    mx.synchronize()
    return mx.get_peak_memory() - before


def meets(
    expected: int, run: Callable[..., int], *arguments: object, tolerance: float = TOLERANCE
) -> bool:
    """Whether the largest of a few runs is what was expected."""
    largest = 0
    for _ in range(60):  # on a busy machine fewer of MLX's tasks are in flight
        largest = max(largest, run(*arguments))
        if expected == pytest.approx(largest, rel=tolerance):
            return True
    print(f"expected {expected:,}, got {largest:,}")
    return False


@totals_alone
@every_family
def test_weights_and_kv_are_met_to_the_byte(case, folder):
    path = checkpoint(folder, case)
    model = loaded(path)
    # q4 is q8 with other widths; k8v4 keeps keys and values apart, and here not in every layer.
    for kv_type in ("native", "q8", "k8v4,0=native")[: 2 + (FAMILIES.index(case) % 4 == 0)]:
        needs = plan(path, context=300 + 1, kv_type=kv_type, dtype="float32")
        session = Session(model, kv_type)
        logits = session.prefill(tokens(300))
        list(decode(Row(session, logits, Sampler(SamplingParams(), logits.shape[-1]), 3)))
        assert needs.kv_bytes == session.nbytes
        assert needs.kv_bytes == sum(kind.nbytes for kind in needs.layers)
        assert needs.weights_bytes == weights_of(model)


@totals_alone
@every_family
def test_the_peak_is_met_over_lengths_and_chunks(case, folder):
    path = checkpoint(folder, case)
    model = loaded(path)

    def run(n: int, chunk: int) -> int:
        return weights_of(model) + peak_of(Session(model), n, chunk)

    for n, chunk in LENGTHS:
        needs = plan(path, context=n + N_DECODED, chunk=chunk, dtype="float32")
        assert meets(needs.total_bytes, run, n, chunk), (n, chunk)


@totals_alone
@pytest.mark.parametrize("case", FAMILIES[::4], ids=lambda case: case.name)
def test_the_peak_is_met_with_prefix_pages(case, folder):
    path = checkpoint(folder, case)
    model = loaded(path)

    def run(n: int, chunk: int, pages_bytes: int) -> int:
        pages = open_pages(model, path, "native", 2**30)
        assert pages is not None
        peak = weights_of(model) + peak_of(Session(model, pages=pages), n, chunk)
        assert pages_bytes == pytest.approx(pages.nbytes, rel=0.01)
        return peak

    for n, chunk in LENGTHS:
        needs = plan(path, context=n + N_DECODED, chunk=chunk, dtype="float32")
        assert meets(needs.peak_bytes, run, n, chunk, needs.pages_bytes), (n, chunk)


@totals_alone
@pytest.mark.parametrize("kv_type", ["q8", "q4"])
def test_the_peak_is_met_with_packed_kv(kv_type, folder):
    case = next(case for case in FAMILIES if case.name == "gemma3-wide")
    path = checkpoint(folder, case)
    model = loaded(path)

    def run(n: int, chunk: int) -> int:
        return weights_of(model) + peak_of(Session(model, kv_type), n, chunk)

    # A layer that a GPU unpacks whole is counted until its last task is done, which comes earlier.
    tolerance = TOLERANCE if device.on_cpu() else 0.08
    for n, chunk in LENGTHS:
        needs = plan(path, context=n + N_DECODED, chunk=chunk, kv_type=kv_type, dtype="float32")
        assert meets(needs.total_bytes, run, n, chunk, tolerance=tolerance), (n, chunk)


@totals_alone
@every_family
def test_planning_allocates_nothing(case, folder):
    path = checkpoint(folder, case)
    mx.clear_cache()
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    plan(path, context=8192, dtype="float32")
    assert mx.get_peak_memory() - before < 300_000  # rotary periods and the like


def test_the_longest_context_is_the_last_that_fits(folder):
    path = checkpoint(folder, FAMILIES[0])
    first = plan(path, context=4096)
    limit = first.total_bytes
    for kv_type, longest in plan(path, context=4096, memory=limit).max_contexts.items():
        there = plan(path, context=longest, kv_type=kv_type, memory=limit)
        beyond = plan(path, context=longest + 256, kv_type=kv_type, memory=limit)
        # The workspace is extrapolated from 4,096 tokens.
        assert there.total_bytes <= 1.05 * limit
        assert beyond.total_bytes > 0.95 * limit


def test_a_model_that_does_not_fit_has_no_context(folder):
    needs = plan(checkpoint(folder, FAMILIES[0]), memory="100KB")
    assert not needs.fits
    assert needs.max_context == 0


def test_sequences_multiply_the_kv_alone(folder):
    path = checkpoint(folder, FAMILIES[0])
    one, four = plan(path, context=600), plan(path, context=600, sequences=4)
    assert four.kv_bytes == 4 * one.kv_bytes
    assert four.workspace_bytes == one.workspace_bytes
    assert four.max_context < one.max_context


def test_the_formula_gives_the_kv_bytes(folder):
    needs = plan(checkpoint(folder, FAMILIES[4]), context=2000, sequences=3)
    product, _, result = needs.formula.partition(" = ")
    expression = product.replace(",", "").replace(" B", "").replace(" x ", " * ")
    assert eval(expression) == int(result.removesuffix(" B").replace(",", "")) == needs.kv_bytes


WINDOWS = (None, 1, 3585, 8192)
CHUNKS = (1, 300, 2048)


@functools.cache
def windowed(folder: Path, window: int | None) -> Path:
    """Two layers: a full one behind one with a window, or two full ones."""
    if window is None:
        config = llama_config(num_hidden_layers=2)
    else:
        config = gemma3_config(num_hidden_layers=2, sliding_window_pattern=2, sliding_window=window)
    return write_checkpoint(folder / f"window {window}", config)


@pytest.mark.parametrize(("window", "chunk"), [*itertools.product(WINDOWS, CHUNKS), (8192, 16384)])
def test_every_chunk_window_and_format_plans(window, chunk, folder):
    """A plan of one format has the longest context and the curve of all of them."""
    needs = plan(
        windowed(folder, window), context=20_000, kv_type="q4", chunk=chunk, memory="16GiB"
    )
    assert needs.workspace_bytes > 0
    native, *packed = (needs.max_contexts[kv_type] for kv_type in KV_TYPES)
    # On a GPU's branches a step of k8v4 holds less beside its KV than one of q4.
    assert 20_000 < min(native, *packed) and packed[0] == min(packed)
    if device.on_cpu():  # a GPU unpacks a layer whole for a chunk: half the native KV of two layers
        assert native <= packed[0]
    for kv_type in KV_TYPES:
        totals = [total for _, total in needs.curves[kv_type]]
        assert totals == sorted(totals)


@pytest.mark.parametrize("chunk", [256, 2048])
@pytest.mark.parametrize("window", WINDOWS)
def test_the_workspace_of_a_long_context_is_that_of_its_last_chunk(window, chunk, folder):
    """Between the marks and past them: a long context is extrapolated from short ones."""
    model = hollow(lay_out(windowed(folder, window), "float32"))
    needs = Needs(model, "native", chunk)
    for n in (chunk, 2 * chunk, 3 * chunk, 5 * chunk, 40 * chunk):
        traced = needs.held(n).peak - needs.kv_bytes(n)
        extrapolated = needs.total(n, 1) - needs.kv_bytes(n)
        assert extrapolated == pytest.approx(traced, rel=0.07), n


def test_a_long_packed_context_holds_what_its_trace_would(folder, monkeypatch):
    for chunk in (256, 2048):
        extrapolated = Needs(loaded(windowed(folder, 4096)), "q8", chunk)
        with monkeypatch.context() as patch:
            patch.setattr(needs, "LONGEST_TRACED", 2**30)
            traced = Needs(loaded(windowed(folder, 4096)), "q8", chunk)
            expected = traced.step(20_480, chunk, last=True).peak
        assert extrapolated.step(20_480, chunk, last=True).peak == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("changes", [{"context": 0}, {"sequences": 0}, {"chunk": 0}])
def test_sizes_below_one_are_refused(changes, tmp_path):
    path = write_checkpoint(tmp_path / "model", llama_config())
    with pytest.raises(UsageError):
        plan(path, **changes)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("16GiB", 2**34),
        ("500MB", 500_000_000),
        ("1.5k", 1500),
        (7, 7),
        ("auto", None),
        (None, None),
    ],
)
def test_sizes_are_read_with_their_units(text, n_bytes):
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "0", "-1", "lots", "3XB", True, 0])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError):
        parse_bytes(text)


def test_the_card_has_every_number_and_a_chart_that_fits_the_screen(folder):
    needs = plan(checkpoint(folder, FAMILIES[4]), context=2000, memory="8MB")
    text = plan_text.text(needs)
    for name in ("weights", "KV cache", "workspace", "allocator", "total", "limit", "longest"):
        assert f"\n{name}" in f"\n{text}"
    assert "window 32" in text and needs.formula in text
    assert "native" in text and "\x1b" not in text
    assert all(len(line) <= 80 for line in plan_text.chart(needs).splitlines())
    assert json.loads(json.dumps(plan_text.to_dict(needs)))["total_bytes"] == needs.total_bytes
