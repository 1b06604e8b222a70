"""What Metal would be asked to do: no worse than recorded, and within what we have set ourselves.

All counts come from one process (`measure`), which patches its MLX. A target is a ratio to
mlx-lm's count of the same, which goldens.json keeps, so mlx-lm need not be installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.metal import goldens, shim
from tests.metal.cases import DRAFTED
from tests.metal.goldens import OURS, THEIRS, Goldens, Key, Value
from tests.metal.proportions import FOREIGN, MODELS
from tests.metal.theirs import installed

RECORDED = goldens.read()
VOCABULARIES = ("sampling of 49,152", "sampling of 262,144")
SAMPLERS = ("greedy", "temperature 0.7", "top-k 40, top-p 0.9, min-p 0.05", "top-p 0.95")
PACKED = ("decode", 1.5), ("chunk 2048", 2.0)

WIDEST_DRAFT = {"gemma-2b": 4, "gemma4-e2b": 4, "gemma4-26b-a4b": 4, "gpt-oss-20b": 4,
                "glm4-9b": 2, "glm4.5-air": 2}  # fmt: skip
"""Tokens of a pass up to which Metal's kernel for few queries takes the heads of a KV head: 32 of
their queries. Where they are more, attention is five kernels and not one; experts of 64 choices and
more are sorted."""

each_model = pytest.mark.parametrize("model", MODELS)
each_foreign_model = pytest.mark.parametrize("model", FOREIGN)

Counted = Mapping[Key, Value]


@pytest.fixture(scope="module")
def now(shim_folder: Path) -> Counted:
    """What mlxkv is counted at today."""
    return goldens.measured(OURS, shim_folder)


@pytest.fixture(scope="module")
def recorded() -> Goldens:
    return RECORDED


def number(counted: Counted, figure: str, model: str, case: str) -> int:
    value = counted[figure, model, case]
    assert isinstance(value, int)
    return value


def ratio(now: Counted, figure: str, model: str, case: str) -> float:
    """Ours to mlx-lm's."""
    theirs = RECORDED.sides[THEIRS]
    ours, of_theirs = number(now, figure, model, case), number(theirs, figure, model, case)
    return 1.0 if ours == of_theirs == 0 else ours / max(of_theirs, 1)


def skip_without_mlx_lm() -> None:
    if not installed():
        pytest.skip("mlx-lm is not installed, whose definition this model runs on")


def recorded_models() -> list[tuple[str, str]]:
    return sorted({(figure, model) for figure, model, _ in RECORDED.sides[OURS]})


def test_the_goldens_are_of_the_mlx_that_the_shim_was_decoded_from(recorded):
    assert recorded.versions["mlx"] == shim.DECODED_FROM


@pytest.mark.parametrize(("figure", "model"), recorded_models())
def test_counts_are_the_golden_ones(now, recorded, figure, model):
    if model in FOREIGN:
        skip_without_mlx_lm()
    golden = {key: v for key, v in recorded.sides[OURS].items() if key[:2] == (figure, model)}
    counted = {key: v for key, v in now.items() if key[:2] == (figure, model)}
    changes = []
    for key in golden.keys() | counted.keys():
        pair = counted.get(key), golden.get(key)
        changes += [f"worse: {key[2]}: {text}" for text in goldens.worse(*pair)]
        changes += [
            f"better: {key[2]}: {text}; update the golden in this commit"
            for text in goldens.better(*pair)
        ]
    assert not changes, "\n".join(
        [*sorted(changes), "`python -m tests.metal.update` rewrites goldens.json"]
    )


def test_every_figure_of_every_model_has_a_golden(now, recorded):
    assert now.keys() - recorded.sides[OURS].keys() == set()


@each_model
@pytest.mark.parametrize("L", DRAFTED)
def test_a_pass_with_a_draft_launches_little_more_than_a_step(now, model, L):
    ours = number(now, "launches", model, f"draft, {L} tokens q4")
    step = number(now, "launches", model, "decode q4")
    is_fused = L <= WIDEST_DRAFT.get(model, max(DRAFTED))
    assert ours <= (1.15 if is_fused else 1.45) * step


