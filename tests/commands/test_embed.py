"""`mlxkv embed`, and what `show` says of such a model."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest

import mlxkv
from mlxkv.cli import main
from tests.support.tiny_embedder import write_embedder

pytestmark = pytest.mark.any_device


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_embedder(tmp_path_factory.mktemp("embed") / "tiny"))


def test_vectors_come_as_lines_json_or_a_numpy_file(model, capfdbinary, monkeypatch):
    expected = np.array(mlxkv.load(model).embed(["w7 w8", "w9"], prompt="query", dimensions=8))
    options = ("--prompt", "query", "--dimensions", "8")

    def run(*args: str) -> bytes:
        capfdbinary.readouterr()
        assert main(["embed", model, *args, *options]) == 0
        sys.stdout.flush()
        return capfdbinary.readouterr().out

    lines = run("w7 w8", "w9").splitlines()
    np.testing.assert_allclose([json.loads(line) for line in lines], expected, atol=1e-6)
    # A line feed alone ends a line: U+2028 and the like are blanks of a text.
    monkeypatch.setattr("sys.stdin", io.StringIO("w7\u2028w8\nw9\n"))
    found = json.loads(run("-", "--json"))
    assert found["dimensions"] == 8
    np.testing.assert_allclose(found["embeddings"], expected, atol=1e-6)
    array = np.load(io.BytesIO(run("w7 w8", "w9", "--npy")))
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["w7", "--prompt", "no"], "--prompt must be one of document, query; got 'no'"),
        (["w7", "--dimensions", "0"], "--dimensions must be 1 to 64; got 0"),
        (["w7", "--json", "--npy"], "--json and --npy are two formats: give one"),
        (["w9 " * 2047], "text 1 has 2,049 tokens"),
    ],
)
def test_what_cannot_be_is_one_line(model, capsys, args, message):
    assert main(["embed", model, *args]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mlxkv: ") and message in err and err.count("\n") == 1


def test_show_tells_vectors_and_prompts(model, capsys):
    assert main(["show", model]) == 0
    out = capsys.readouterr().out
    assert "vectors        64 values" in out and "prompts        query, document" in out
    assert "base model" not in out
