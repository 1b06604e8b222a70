"""Gemma 3 and 4 with pictures against transformers: golden files of oracle/make_pictures.py.

Rows of pictures lie within 1e-4 of their standard deviation, logits within 1e-3 of theirs, and 40
greedy tokens are the same, however a prompt is cut: a picture whose tokens see each other stays
whole, others may be cut.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxkv
from mlxkv.kv.layout import TwoWayMask
from mlxkv.nn.batch import batch
from mlxkv.nn.model import CausalLM, Placed
from tests.families.oracle.pictures import (
    DIRECTORY,
    FULL,
    PICTURES,
    PROMPTS,
    SOFT,
    WINDOW,
    Pictures,
    kept_positions,
    weight,
)
from tests.support.tiny import fingerprint, write_checkpoint

ROWS, LOGITS = 1e-4, 1e-3
every_case = pytest.mark.parametrize("pictures", PICTURES, ids=lambda each: each.case.name)
every_prompt = pytest.mark.parametrize("prompt", PROMPTS)
Span = tuple[int, int]


@dataclass(frozen=True)
class Given:
    """A prompt as a model takes it."""

    tokens: list[int]
    media: list[Placed]

    def between(self, start: int, stop: int) -> dict[str, Any]:
        """Arguments for these positions."""
        placed = [
            Placed(kind, max(at, start) - start, rows[max(0, start - at) : stop - at])
            for kind, at, rows in self.media
            if at < stop and at + rows.shape[0] > start
        ]
        return {"tokens": mx.array([self.tokens[start:stop]]), "media": placed}

    def cuts(self, n: int, whole: bool) -> Iterator[Span]:
        """Chunks of n tokens, longer where they hold a picture that stays whole."""
        start = 0
        while start < len(self.tokens):
            stop = min(start + n, len(self.tokens))
            for _, at, rows in self.media if whole else ():
                if at < stop < at + rows.shape[0]:
                    stop = at + rows.shape[0]
            yield start, stop
            start = stop


class Golden:
    """What the reference computed for one case, and the model that it is compared with."""

    def __init__(self, pictures: Pictures, style: str, folder: Path):
        directory = DIRECTORY / pictures.case.name
        manifest = json.loads((directory / "manifest.json").read_text())
        mean, self.seed = pictures.case.norm_mean, manifest["seed"]
        weights = {n: weight(n, s, self.seed, mean) for n, s in manifest["tensors"].items()}
        assert fingerprint(weights) == manifest["sha256"], "not the oracle's weights"
        config = json.loads((directory / f"config.{style}.json").read_text())
        if style == "hub":
            weights = published(pictures, weights)
        self.model: CausalLM = mlxkv.load_model(
            write_checkpoint(folder, config, weights), "float32"
        )
        mx.eval(self.model.parameters())
        shutil.rmtree(folder)
        with np.load(directory / "golden.npz") as data:
            self.arrays = dict(data)
        self.pictures = pictures
        self.whole = bool(self.model.two_way_kinds)

    @functools.cached_property
    def rows(self) -> list[mx.array]:
        """Of each picture, by the model."""
        data = [self.pictures.data(i) for i in range(len(self.pictures.sizes))]
        found = [
            self.model.media_rows("image", {name: mx.array(x) for name, x in each.items()})
            for each in data
        ]
        mx.eval(found)
        return found

    def given(self, name: str) -> Given:
        tokens = PROMPTS[name].tokens(self.pictures, self.seed)
        media, at = [], 0
        for picture in PROMPTS[name].pictures:
            at = tokens.index(SOFT, at)
            media.append(Placed("image", at, self.rows[picture]))
            at += self.rows[picture].shape[0]
        return Given(tokens, media)

    def check(self, name: str, logits: mx.array) -> None:
        """Logits `[L, V]` of every position of a prompt."""
        got = np.array(logits)[kept_positions(logits.shape[0])]
        error = np.abs(got - self.arrays[f"{name}.logits"]).max() / self.arrays[f"{name}.std"]
        assert error < LOGITS

    def check_answer(self, name: str, caches: Sequence[Any], last: mx.array) -> None:
        """The greedy tokens that follow logits `[V]`."""
        expected = self.arrays[f"{name}.greedy"].tolist()
        answer = []
        while len(answer) < len(expected):
            answer.append(int(mx.argmax(last[: SOFT - 1])))
            last = self.model.last_logits(mx.array([answer[-1:]]), caches)[0]
        assert answer == expected


def published(pictures: Pictures, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors as repositories name them, and as mlx-vlm has a convolution's."""
    renamed = {}
    for name, array in weights.items():
        for ours, theirs in pictures.case.renamed.items():
            name = name.replace(ours, theirs, 1)
        if "nified" in pictures.case.architecture and name.startswith("model.embed_vision."):
            inner = name.removeprefix("model.embed_vision.")
            name = f"model.vision_embedder.{inner}"
            if "embedding_projection" in inner:
                name = "model.embed_vision.embedding_projection.weight"
        renamed[name] = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
    return renamed


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """(case, style) -> its golden, each loaded once."""

    @functools.cache
    def read(pictures: Pictures, style: str = "new") -> Golden:
        return Golden(pictures, style, tmp_path_factory.mktemp(pictures.case.name))

    return read


