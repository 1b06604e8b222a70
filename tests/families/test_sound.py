"""Gemma 3n and 4 with sound against transformers: golden files that oracle/make_sound.py wrote.

Tolerances, both sides in float32 with sums in other orders: rows within 1e-4 of their largest value
(a correct encoder shows 1e-5), logits within 1e-3 of their standard deviation.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlxkv
from mlxkv.errors import ConfigError
from mlxkv.models.gemma3n_config import Config as Gemma3nConfig
from mlxkv.models.gemma4_config import Config as Gemma4Config
from mlxkv.models.gemma_audio import audio_names
from mlxkv.nn.batch import batch
from mlxkv.nn.model import Placed
from tests.families.oracle import sound as oracle
from tests.support.tiny import fingerprint, write_checkpoint

ROWS, LOGITS = 1e-4, 1e-3
every_sound = pytest.mark.parametrize("sound", oracle.SOUNDS, ids=lambda sound: sound.case.name)
every_prompt = pytest.mark.parametrize(
    ("sound", "name"),
    [(sound, name) for sound in oracle.SOUNDS for name in oracle.prompts(sound, 0)],
    ids=lambda value: getattr(getattr(value, "case", None), "name", value),
)


@functools.cache
def golden(sound: oracle.Sound) -> dict[str, np.ndarray]:
    with np.load(oracle.DIRECTORY / sound.case.name / "golden.npz") as data:
        return dict(data)


@functools.cache
def weights(sound: oracle.Sound) -> dict[str, np.ndarray]:
    """The checkpoint's tensors, checked against the stored hash."""
    manifest = json.loads((oracle.DIRECTORY / sound.case.name / "manifest.json").read_text())
    made = {
        name: oracle.weight(name, shape, 0, sound.case.norm_mean)
        for name, shape in manifest["tensors"].items()
    }
    assert fingerprint(made) == manifest["sha256"], "the weights are not those of the oracle"
    return made


def config(sound: oracle.Sound, style: str) -> dict[str, Any]:
    return json.loads((oracle.DIRECTORY / sound.case.name / f"config.{style}.json").read_text())


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """(sound, style, dtype) -> model, each loaded once."""

    @functools.cache
    def load(sound: oracle.Sound, style: str = "new", dtype: mx.Dtype = mx.float32) -> Any:
        folder = tmp_path_factory.mktemp(sound.case.name)
        write_checkpoint(folder, config(sound, style), weights(sound))
        model = mlxkv.load_model(folder, dtype=dtype)
        mx.eval(model.parameters())
        shutil.rmtree(folder)
        return model

    return load


def rows(model: Any, sound: oracle.Sound, n_frames: int) -> mx.array:
    return model.media_rows("audio", {sound.audio_key: mx.array(sound.clip(n_frames))})


def prompt_of(sound: oracle.Sound, name: str) -> oracle.Prompt:
    return oracle.prompts(sound, int(golden(sound)[f"seed.{name}"]))[name]


def media_of(model: Any, sound: oracle.Sound, prompt: oracle.Prompt) -> list[Placed]:
    """All media of a prompt, in order."""
    kinds = {sound.audio[0]: "audio", sound.image[0]: "image"}
    clips, pictures = iter(prompt.clips), iter(range(prompt.n_pictures))
    media, at = [], 0
    while at < len(prompt.tokens):
        kind = kinds.get(prompt.tokens[at])
        if kind == "audio":
            made = rows(model, sound, next(clips))
        elif kind == "image":
            shown = oracle.picture(sound, next(pictures))
            made = model.media_rows("image", {key: mx.array(x) for key, x in shown.items()})
        else:
            at += 1
            continue
        media.append(Placed(kind, at, made))
        at += made.shape[0]
    return media


def chunks(
    prompt: oracle.Prompt, media: Sequence[Placed], size: int
) -> Iterator[tuple[mx.array, list[Placed]]]:
    """A prompt in chunks, of which none ends inside a picture."""
    start = 0
    while start < len(prompt.tokens):
        end = min(start + size, len(prompt.tokens))
        for kind, at, made in media:
            if kind == "image" and at < end < at + made.shape[0]:
                end = at + made.shape[0]
        yield mx.array([prompt.tokens[start:end]]), list(_within(media, start, end))
        start = end


def _within(media: Sequence[Placed], start: int, end: int) -> Iterator[Placed]:
    for kind, at, made in media:
        first, last = max(at, start), min(at + made.shape[0], end)
        if first < last:
            yield Placed(kind, first - start, made[first - at : last - at])


def check_logits(sound: oracle.Sound, name: str, logits: mx.array) -> None:
    stored = golden(sound)
    kept = oracle.kept_positions(prompt_of(sound, name).tokens)
    difference = np.abs(np.array(logits)[kept] - stored[f"logits.{name}"]).max(axis=-1)
    assert difference.max() < LOGITS * stored[f"std.{name}"], difference


