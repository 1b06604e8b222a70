from __future__ import annotations

import sys

import pytest

from mlxkv.errors import OutputError, UsageError
from mlxkv.launch.programs import PROGRAMS, Call, Target, find_program
from mlxkv.launch.session import environment, run_program, script


def test_variables_are_set_removed_or_left_to_the_user():
    call = Call({"A": "ours"}, {"B": "default", "C": "default"}, removed=("D",))
    around = {"A": "theirs", "B": "theirs", "D": "theirs", "E": "theirs"}
    found = environment(call, around, "127.0.0.1")
    assert found == {"A": "ours", "B": "theirs", "C": "default", "E": "theirs"}


@pytest.mark.parametrize("proxy", ["http_proxy", "HTTPS_PROXY", "ALL_PROXY"])
def test_no_proxy_is_used_for_the_server(proxy):
    around = {proxy: "http://proxy.example", "NO_PROXY": "a.example"}
    found = environment(Call(), around, "127.0.0.1")
    assert found["NO_PROXY"] == "a.example,127.0.0.1"
    assert found["no_proxy"] == "127.0.0.1"


def test_a_program_that_cannot_be_run_is_a_usage_error(tmp_path):
    (tmp_path / "broken").write_bytes(b"\0\0")
    (tmp_path / "broken").chmod(0o755)
    with pytest.raises(UsageError, match="broken cannot be run"):
        run_program(str(tmp_path / "broken"), Call(), (), "127.0.0.1", tmp_path)


def test_a_file_that_cannot_be_written_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="none"):
        run_program(sys.executable, Call(files={"a": ""}), (), "127.0.0.1", tmp_path / "none")


def test_a_script_quotes_what_a_shell_would_read(tmp_path):
    call = Call({"A": "$HOME `x` 'y'"}, arguments=("a b", "$c"))
    assert script("run", call, ("d;e",), tmp_path).splitlines() == [
        """export A='$HOME `x` '"'"'y'"'"''""",
        "run 'a b' '$c' 'd;e'",
    ]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
@pytest.mark.parametrize("model", ["a:1b", "org/name", "./a 'b' \"c\""])
def test_every_call_names_the_model_and_its_context(program, model, tmp_path):
    assert find_program(program.name) is program
    call = program.call(Target("http://127.0.0.1:1", model, "key", 40_000, tmp_path))
    values = [*call.environment.values(), *call.defaults.values(), *call.arguments]
    text = "\n".join([*values, *call.files.values()]).replace("\\", "")
    assert model in text
    if program.name != "cline":  # its settings have no place for it
        assert "40000" in text or "30000" in text
    for name in call.files:
        assert any(str(tmp_path / name) in value for value in values)


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("opencode", '"modalities": {"input": ["text", "image"]'),
        ("continue", '"image_input"'),
        ("pi", '"image"'),
        ("aider", '"supports_vision": true'),
    ],
)
def test_a_program_is_told_whether_the_model_takes_pictures(name, seen, tmp_path):
    def text(sees: bool) -> str:
        target = Target("http://127.0.0.1:1", "a", "key", 40_000, tmp_path, sees)
        call = find_program(name).call(target)
        return "\n".join([*call.environment.values(), *call.files.values()])

    assert seen in text(sees=True) and seen not in text(sees=False)


def test_an_answer_leaves_most_of_a_small_context_to_the_prompt(tmp_path):
    outputs = [Target("", "", "", context, tmp_path).output for context in (16_384, 1 << 20)]
    assert outputs == [4_096, 32_000]