def fed(model: CausalLM, caches: Any, given: Given, spans: Iterator[Span]) -> mx.array:
    """Logits of every position, `[L, V]`."""
    parts = []
    for start, stop in spans:
        parts.append(model(caches=caches, **given.between(start, stop))[0])
        mx.eval(parts[-1])
    return mx.concatenate(parts)


@every_case
@pytest.mark.parametrize("style", ["new", "hub"])
def test_rows_of_a_picture_equal_the_references(golden, pictures, style):
    got = golden(pictures, style)
    assert got.model.media_kinds == {"image"}
    for i, rows in enumerate(got.rows):
        expected = got.arrays[f"rows.{i}"]
        assert rows.shape == (pictures.n_tokens(i), got.model.config.hidden_size)
        assert np.abs(np.array(rows) - expected).max() < ROWS * expected.std()


@every_case
@every_prompt
def test_one_pass_without_caches_equals_the_reference(golden, pictures, prompt):
    got = golden(pictures)
    given = got.given(prompt)
    got.check(prompt, got.model(**given.between(0, len(given.tokens)))[0])


@every_case
def test_the_published_names_and_configs_mean_the_same_model(golden, pictures):
    new, hub = golden(pictures), golden(pictures, "hub")
    assert new.model.config == hub.model.config
    given = hub.given("several")
    hub.check("several", hub.model(**given.between(0, len(given.tokens)))[0])


@every_case
@every_prompt
@pytest.mark.parametrize("chunk", [1, 5, 30])
def test_chunked_prefill_equals_the_reference(golden, pictures, prompt, chunk):
    got = golden(pictures)
    given, caches = got.given(prompt), mlxkv.make_caches(got.model)
    got.check(prompt, fed(got.model, caches, given, given.cuts(chunk, got.whole)))


@every_case
def test_greedy_tokens_equal_the_references(golden, pictures):
    got = golden(pictures)
    given, caches = got.given("last"), mlxkv.make_caches(got.model)
    n = len(given.tokens)
    # A chunk that ends with a picture's last row, and one that begins behind it.
    for span in ((0, n - 1), (n - 1, n)):
        last = got.model.last_logits(caches=caches, **given.between(*span))[0]
    got.check_answer("last", caches, last)


@every_case
def test_a_restored_prefix_goes_on_as_if_it_had_been_computed(golden, pictures):
    got = golden(pictures)
    model, given, n = got.model, got.given("several"), len(got.given("several").tokens)
    expected = got.arrays["several.logits"][-1]
    for cut in (9, given.media[1].start, n - 4):
        before, restored = mlxkv.make_caches(model), mlxkv.make_caches(model)
        fed(model, before, given, given_to(given, cut, got.whole))
        for into, cache in zip(restored, before, strict=True):
            into.load([cache.read(cache.first, cache.offset)])
        last = fed(model, restored, given, iter([(cut, n)]))[-1]
        assert np.abs(np.array(last) - expected).max() < LOGITS * got.arrays["several.std"]


