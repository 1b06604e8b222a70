from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxkv.errors import MlxkvError, ModelNotFound, UsageError
from mlxkv.store import aliases, library, refs, resolve
from tests.support.command_line import chat_model


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    """A models folder with the model `tiny`, and an empty hub cache."""
    folder = tmp_path / "models"
    chat_model(folder / "tiny")
    monkeypatch.setenv("MLXKV_MODELS", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


def cached(models: Path, repo: str) -> Path:
    """A repository in the hub cache."""
    folder = models.parent / "hub" / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "gpt-4o",
        "claude-sonnet-4-5-20250929",
        "gpt-5.2-codex",
        "openai/gpt-4o",
        "openrouter/anthropic/claude-sonnet-4.5",
        "us.anthropic.claude-sonnet-4-5-20250929-v1:0",
        "claude-sonnet-4-5@20250929",
    ],
)
def test_an_alias_is_resolved_as_its_model(models, name):
    assert refs.add_alias(name, "tiny") == "tiny"
    assert resolve.resolve(name, fetch=False) == models / "tiny"
    assert refs.looks_like_model(name)


def test_an_alias_of_an_alias_names_the_model_itself(models):
    refs.add_alias("first", "tiny")
    assert refs.add_alias("second", "first") == "tiny"
    refs.remove_alias("first")
    assert resolve.resolve("second", fetch=False) == models / "tiny"


def test_an_alias_of_a_path_holds_in_every_folder(models, monkeypatch, tmp_path):
    monkeypatch.chdir(models)
    assert refs.add_alias("here", "./tiny") == str(models / "tiny")
    monkeypatch.chdir(tmp_path)
    assert resolve.resolve("here", fetch=False) == models / "tiny"


def test_an_alias_of_a_built_in_model_needs_no_download(models):
    assert refs.add_alias("gpt-4o", "smollm2:135m") == "smollm2:135m"
    assert isinstance(refs.locate("gpt-4o"), refs.CatalogRef)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smollm2:135m", "built-in"),
        ("tiny", "stored model"),
        ("org/cached", "stored model"),
        ("", "letters"),
        ("../x", "letters"),
        (".hidden", "letters"),
        ("a b", "letters"),
        ("a//b", "letters"),
        ("weights.gguf", "letters"),
        ("x" * 257, "letters"),
    ],
)
def test_an_alias_shadows_no_model_and_is_a_name(models, name, words):
    cached(models, "org/cached")
    with pytest.raises(UsageError, match=words):
        refs.add_alias(name, "tiny")
    assert aliases.stored_aliases() == {}


@pytest.mark.parametrize("model", ["nothing", "./nothing", ""])
def test_an_alias_of_nothing_is_refused(models, model):
    with pytest.raises((ModelNotFound, UsageError)):
        refs.add_alias("name", model)
    assert aliases.stored_aliases() == {}


def test_a_model_that_comes_later_goes_before_its_alias(models):
    refs.add_alias("org/late", "tiny")
    assert resolve.resolve("org/late", fetch=False) == models / "tiny"
    cached(models, "org/late")
    assert refs.locate("org/late") == refs.HubRef("org/late", None)


def test_a_new_model_does_not_take_the_name_of_an_alias(models):
    refs.add_alias("mine", "tiny")
    with pytest.raises(UsageError, match="alias"):
        refs.output_path("mine")


def test_an_alias_whose_model_is_gone_says_which(models):
    refs.add_alias("mine", "tiny")
    library.remove("tiny")
    with pytest.raises(ModelNotFound, match=r"'mine'.*'tiny'"):
        resolve.resolve("mine", fetch=False)


def test_rm_of_an_alias_removes_no_model(models):
    refs.add_alias("mine", "tiny")
    with pytest.raises(UsageError, match="alias of tiny"):
        library.remove("mine")
    assert (models / "tiny" / "config.json").is_file()


def test_delete_names_the_aliases_that_are(models):
    refs.add_alias("mine", "tiny")
    with pytest.raises(ModelNotFound, match="mine"):
        refs.remove_alias("other")
    refs.remove_alias("mine")
    with pytest.raises(ModelNotFound):
        refs.locate("mine")


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}'])
def test_a_damaged_file_is_named_and_harms_no_other_name(models, content):
    (models / aliases.FILE).write_text(content)
    with pytest.raises(MlxkvError, match=aliases.FILE):
        refs.locate("mine")
    assert resolve.resolve("tiny", fetch=False) == models / "tiny"


def test_listed_models_come_again_under_their_aliases(models):
    rows = library.with_aliases(
        library.list_models(), {"b": "tiny", "a": str(models / "tiny"), "gone": "nothing"}
    )
    assert [(row.name, row.path) for row in rows] == [
        ("tiny", models / "tiny"),
        ("a", models / "tiny"),
        ("b", models / "tiny"),
    ]


def test_the_file_maps_names_to_models(models):
    refs.add_alias("b", "tiny")
    refs.add_alias("a", "tiny")
    found = json.loads((models / aliases.FILE).read_text())
    assert list(found.items()) == [("a", "tiny"), ("b", "tiny")]
