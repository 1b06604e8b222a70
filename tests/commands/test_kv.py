"""`mlxkv kv`, `run --kv-from` and `run --verbose`, as users type them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from mlxkv.commands import inputs
from mlxkv.errors import UsageError
from tests.support.command_line import assert_one_line, chat_model, environment, mlxkv

TEXT = "The weir was built in 1874 of granite from the upper quarry, and mended twice. " * 8


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    chat_model(folder / "chatty", family="gemma3", max_position_embeddings=8192)
    chat_model(folder / "other", max_position_embeddings=8192)
    return folder


def environment_in(home: Path, models: Path) -> dict[str, str]:
    kv = str(home / "kv")
    return environment(home, MLXKV_MODELS=str(models), MLXKV_KV=kv, MLXKV_KV_DISK="1GiB")


@pytest.fixture
def env(models, tmp_path) -> dict[str, str]:
    return environment_in(tmp_path, models)


@pytest.fixture(scope="module")
def saved_once(models, tmp_path_factory) -> Path:
    """A home where a text's KV is saved under a name."""
    home = tmp_path_factory.mktemp("saved")
    (home / "weir.txt").write_text(TEXT)
    command = "kv", "save", "weir", "-m", "chatty", str(home / "weir.txt")
    done = mlxkv(*command, env=environment_in(home, models))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("saved weir: 648 tokens of chatty, ")
    return home


@pytest.fixture
def saved(saved_once, env, tmp_path) -> Path:
    """The saved text's file, and its KV in a home of the test's own."""
    shutil.copytree(saved_once / "kv", tmp_path / "kv")
    return shutil.copy(saved_once / "weir.txt", tmp_path)