def given_to(given: Given, cut: int, whole: bool) -> Iterator[Span]:
    """Chunks up to a position outside of pictures."""
    return ((start, min(stop, cut)) for start, stop in given.cuts(4, whole) if start < cut)


@every_case
def test_sequences_with_pictures_are_decoded_beside_those_of_text(golden, pictures):
    got = golden(pictures)
    model, given = got.model, {name: got.given(name) for name in PROMPTS}
    text = Given(list(range(3, 60)), [])
    asked = [*given.values(), text]
    sequences = [mlxkv.make_caches(model) for _ in asked]
    firsts = []
    for each, caches in zip(asked, sequences, strict=True):
        logits = model.last_logits(caches=caches, **each.between(0, len(each.tokens)))[0]
        firsts.append(int(mx.argmax(logits[: SOFT - 1])))
    together, steps = batch(sequences), [[token] for token in firsts]
    for _ in range(39):
        tokens = mx.array([[step[-1]] for step in steps])
        logits = model.last_logits(tokens, together)[:, : SOFT - 1]
        best: Any = mx.argmax(logits, axis=-1).tolist()
        for step, token in zip(steps, best, strict=True):
            step.append(token)
    for name, step in zip(PROMPTS, steps, strict=False):
        assert step == got.arrays[f"{name}.greedy"].tolist()


@every_case
@pytest.mark.parametrize("kv_type", ["q8", "q4"])
def test_packed_kv_is_as_close_as_for_text(golden, pictures, kv_type):
    got = golden(pictures)
    model, given = got.model, got.given("several")
    n, errors = len(given.tokens), []
    text = Given([3 + (7 * i + i * i) % 80 for i in range(n)], [])
    for each in (given, text):
        native = model(**each.between(0, n))[0]
        packed = fed(model, mlxkv.make_caches(model, kv_type), each, each.cuts(n, whole=True))
        errors.append(float(mx.sqrt(mx.square(packed - native).mean()) / native.std()))
    assert errors[0] < 2 * errors[1]


# Masks


@every_case
def test_the_tokens_of_a_picture_see_each_other_in_layers_of_the_right_kind(golden, pictures):
    got = golden(pictures)
    model, given = got.model, got.given("several")
    assert model.two_way_kinds == ({"image"} if pictures.two_way else set())
    seen = masks_of(model, given)
    kinds = {FULL if window is None else "sliding_attention" for window, _ in seen}
    assert kinds == {FULL, "sliding_attention"}
    for window, mask in seen:
        kind = FULL if window is None else "sliding_attention"
        assert isinstance(mask, TwoWayMask) == (kind in pictures.two_way)
        if isinstance(mask, TwoWayMask):
            np.testing.assert_array_equal(np.array(mask.array), seen_by(given, window))


def masks_of(model: Any, given: Given) -> list[tuple[int | None, Any]]:
    """What a pass over a whole prompt gives its layers."""
    from mlxkv.nn import decoder_model, shared_kv

    found = []
    for module in (decoder_model, shared_kv):
        make = module.attention_masks

        def spy(*args: Any, make: Any = make, **options: Any) -> Any:
            masks = make(*args, **options)
            found.extend(masks.items())
            return masks

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "attention_masks", spy)
            mx.eval(model(**given.between(0, len(given.tokens))))
    return found


def seen_by(given: Given, window: int | None) -> np.ndarray:
    """The rule in words: within the window, what is not ahead or of the same picture."""
    n = len(given.tokens)
    picture = np.full(n, -1)
    for i, (_, start, rows) in enumerate(given.media):
        picture[start : start + rows.shape[0]] = i
    q, k = np.arange(n)[:, None], np.arange(n)[None]
    same = (picture[:, None] == picture[None]) & (picture[:, None] >= 0)
    return ((k <= q) | same) & (k > q - (window or n))


@every_case
def test_no_mask_is_made_for_a_chunk_without_pictures(golden, pictures):
    model = golden(pictures).model
    masks = masks_of(model, Given(list(range(3, 3 + WINDOW)), []))
    assert {mask for _, mask in masks} == {"causal"}
