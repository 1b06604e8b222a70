"""`mlxkv verify` passes on what is right, and fails on what is wrong in any one place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import mlxkv
from mlxkv.bench import verify
from mlxkv.cache import KVCache, RotatingKVCache
from mlxkv.errors import UsageError
from mlxkv.kv.layout import Slice
from mlxkv.kv.types import KV_TYPES
from mlxkv.llm.llm import LLM
from mlxkv.prefix.on_disk.disk import PageDisk
from mlxkv.prefix.on_disk.part import Part
from tests.support.command_line import assert_one_line, chat_model, environment
from tests.support.command_line import mlxkv as command

NATIVE = ("native",)
PATHS = [
    "cold",
    "chunks of 77",
    "chunks of 1024",
    "after a rewind",
    "warm, from RAM",
    "back from an answer",
    "after a restart, from SSD",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for family in ("llama", "gemma3"):
        chat_model(path / f"tiny-{family}", family=family, max_position_embeddings=4096)
    return path


@pytest.fixture(params=["llama", "gemma3"])
def llm(request, folder, monkeypatch) -> LLM:
    monkeypatch.setenv("MLXKV_KV_DISK", "1GiB")
    return mlxkv.load(folder / f"tiny-{request.param}")


def failed(llm: LLM) -> set[str]:
    report = verify.verify(llm, 513, NATIVE)
    assert report.passed is not any(row.verdict == "FAILED" for row in report.rows)
    return {row.path for row in report.rows if row.verdict == "FAILED"}


def test_every_path_of_a_right_model_agrees(llm):
    report = verify.verify(llm, 513, NATIVE)
    assert report.passed
    assert [row.path for row in report.rows] == PATHS
    rows = {row.path: row for row in report.rows}
    for path in ("cold", "warm, from RAM", "after a restart, from SSD"):
        assert rows[path].verdict == "exact"
    for row in report.rows:
        assert (row.n_same, row.n_tokens) == (verify.N_ANSWER, verify.N_ANSWER)
    for path in PATHS[3:]:
        assert rows[path].restored == report.n_prompt - 1


def test_every_kv_format_is_held_beside_native_and_then_beside_itself(llm):
    report = verify.verify(llm, 513)
    assert {row.kv_type for row in report.rows} == set(KV_TYPES)
    for kv_type in KV_TYPES[1:]:
        rows = [row for row in report.rows if row.kv_type == kv_type]
        assert [row.path for row in rows] == ["cold, beside native", *PATHS[1:]]
        # What packing costs is for real models to say: these weights are random.
        assert 1e-9 < rows[0].kl_max < 10
        for row in rows[1:]:
            assert row.kl_max < rows[0].kl_max / 3


def test_the_users_own_pages_are_left_alone(llm, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXKV_KV", str(tmp_path / "kv"))
    verify.verify(llm, 513, NATIVE)
    assert not (tmp_path / "kv").exists()
    assert llm.pages is not None
    assert len(llm.pages.ram) == 0


def test_a_cache_that_loads_wrong_rows_fails_where_it_is_loaded(llm, monkeypatch):
    real = KVCache.load

    def load(self, parts, room=0):
        real(self, parts, room)
        self.buffers[0] = mx.roll(self.buffers[0], 1, axis=2)

    monkeypatch.setattr(KVCache, "load", load)
    assert {"warm, from RAM", "after a restart, from SSD"} <= failed(llm) <= set(PATHS[4:])


def test_a_rotating_cache_without_its_first_rows_fails(folder, monkeypatch):
    monkeypatch.setenv("MLXKV_KV_DISK", "1GiB")
    real = RotatingKVCache.load

    def load(self, parts, room=0):
        real(self, parts, room)
        self.buffers[0][:, :, :4] = 0 * self.buffers[0][:, :, :4]

    monkeypatch.setattr(RotatingKVCache, "load", load)
    assert "warm, from RAM" in failed(mlxkv.load(folder / "tiny-gemma3"))


def test_a_rewind_that_keeps_too_much_fails(folder, monkeypatch):
    def rewind(self, offset):
        self.offset = min(self.offset, offset + 1)
        return True

    monkeypatch.setattr(KVCache, "rewind", rewind)
    assert "after a rewind" in failed(mlxkv.load(folder / "tiny-llama"))


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_disk_that_gives_other_bytes_fails(factor, llm, monkeypatch):
    real = PageDisk._decoded

    def decoded(self, key, file):
        tokens, part = real(self, key, file)
        slices = [Slice((x.k * factor, x.v), x.start, x.stop) for x in part.slices()]
        return tokens, Part.of(slices)

    monkeypatch.setattr(PageDisk, "_decoded", decoded)
    assert failed(llm) == {"after a restart, from SSD"}


def test_pages_that_do_not_come_back_fail(llm, monkeypatch):
    monkeypatch.setattr(PageDisk, "read", lambda self, key: None)
    assert "after a restart, from SSD" in failed(llm)


def test_without_the_disk_its_path_is_left_out(llm, monkeypatch):
    monkeypatch.setenv("MLXKV_KV_DISK", "0")
    assert [row.path for row in verify.verify(llm, 513, NATIVE).rows] == PATHS[:-1]


def test_a_prompt_of_less_than_two_pages_proves_nothing(llm):
    for n in (0, 512, 100_000):
        with pytest.raises(UsageError, match="tokens must be 513 to 4,0"):
            verify.verify(llm, n)


def test_the_command_prints_a_table_and_its_exit_code_is_the_verdict(folder, tmp_path):
    env = environment(tmp_path, MLXKV_MODELS=str(folder), MLXKV_KV=str(tmp_path / "kv"))
    done = command("verify", "tiny-gemma3", "--tokens", "513", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all paths agree\n")
    assert done.stdout.count("exact") >= 3
    assert "windows of 32" in done.stdout
    report = json.loads(
        command("verify", "tiny-llama", "--tokens", "513", "--json", env=env).stdout
    )
    assert report["passed"] and [row["path"] for row in report["rows"]][: len(PATHS)] == PATHS
    assert_one_line(
        command("verify", "tiny-llama", "--tokens", "1", env=env), 2, "--tokens must be"
    )
    code = (
        "import sys; import mlx.core as mx; from mlxkv import cache, cli;"
        "real = cache.KVCache.load;\n"
        "def load(self, *args): real(self, *args); self.buffers[0] = self.buffers[0] + 1\n"
        "cache.KVCache.load = load; sys.exit(cli.main(['verify', 'tiny-llama', '--tokens', '513']))"
    )
    broken = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert broken.returncode == 1
    assert "FAILED" in broken.stdout
