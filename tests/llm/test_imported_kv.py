"""KV from another machine is what its model computes, or it serves no prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlxkv.errors import CheckpointError, UsageError
from mlxkv.llm.imported_kv import import_file
from mlxkv.llm.llm import LLM, load
from mlxkv.prefix.on_disk.format import PageFile
from mlxkv.saved_kv.archive import open_archive, write_archive
from mlxkv.saved_kv.manifest import NamedKV
from mlxkv.saved_kv.registry import KVNames
from mlxkv.saved_kv.signature import make_keys, private_key, sign
from tests.support.command_line import chat_model

TEXT = "The weir was built in 1874 of granite from the upper quarry, and mended twice. " * 14
OTHER = TEXT.replace("granite", "bricks!")
N = len(TEXT)
FAMILIES = {"llama": "native", "gemma3": "k8v4,0=q4,1=native"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "gemma3"):
        chat_model(folder / family, family=family, max_position_embeddings=8192, head_dim=32)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLXKV_KV", str(tmp_path / "kv"))
    monkeypatch.setenv("MLXKV_KV_DISK", "1GiB")
    return tmp_path


@pytest.fixture(params=FAMILIES)
def llm(request, models, here):
    llm = load(models / request.param, kv_type=FAMILIES[request.param])
    yield llm
    llm.close()


def exported(llm: LLM, folder: Path, text: str = TEXT) -> Path:
    """The KV of a text as a file, and nothing of it left here."""
    llm.save_kv("own", text)
    names = KVNames(folder / "kv")
    names.export("own", folder / "own.kv")
    names.remove("own")
    forget(llm)
    return folder / "own.kv"


def forget(llm: LLM) -> None:
    assert llm.pages is not None and llm.pages.disk is not None
    llm.pages.clear()
    for key in [link.key(part) for link in known(llm) for part in llm.pages.kinds.parts]:
        llm.pages.disk.remove(key)


def known(llm: LLM):
    assert llm.pages is not None
    todo = [("0" * 32, 0)]
    while todo:
        for link in llm.pages.children(*todo.pop()):
            yield link
            todo.append((link.name, link.stop))


def forged(
    file: Path,
    *,
    page: Callable[[PageFile], PageFile] = lambda page: page,
    named: Callable[[NamedKV], NamedKV] = lambda named: named,
) -> Path:
    with open_archive(file) as (manifest, pages):
        out = file.with_name("forged.kv")
        write_archive(out, named(manifest), map(page, list(pages)))
    return out


def tensors(change: Callable[[np.ndarray], np.ndarray], *starts: int):
    """Changes all arrays of the pages that begin at some positions."""

    def changed(page: PageFile) -> PageFile:
        if page.start not in starts:
            return page
        return replace(page, tensors={k: change(x.copy()) for k, x in page.tensors.items()})

    return changed


def restored(llm: LLM, prompt: str, **options) -> int:
    assert llm.pages is not None
    llm.pages.clear()
    return llm.generate(prompt, max_tokens=2, **options).stats.restored_tokens


def test_an_import_serves_other_prompts_only_once_a_sample_of_it_was_computed(llm, here):
    file = exported(llm, here)
    import_file(file, model=str(llm.path))
    assert restored(llm, TEXT[:1000] + "?") == 0
    forget(llm)
    assert restored(llm, "?", kv_from="own") == N
    assert not KVNames(here / "kv").load("own").quarantine
    # Layers with a window have KV near the end only.
    assert restored(llm, TEXT + "!") == N


def test_an_import_that_was_not_trusted_is_gone_with_its_name(llm, here):
    import_file(exported(llm, here), model=str(llm.path))
    KVNames(here / "kv").remove("own")
    assert [*here.rglob("*.safetensors")] == []
    assert restored(llm, TEXT) == 0


@pytest.mark.parametrize("start", [0, (N - 1) // 256 * 256])
def test_values_that_the_model_does_not_compute_are_refused_at_the_first_use(llm, here, start):
    shuffled = tensors(lambda x: x[:, :, ::-1].copy(), start)
    import_file(forged(exported(llm, here), page=shuffled), model=str(llm.path))
    with pytest.raises(CheckpointError, match=r"own: the imported KV of tokens .* is not what"):
        llm.generate("?", kv_from="own", max_tokens=2)
    assert not llm.verify_kv("own").passed
    assert restored(llm, TEXT) == 0


def test_the_kv_of_another_text_is_refused_by_a_full_check_of_any_page(llm, here):
    file = exported(llm, here, OTHER)
    with open_archive(file) as (_, pages):
        others = {(page.start, page.key.part): page for page in pages}
    file.unlink()

    def swapped(page: PageFile) -> PageFile:
        return replace(page, tensors=others[page.start, page.key.part].tensors)

    import_file(forged(exported(llm, here), page=swapped), model=str(llm.path))
    report = llm.verify_kv("own")
    assert not report.passed and report.n_checked == N
    assert KVNames(here / "kv").load("own").quarantine


def test_a_name_that_was_saved_here_passes_a_full_check(llm, here):
    llm.save_kv("own", TEXT)
    report = llm.verify_kv("own")
    assert report.passed and report.n_checked == N


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: np.full_like(x, np.nan), "no finite numbers"),
        (np.zeros_like, "the same KV for every token"),
        (lambda x: x[..., :16].copy(), r"array 0.0 is float32 \[1, 2, 256, 16\], not float32"),
    ],
)
def test_values_and_shapes_that_no_model_has_are_refused_at_the_import(models, here, change, said):
    llm = load(models / "llama")
    file = forged(exported(llm, here), page=tensors(change, 256))
    with pytest.raises(CheckpointError, match=f"forged.kv: tokens 256 to 511.*{said}"):
        import_file(file, model=str(llm.path))
    assert KVNames(here / "kv").list() == [] and [*here.rglob("*.safetensors")] == []
    llm.close()


def test_other_layers_and_dtypes_are_refused_at_the_import(models, here):
    llm = load(models / "llama")
    file = exported(llm, here)

    def fewer(page: PageFile) -> PageFile:
        kept = [name for name in page.tensors if not name.startswith("1.")]
        return replace(
            page,
            tensors={name: page.tensors[name] for name in kept},
            dtypes={name: page.dtypes[name] for name in kept},
        )

    def halved(page: PageFile) -> PageFile:
        halves = {name: x.astype("float16") for name, x in page.tensors.items()}
        return replace(page, tensors=halves, dtypes=dict.fromkeys(halves, "float16"))

    for page, said in ((fewer, "of other layers"), (halved, "is float16")):
        with pytest.raises(CheckpointError, match=said):
            import_file(forged(file, page=page), model=str(llm.path))
    llm.close()


def test_a_text_or_message_that_is_not_that_of_the_tokens_is_refused(models, here):
    llm = load(models / "llama")
    file = exported(llm, here)
    with pytest.raises(CheckpointError, match="its text is not the text of its tokens"):
        import_file(forged(file, named=lambda x: replace(x, text=OTHER)), model=str(llm.path))
    messages = [
        {"role": "system", "content": " " + TEXT},
        {"role": "user", "content": "é <|im_end|>"},
    ]
    llm.save_kv("talk", messages)
    names = KVNames(here / "kv")
    names.export("talk", here / "talk.kv")
    names.remove("talk")
    told = tuple({**message, "content": message["content"].upper()} for message in messages)
    with pytest.raises(CheckpointError, match="a message of role 'system' is not part of its text"):
        import_file(
            forged(here / "talk.kv", named=lambda x: replace(x, messages=told)),
            model=str(llm.path),
        )
    import_file(here / "talk.kv", model=str(llm.path))
    llm.close()


def test_an_import_that_a_trusted_key_has_signed_serves_at_once(models, here):
    llm = load(models / "llama")
    file = exported(llm, here)
    make_keys(here / "key")
    with pytest.raises(CheckpointError, match="no signature"):
        import_file(file, model=str(llm.path), trust=[here / "key.pub"])
    sign(file, private_key(here / "key"))
    import_file(file, model=str(llm.path), trust=[here / "key.pub"])
    assert restored(llm, TEXT[:768] + "?") == 768  # a running process finds whole pages
    llm.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_encrypted_kv_is_restored_with_its_key_alone(models, here, monkeypatch, family):
    def answer(key: str, **options) -> tuple[str, int]:
        monkeypatch.setenv("MLXKV_KV_KEY", key)
        llm = load(models / family, kv_type=FAMILIES[family])
        result = llm.generate(TEXT + "?", max_tokens=4, temperature=0, **options)
        llm.close()
        return result.text, result.stats.restored_tokens

    cold = answer("11" * 32)
    assert cold[1] == 0
    assert answer("11" * 32) == (cold[0], N)
    assert answer("22" * 32) == cold  # another key: a miss, and its own pages from then on
    assert answer("22" * 32) == answer("11" * 32) == (cold[0], N)
    assert answer("") == cold


def test_an_encrypted_name_needs_its_key(models, here, monkeypatch):
    monkeypatch.setenv("MLXKV_KV_KEY", "11" * 32)
    llm = load(models / "llama")
    llm.save_kv("own", TEXT)
    whole = llm.generate("?", kv_from="own", max_tokens=4, temperature=0)
    assert whole.stats.restored_tokens == N and llm.verify_kv("own").passed
    llm.close()
    monkeypatch.delenv("MLXKV_KV_KEY")
    llm = load(models / "llama")
    with pytest.raises(UsageError, match="'own' is encrypted with another key: set MLXKV_KV_KEY"):
        llm.generate("?", kv_from="own", max_tokens=4)
    llm.close()


def test_a_key_that_is_none_ends_the_load(models, here, monkeypatch):
    monkeypatch.setenv("MLXKV_KV_KEY", "secret")
    with pytest.raises(UsageError, match="MLXKV_KV_KEY must be 32 random bytes"):
        load(models / "llama")