def greedy(model: Any, caches: Sequence[Any], last: mx.array, n: int) -> list[int]:
    answer = [int(mx.argmax(last))]
    while len(answer) < n:
        answer.append(int(mx.argmax(model(mx.array([answer[-1:]]), caches)[0, -1])))
    return answer


# The encoder


@every_sound
def test_the_rows_of_clips_of_any_length_equal_the_references(load, sound):
    model, stored = load(sound), golden(sound)
    for n_frames in sound.lengths:
        expected, got = stored[f"rows.{n_frames}"], np.array(rows(model, sound, n_frames))
        assert got.shape == expected.shape == (sound.n_rows(n_frames), expected.shape[1])
        difference = np.abs(got - expected).max() / np.abs(expected).max()
        assert difference < ROWS, (n_frames, difference)


@pytest.mark.parametrize("sound", [oracle.GEMMA4, oracle.UNIFIED], ids=["conformer", "samples"])
def test_the_rows_of_thirty_seconds_equal_the_references(load, sound):
    expected = golden(sound)["rows.longest"]
    got = np.array(rows(load(sound), sound, oracle.LONGEST))
    assert len(got) == sound.n_rows(oracle.LONGEST)
    assert np.abs(got[:: oracle.KEPT] - expected).max() < ROWS * np.abs(expected).max()


@pytest.mark.parametrize(
    "sound", [oracle.GEMMA4, oracle.GEMMA3N_SOUND], ids=lambda sound: sound.case.name
)
def test_the_graph_of_a_long_clip_is_as_large_as_that_of_a_short_one(load, sound, tmp_path):
    sizes = []
    for n_frames in (60, 2000 if sound is oracle.GEMMA4 else 200):
        path = tmp_path / f"{n_frames}.dot"
        mx.export_to_dot(str(path), rows(load(sound), sound, n_frames))
        sizes.append(path.read_text().count("[shape=rectangle]") or path.read_text().count("->"))
    assert sizes[0] == sizes[1] > 100


@every_sound
def test_a_16_bit_model_hears_in_16_bits(load, sound):
    model = load(sound, dtype=mx.bfloat16)
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {mx.bfloat16}
    made, exact = rows(model, sound, 11), golden(sound)["rows.11"]
    assert made.dtype == mx.bfloat16
    # What 2 layers of 8-bit mantissas leave; a wrong order of layers is off by more than 1.
    difference = np.abs(np.array(made.astype(mx.float32)) - exact).max()
    assert difference < 0.1 * np.abs(exact).max()


# The whole model


@every_sound
def test_the_two_config_styles_mean_the_same_config(load, sound):
    new, hub = load(sound), load(sound, "hub")
    assert new.config == hub.config
    assert new.media_kinds == {"image", "audio"}
    assert "audio" not in new.two_way_kinds


@every_prompt
def test_whole_prefill_and_greedy_tokens_equal_the_reference(load, sound, name):
    model, prompt = load(sound), prompt_of(sound, name)
    caches = mlxkv.make_caches(model)
    media = media_of(model, sound, prompt)
    logits = model(mx.array([prompt.tokens]), caches, media)[0]
    check_logits(sound, name, logits)
    expected = golden(sound)[f"greedy.{name}"].tolist()
    assert greedy(model, caches, logits[-1], len(expected)) == expected


@every_prompt
def test_chunks_that_end_inside_a_clip_equal_the_reference(load, sound, name):
    model, prompt = load(sound), prompt_of(sound, name)
    caches = mlxkv.make_caches(model)
    media = media_of(model, sound, prompt)
    size = 1 if name == "both" else 7
    parts = [model(*(tokens, caches, part))[0] for tokens, part in chunks(prompt, media, size)]
    check_logits(sound, name, mx.concatenate(parts))


@every_sound
def test_pictures_and_sound_are_gone_on_from_where_they_were_restored(load, sound):
    model, prompt = load(sound), prompt_of(sound, "both")
    media = media_of(model, sound, prompt)
    clip = next(placed for placed in media if placed.kind == "audio")
    stored = golden(sound)
    for cut in (clip.start, clip.start + 3, len(prompt.tokens) - 5):
        before, restored = mlxkv.make_caches(model), mlxkv.make_caches(model)
        model(mx.array([prompt.tokens[:cut]]), before, list(_within(media, 0, cut)))
        for into, cache in zip(restored, before, strict=True):
            into.load([cache.read(cache.first, cache.offset)])
        rest = list(_within(media, cut, len(prompt.tokens)))
        last = model.last_logits(mx.array([prompt.tokens[cut:]]), restored, rest)
        error = np.abs(np.array(last)[0] - stored["logits.both"][-1]).max()
        assert error < LOGITS * stored["std.both"]