def run_json(*args: str, env) -> dict:
    done = mlxkv("run", *args, "--json", "-n", "3", env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_many_runs_start_from_saved_kv(saved, env):
    answers = [run_json("--kv-from", "weir", q, env=env) for q in ("Was it?", "Is it?")]
    for answer in answers:
        assert answer["model"] == "chatty"
        assert answer["stats"]["restored_ssd_tokens"] == 648
    assert answers[0]["stats"]["prompt_tokens"] > 648


def test_verbose_says_where_the_prompts_kv_came_from(saved, env):
    done = mlxkv("run", "-v", "-n", "2", "--kv-from", "weir", "Who?", env=env)
    line = next(x for x in done.stderr.splitlines() if x.startswith("prompt"))
    assert "665 tokens: 648 from SSD, 17 computed at " in line
    assert "differs" not in line


def test_verbose_explains_a_miss_on_one_line(saved, env):
    edited = TEXT.replace("granite", "marble", 5).replace("marble", "granite", 4)
    mlxkv("run", "--raw", "-n", "2", "chatty", TEXT, env=env)
    done = mlxkv("run", "--raw", "-v", "-n", "2", "chatty", edited, env=env)
    line = next(x for x in done.stderr.splitlines() if x.startswith("prompt"))
    at = edited.index("marble")
    assert f"differs from token {at} on: had ' in 1874 of |granite from'" in line
    assert "got ' in 1874 of |marble from " in line
    assert " tokens again, " in line


def test_saved_kv_is_listed_and_shown(saved, env):
    listed = mlxkv("kv", "ls", env=env).stdout
    assert "weir" in listed and "chatty" in listed and "648" in listed
    assert " of 1.0 GiB in " in listed
    about = json.loads(mlxkv("kv", "ls", "--json", env=env).stdout)
    assert about["names"][0]["name"] == "weir"
    assert 0 < about["names"][0]["bytes"] <= about["bytes"] <= about["cap_bytes"] == 2**30
    shown = mlxkv("kv", "show", "weir", env=env).stdout
    assert "the start of a chat" in shown and "complete" in shown and TEXT[:40] in shown
    card = json.loads(mlxkv("kv", "show", "weir", "--json", env=env).stdout)
    assert (card["tokens"], card["missing_files"], card["pinned"]) == (648, 0, False)


def test_pin_unpin_and_rm(saved, env):
    assert mlxkv("kv", "pin", "weir", env=env).returncode == 0
    assert "pinned       yes" in mlxkv("kv", "show", "weir", env=env).stdout
    assert mlxkv("kv", "unpin", "weir", env=env).returncode == 0
    assert "pinned       no" in mlxkv("kv", "show", "weir", env=env).stdout
    assert mlxkv("kv", "rm", "weir", env=env).stdout == "removed weir\n"
    assert_one_line(mlxkv("kv", "show", "weir", env=env), 2, "weir", "mlxkv kv ls")


def test_gc_reports_what_it_removed(saved, env, tmp_path):
    page = next((tmp_path / "kv" / "pages").glob("*/*.full.safetensors"))
    page.write_bytes(page.read_bytes()[:-1])
    done = mlxkv("kv", "gc", env=env)
    assert done.returncode == 0
    assert "damaged              1 files" in done.stdout
    assert not page.exists()
    assert "1 files are gone" in mlxkv("kv", "show", "weir", env=env).stdout


def test_export_and_import_carry_a_name_to_another_machine(saved, env, tmp_path):
    file = tmp_path / "weir.mlxkv"
    assert mlxkv("kv", "export", "weir", str(file), env=env).returncode == 0
    there = env | {"MLXKV_KV": str(tmp_path / "there")}
    done = mlxkv("kv", "import", str(file), env=there)
    assert done.stdout == "imported weir: 648 tokens of chatty\n", done.stderr
    answer = run_json("--kv-from", "weir", "Who?", env=there)
    assert answer["stats"]["restored_ssd_tokens"] == 648
    assert answer["text"] == run_json("--kv-from", "weir", "Who?", env=env)["text"]
    other = mlxkv("kv", "import", str(file), "--name", "b", "-m", "other", env=there)
    assert_one_line(other, 4, "weir.mlxkv", "not this model")


def test_an_import_without_its_model_is_refused(saved, env, tmp_path):
    file = tmp_path / "weir.mlxkv"
    mlxkv("kv", "export", "weir", str(file), env=env)
    empty = env | {"MLXKV_MODELS": str(tmp_path / "no-models"), "MLXKV_KV": str(tmp_path / "x")}
    assert_one_line(mlxkv("kv", "import", str(file), env=empty), 3, "chatty")


def test_raw_text_is_saved_and_continued(env):
    done = mlxkv("kv", "save", "start", "--raw", "--pin", "-m", "other", TEXT, env=env)
    assert f"saved start: {len(TEXT)} tokens of other" in done.stdout
    assert "pinned       yes" in mlxkv("kv", "show", "start", env=env).stdout
    answer = run_json("--kv-from", "start", "--raw", "And", env=env)
    assert answer["stats"]["restored_ssd_tokens"] == len(TEXT)
    assert answer["stats"]["prompt_tokens"] == len(TEXT) + 3
    assert_one_line(mlxkv("run", "--kv-from", "start", "And", env=env), 2, "--raw")


def test_what_is_piped_in_is_saved(env):
    done = mlxkv("kv", "save", "piped", "-m", "other", env=env, stdin=TEXT)
    assert done.stdout.startswith("saved piped: ")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["kv", "save", "x", "-m", "other"], 2, ["nothing to save"]),
        (["kv", "save", "x", "-m", "other", "no/such/file.txt"], 2, ["no such file or folder"]),
        (["kv", "save", "../x", "-m", "other", "a text"], 2, ["../x"]),
        (["kv", "save", "x", "-m", "other", "Makefil"], 2, ["Makefil: no such file"]),
        (["kv", "rm", "nothing"], 2, ["nothing"]),
        (["kv", "export", "nothing", "f"], 2, ["nothing"]),
        (["kv", "import", "nothing"], 2, ["nothing", "no such file"]),
        (["run", "--kv-from", "nothing", "hello"], 2, ["nothing"]),
    ],
    ids=lambda value: "-".join(value[:3]) if isinstance(value, list) else str(value),
)
def test_a_mistake_is_one_line(args, code, words, env):
    assert_one_line(mlxkv(*args, env=env), code, *words)


