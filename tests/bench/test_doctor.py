from __future__ import annotations

import platform
from importlib import metadata

import mlx.core as mx
import pytest

from mlxkv.base import time_machine
from mlxkv.bench import doctor


@pytest.fixture
def mac(monkeypatch):
    """Makes this machine pass for a Mac."""

    def become(macos: str = "14.5", machine: str = "arm64") -> None:
        monkeypatch.setattr(doctor.sys, "platform", "darwin")
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), ""))

    return become


@pytest.mark.parametrize("macos", ["14.0", "15.3.1", "26.0"])
def test_macos_14_and_an_arm64_python_are_enough(mac, macos):
    mac(macos)
    assert doctor._system() == doctor.Finding("system", f"macOS {macos} (arm64)")


@pytest.mark.parametrize("macos", ["13.6.9", "10.16"])
def test_an_older_macos_is_broken_and_says_which_is_needed(mac, macos):
    mac(macos)
    found = doctor._system()
    assert found.state == "broken" and found.advice == "update to macOS 14 or newer"
    assert macos in found.value


def test_an_x86_64_python_on_a_mac_is_broken_and_says_what_to_use(mac):
    mac(machine="x86_64")
    found = doctor._system()
    assert found.state == "broken" and "arm64 Python" in found.advice and "Rosetta" in found.advice
    assert "x86_64" in found.value


def test_other_systems_run_on_any_machine(monkeypatch):
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert doctor._system().state == "ok"


REQUIRED = ["mlx>=0.32; sys_platform == 'darwin'", "mlx[cpu]>=0.32; sys_platform == 'linux'",
            "tokenizers<1,>=0.22.1", 'mlx-lm>=0.31; extra == "mlx-lm"']  # fmt: skip


@pytest.mark.parametrize(
    ("name", "installed", "wanted"),
    [("mlx", "0.31.2", "mlx>=0.32"), ("mlx", "0.32.0", ""), ("mlx", "0.33.0.dev20270101", ""),
     ("mlx", "1.0", ""), ("tokenizers", "0.22.0", "tokenizers>=0.22.1"),
     ("tokenizers", "0.22.1", ""), ("mlx-lm", "0.30.9", "mlx-lm>=0.31"), ("gguf", "0.1", "")],
)  # fmt: skip
def test_a_package_below_the_lower_bound_is_too_old(monkeypatch, name, installed, wanted):
    monkeypatch.setattr(metadata, "requires", lambda _: REQUIRED)
    monkeypatch.setattr(metadata, "version", lambda _: installed)
    assert doctor._too_old(name) == wanted


def test_an_mlx_that_is_too_old_is_said_before_it_is_asked_anything(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda _: REQUIRED)
    monkeypatch.setattr(metadata, "version", lambda _: "0.30.0")
    monkeypatch.delattr(mx, "device_info")  # as in 0.30.0
    assert doctor._mlx() == [
        doctor.Finding("device", "MLX 0.30.0", "broken", "pip install --upgrade 'mlx>=0.32'")
    ]
    packages = {found.name: found for found in doctor._packages()}
    assert packages["mlx"].state == "broken" and packages["gguf"].state == "ok"


def test_from_its_sources_no_package_is_too_old(monkeypatch):
    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert doctor._too_old("mlx") == ""


@pytest.mark.parametrize(("excluded", "state"), [(True, "ok"), (False, "advice")])
def test_pages_that_time_machine_backs_up_are_named(mac, monkeypatch, tmp_path, excluded, state):
    mac()
    monkeypatch.setenv("MLXKV_KV", str(tmp_path))
    monkeypatch.setattr(time_machine, "is_excluded", lambda folder: excluded)
    assert doctor._kv_folder() == doctor.Finding("kv", str(tmp_path))  # nothing is kept yet
    (tmp_path / "pages").mkdir()
    found = doctor._kv_folder()
    assert found.state == state and str(tmp_path) in found.value
    assert excluded or found.advice == f"tmutil addexclusion '{tmp_path}/pages'"


def test_it_says_whether_kv_is_encrypted_and_what_is_wrong_with_a_key(monkeypatch):
    for key, value, state in (
        ("", "off (MLXKV_KV_KEY is not set)", "ok"),
        ("1f" * 32, "on, AES-256-GCM, key in MLXKV_KV_KEY", "ok"),
        ("secret", "MLXKV_KV_KEY is set", "broken"),
    ):
        monkeypatch.setenv("MLXKV_KV_KEY", key)
        (found,) = [x for x in doctor.examine() if x.name == "kv encryption"]
        assert (found.value, found.state) == (value, state)
        assert "secret" not in found.advice