@pytest.mark.parametrize("dtype", ["bf16", "q4"])
@each_model
def test_decode_launches_at_most_nine_tenths_of_mlx_lm(now, model, dtype):
    assert ratio(now, "launches", model, f"decode {dtype}") <= 0.9


@pytest.mark.parametrize("case", ["batch 4 q4", "batch 4 of equal lengths q4"])
@each_model
def test_a_batch_of_4_launches_no_more_than_mlx_lm(now, model, case):
    assert ratio(now, "launches", model, case) <= 1.0


@each_model
def test_a_batch_of_16_launches_at_most_a_tenth_more_than_mlx_lm(now, model):
    # A batch of 4 stands in where mlx-lm fails at 16 (Gemma 2): its launches do not grow with it.
    theirs = RECORDED.sides[THEIRS]
    case = "batch 16 q4" if ("launches", model, "batch 16 q4") in theirs else "batch 4 q4"
    limit = 1.1 * number(theirs, "launches", model, case)
    assert number(now, "launches", model, "batch 16 q4") <= limit


@each_model
def test_a_larger_batch_is_built_in_hardly_more_python_calls(now, model):
    # Two a layer, where the rows of experts are sorted.
    of_four = number(now, "python_calls_a_layer", model, "batch 4 q4")
    assert number(now, "python_calls_a_layer", model, "batch 16 q4") <= of_four + 2


def test_a_long_sequence_makes_short_ones_read_a_quarter_more_kv_at_most(now):
    of = "llama-3.1-8b", "7 x 64 and 2,048 q4"
    moved = number(now, "kv_bytes_read", *of) + number(now, "kv_bytes_copied", *of)
    held = number(now, "kv_bytes_held", *of)
    assert held <= moved <= 1.25 * held


@pytest.mark.parametrize(("what", "limit"), PACKED)
@each_model
def test_packed_kv_launches_are_bounded_by_those_of_native_kv(now, model, what, limit):
    packed = number(now, "launches", model, f"q8 KV, {what} behind 6,400 q4")
    assert packed <= limit * number(now, "launches", model, f"native KV, {what} behind 6,400 q4")


@pytest.mark.parametrize("what", [what for what, _ in PACKED])
@each_model
def test_packed_kv_makes_nothing_of_its_length_in_float32(now, model, what):
    assert number(now, "kv_length_float32", model, f"q8 KV, {what} behind 6,400 q4") == 0


@pytest.mark.parametrize("what", [what for what, _ in PACKED])
@each_model
def test_packed_kv_casts_nothing_of_its_length(now, model, what):
    assert number(now, "kv_length_casts", model, f"q8 KV, {what} behind 6,400 q4") == 0


@each_model
def test_a_chunk_copies_no_more_than_mlx_lm(now, model):
    assert ratio(now, "hidden_bytes", model, "chunk 2048 q4") <= 1.0


@each_model
def test_float16_launches_no_more_than_bfloat16(now, model):
    in_float16 = number(now, "launches", model, "decode f16")
    assert in_float16 <= number(now, "launches", model, "decode bf16")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("of", VOCABULARIES)
def test_sampling_launches_no_more_than_mlx_lm(now, of, sampler):
    assert ratio(now, "launches", of, sampler) <= 1.0


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("of", VOCABULARIES)
def test_rows_of_equal_settings_are_sampled_together(now, of, sampler):
    together = number(now, "launches", of, f"{sampler}, 4 rows")
    assert together <= number(RECORDED.sides[THEIRS], "launches", of, sampler)


@each_model
def test_prefill_makes_one_row_of_logits(now, model):
    assert number(now, "logits_rows", model, "chunk 2048 q4") == 1


@each_foreign_model
def test_prefill_on_mlx_lms_definition_makes_one_row_of_logits(now, model):
    skip_without_mlx_lm()
    assert number(now, "logits_rows", model, "chunk 2048 q4") == 1


@each_foreign_model
def test_a_batch_on_mlx_lms_definition_copies_no_kv(now, model):
    skip_without_mlx_lm()
    assert number(now, "kv_bytes_copied", model, "batch 4 q4") == 0