def test_saved_kv_of_another_model_is_refused(saved, env):
    done = mlxkv("run", "--kv-from", "weir", "other", "Who?", env=env)
    assert_one_line(done, 2, "weir is KV of chatty")


# What is read.


def test_a_folder_is_its_text_files_in_a_fixed_order(tmp_path):
    for name, content in (("b.py", "B = 1\n"), ("a/c.py", "C = 1\n"), (".git/x", "no"), ("e", "")):
        path = tmp_path / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "code" / "binary").write_bytes(b"\xff\x00\x01")
    folder = tmp_path / "code"
    text = inputs.read([str(folder)])
    assert text == f"File {folder / 'a/c.py'}:\n\nC = 1\n\n\nFile {folder / 'b.py'}:\n\nB = 1\n"


def test_a_repository_is_what_git_tracks(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("*.log\n")
    (tmp_path / "a.py").write_text("A = 1\n")
    (tmp_path / "a.log").write_text("noise\n")
    text = inputs.read([str(tmp_path)])
    assert "A = 1" in text and "noise" not in text


def test_a_folder_of_pictures_is_them_and_their_names(tmp_path):
    (tmp_path / "a.txt").write_text("BMW, 1972")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "c.wav").write_bytes(b"RIFF\xff\0\0\0WAVEfmt ")
    (tmp_path / "d.ico").write_bytes(b"\0\0\1\0\1\0")  # of a format that is not read
    (tmp_path / "d.txt").write_text("end")
    a, b, d = (tmp_path / name for name in ("a.txt", "b.png", "d.txt"))
    assert inputs.read([str(tmp_path)], {"image"}) == [
        {"type": "text", "text": f"File {a}:\n\nBMW, 1972\n\nFile {b}:"},
        {"type": "image", "image": b, "name": "b.png"},
        {"type": "text", "text": f"File {d}:\n\nend"},
    ]
    assert inputs.read([str(tmp_path)]) == f"File {a}:\n\nBMW, 1972\n\nFile {d}:\n\nend"
    # A file that is named is not left out: the model says that it cannot take it.
    assert [part["type"] for part in inputs.read([str(b)])] == ["text", "image"]


def test_a_text_is_itself_and_one_file_is_its_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.txt").write_text("content")
    assert inputs.read(["You are brief. / Always."]) == "You are brief. / Always."
    assert inputs.read(["f.txt"]) == "content"
    assert inputs.read(["x" * 5000 + " y"]).startswith("xxx")
    with pytest.raises(UsageError, match=r"g\.txt: no such file"):
        inputs.read(["f.txt", "g.txt"])
    (tmp_path / "f.bin").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="not UTF-8"):
        inputs.read(["f.bin"])


# KV formats.


def test_a_name_keeps_its_kv_format(env):
    done = mlxkv("kv", "save", "packed", "-m", "other", "--kv-type", "q8", TEXT, env=env)
    assert done.returncode == 0, done.stderr
    assert "(float32, q8)" in mlxkv("kv", "show", "packed", env=env).stdout
    answer = run_json("--kv-from", "packed", "Who?", env=env)
    assert answer["stats"]["restored_ssd_tokens"] == 648
    wrong = mlxkv("run", "--kv-from", "packed", "--kv-type", "q4", "Who?", env=env)
    assert_one_line(wrong, 2, "packed is KV of", "--kv-type q8")


def test_a_packed_cache_is_smaller(env):
    sizes = [
        run_json("-m", "chatty", "--kv-type", kv_type, "hello there", env=env)["stats"]["kv_bytes"]
        for kv_type in ("native", "k8v4,1=native", "k8v4")
    ]
    assert sizes[0] > sizes[1] > sizes[2] > 0


@pytest.mark.parametrize("command", ["run", "plan", "verify"])
def test_an_unknown_kv_format_is_refused_before_anything_is_loaded(command, env):
    words = ["other", "hello"] if command == "run" else ["other"]
    done = mlxkv(command, *words, "--kv-type", "q5", env=env)
    assert_one_line(done, 2, "--kv-type must be one of native, q8, k8v4, q4", "q5")