@every_sound
@pytest.mark.parametrize("kv_type", ["q8", "q4"])
def test_packed_kv_of_pictures_and_sound_is_as_close_as_that_of_text(load, sound, kv_type):
    model, prompt = load(sound), prompt_of(sound, "both")
    text = oracle.Prompt([3 + (7 * i + i * i) % 60 for i in range(len(prompt.tokens))], [])
    errors = []
    for each in (prompt, text):
        media = media_of(model, sound, each)
        native = model(mx.array([each.tokens]), None, media)[0]
        caches = mlxkv.make_caches(model, kv_type)
        parts = [model(tokens, caches, part)[0] for tokens, part in chunks(each, media, 9)]
        packed = mx.concatenate(parts)
        errors.append(float(mx.sqrt(mx.square(packed - native).mean()) / native.std()))
    assert 0 < errors[0] < 2 * errors[1]


@every_sound
def test_answers_about_sound_go_on_beside_those_of_text(load, sound):
    model = load(sound)
    sequences, last = [], []
    for name in ("none", "several", "first"):
        prompt, caches = prompt_of(sound, name), mlxkv.make_caches(model)
        media = media_of(model, sound, prompt)
        last.append(int(mx.argmax(model.last_logits(mx.array([prompt.tokens]), caches, media))))
        sequences.append(caches)
    answers, together = [[token] for token in last], batch(sequences)
    for _ in range(11):
        logits = model.last_logits(mx.array([[answer[-1]] for answer in answers]), together)
        for answer, token in zip(answers, mx.argmax(logits, axis=-1).tolist(), strict=True):
            answer.append(token)
    expected = [golden(sound)[f"greedy.{name}"] for name in ("none", "several", "first")]
    assert answers == [tokens[:12].tolist() for tokens in expected]


# Checkpoints and configs


@pytest.mark.parametrize(
    "sound", [oracle.GEMMA4, oracle.GEMMA3N_SOUND], ids=lambda sound: sound.case.name
)
def test_kernels_in_mlx_layout_load_as_those_of_hugging_face(load, sound):
    model = load(sound)
    published = {
        name.removeprefix("model."): mx.array(array)
        for name, array in weights(sound).items()
        if ".audio_tower." in name
    }
    once, _ = audio_names(published, model.config.audio)
    twice, skipped = audio_names(once, model.config.audio)
    parameters = dict(tree_flatten(model.parameters()))
    assert not skipped and len(once) == len(published)
    for name, array in twice.items():
        assert mx.array_equal(array, parameters[name]), name


def test_bounds_of_an_encoder_that_clips_nothing_are_left_out():
    raw = config(oracle.GEMMA4, "hub")
    raw["audio_config"]["use_clipped_linears"] = False
    names = [
        "audio_tower.layers.0.self_attn.post." + part for part in ("input_min", "linear.weight")
    ]
    kept, skipped = audio_names(
        {name: mx.zeros((2, 2)) for name in names}, Gemma4Config.from_dict(raw).audio
    )
    assert (list(kept), skipped) == (names[1:], names[:1])


@pytest.mark.parametrize(
    ("sound", "changes", "words"),
    [
        (oracle.GEMMA4, {"hidden_size": 15}, ["hidden_size", "15"]),
        (oracle.GEMMA4, {"attention_context_left": 1}, ["attention_context_left"]),
        (oracle.GEMMA4, {"subsampling_conv_channels": [8]}, ["subsampling_conv_channels"]),
        (
            oracle.GEMMA4,
            {"attention_invalid_logits_value": 1.0},
            ["attention_invalid_logits_value"],
        ),
        (oracle.GEMMA4, {"hidden_act": "swooosh"}, ["hidden_act", "swooosh"]),
        (oracle.GEMMA4, {"num_hidden_layers": 10**9}, ["num_hidden_layers"]),
        (oracle.GEMMA4, {"attention_chunk_size": 10**9}, ["attention_chunk_size"]),
        (oracle.UNIFIED, {"audio_embed_dim": 0}, ["audio_embed_dim"]),
        (oracle.GEMMA3N_SOUND, {"vocab_offset": 99}, ["vocab_offset", "95"]),
        (oracle.GEMMA3N_SOUND, {"sscp_conv_kernel_size": [3, 3]}, ["sscp_conv_kernel_size"]),
        (oracle.GEMMA3N_SOUND, {"gradient_clipping": -1}, ["gradient_clipping"]),
    ],
)
def test_an_audio_config_that_cannot_be_right_is_an_error_naming_file_and_key(
    sound, changes, words
):
    raw = config(sound, "new")
    raw["audio_config"] |= changes
    family = Gemma3nConfig if sound is oracle.GEMMA3N_SOUND else Gemma4Config
    with pytest.raises(ConfigError) as caught:
        family.from_dict(raw, "some/config.json")
    message = str(caught.value)
    assert "\n" not in message
    for word in ("some/config.json", "audio_config", *words):
        assert word in message
