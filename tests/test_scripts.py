from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PYTHONS = ("python3.14", "python3.13", "python3.12", "python3.11", "python3", "python")
SCRIPTS = (*(path for path in (ROOT / "scripts").iterdir() if path.is_file()), ROOT / ".ci/run")

FAKE_PYTHON = """#!/bin/sh
# Says of itself what it is told to; notes every other call, and makes environments like itself.
if [ "$1" = -c ]; then
    exec {real} -c 'import platform, sys
sys.platform, sys.version_info = "{system}", {version}
platform.machine = lambda: "{machine}"
platform.mac_ver = lambda: ("{macos}", ("", "", ""), "")
exec(sys.argv[1])' "$2"
fi
echo "$@" >>{calls}
if [ "$2" = venv ]; then
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    printf '#!/bin/sh\\necho "answered: $*"\\n' >"$3/bin/mlxkv"
    chmod +x "$3/bin/mlxkv"
fi
"""


class Checkout:
    """A copy of the scripts on a machine whose only Pythons are made up."""

    def __init__(self, folder: Path):
        self.root = folder / "checkout"
        self.bin = folder / "bin"
        self.calls = folder / "calls"
        self.bin.mkdir(parents=True)
        self.root.mkdir()
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        for name in ("pyproject.toml", "requirements-dev.txt"):
            shutil.copyfile(ROOT / name, self.root / name)
        for name in PYTHONS:
            self.command(name, "#!/bin/sh\nexit 127\n")
        self.command("uname", "#!/bin/sh\necho Darwin\n")

    def command(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def python(self, name: str, *, machine: str = "arm64", macos: str = "14.0",
               version: tuple[int, int] = (3, 12), system: str = "darwin") -> None:  # fmt: skip
        about = {"machine": machine, "macos": macos, "version": version, "system": system}
        self.command(name, FAKE_PYTHON.format(real=sys.executable, calls=self.calls, **about))

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.root)}
        return subprocess.run(
            command, cwd=self.root, env=env, capture_output=True, text=True, check=False
        )

    def mlxkv(self) -> subprocess.CompletedProcess[str]:
        return self.run("sh", "scripts/mlxkv", "run", "Hi")

    def noted(self) -> str:
        return self.calls.read_text() if self.calls.exists() else ""


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


# On a Mac


def test_an_arm64_python_on_macos_14_is_installed_into(checkout):
    checkout.python("python3.12")
    done = checkout.mlxkv()
    assert done.stdout == "answered: run Hi\n", done.stderr
    assert "-m venv" in checkout.noted() and "-m pip install" in checkout.noted()


def test_a_python_under_rosetta_is_refused_in_one_line_before_pip_is_called(checkout):
    checkout.python("python3.12", machine="x86_64")
    done = checkout.mlxkv()
    assert done.returncode == 1 and checkout.noted() == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(
        "python3.12 is an x86_64 program"
    )
    assert "arm64 Python" in done.stderr and "Rosetta" in done.stderr


def test_an_arm64_python_further_along_goes_before_a_newer_one_under_rosetta(checkout):
    checkout.python("python3.13", machine="x86_64")
    checkout.python("python3.11")
    assert checkout.mlxkv().stdout == "answered: run Hi\n"


def test_a_macos_before_14_is_refused_in_one_line_before_pip_is_called(checkout):
    checkout.python("python3.12", macos="13.6.1")
    done = checkout.mlxkv()
    assert done.returncode == 1 and checkout.noted() == ""
    expected = "python3.12 runs on macOS 13.6.1; mlxkv needs macOS 14 or newer\n"
    assert done.stderr == expected


def test_an_environment_of_an_x86_64_python_is_refused_before_pip_is_called(checkout):
    checkout.python("python3.12", machine="x86_64")
    (checkout.root / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(checkout.bin / "python3.12", checkout.root / ".venv" / "bin" / "python")
    done = checkout.mlxkv()
    assert done.returncode == 1 and checkout.noted() == ""
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("; remove that folder\n")


def test_elsewhere_neither_the_machine_nor_the_system_matters(checkout):
    checkout.python("python3.12", machine="x86_64", macos="", system="linux")
    assert checkout.mlxkv().stdout == "answered: run Hi\n"


def test_where_every_python_is_too_old_that_is_said(checkout):
    checkout.python("python3", version=(3, 10))
    done = checkout.mlxkv()
    assert done.returncode == 1
    assert done.stderr == "mlxkv needs Python 3.11 or newer; none is on the PATH\n"


# On Debian


class Debian(Checkout):
    """One without headers of Python; `apt-get` notes what it is told, and fails."""

    def __init__(self, folder: Path, user: int):
        super().__init__(folder)
        self.python("python3.12", system="linux")
        self.command("uname", "#!/bin/sh\necho Linux\n")
        self.command("id", f"#!/bin/sh\necho {user}\n")
        self.command("apt-get", f'#!/bin/sh\necho "$@" >>{folder}/apt\nexit 1\n')
        # Those of this Python's may be there.
        self.apt = folder / "apt"
        fake = (self.bin / "python3.12").read_text()
        hidden = fake.replace(
            "exec(sys.argv[1])", "import os; os.path.exists = lambda _: False\nexec(sys.argv[1])"
        )
        self.command("python3.12", hidden)

    def installed(self) -> str:
        return self.apt.read_text() if self.apt.exists() else ""


def test_root_gets_what_the_kernels_are_built_with_and_runs_without_it(tmp_path):
    debian = Debian(tmp_path, user=0)
    done = debian.mlxkv()
    assert done.returncode == 0 and done.stdout == "answered: run Hi\n", done.stderr
    assert debian.installed().startswith("update")
    assert "mlxkv: installing" in done.stderr and "python3-dev" in done.stderr
    before = debian.installed()
    assert debian.mlxkv().stderr == "" and debian.installed() == before, "once"


def test_nothing_is_installed_for_others_or_where_kernels_are_switched_off(tmp_path):
    debian = Debian(tmp_path, user=1000)
    assert debian.mlxkv().returncode == 0 and debian.installed() == ""
    debian = Debian(tmp_path / "off", user=0)
    off = "MLXKV_KERNELS=0 exec sh scripts/mlxkv run Hi"
    assert debian.run("sh", "-c", off).returncode == 0 and debian.installed() == ""


# What macOS' own shell and tools can do


@pytest.mark.parametrize(("n_commands", "code"), [(2, 0), (1, 1), (3, 1)])
def test_ci_counts_the_readmes_commands_where_wc_pads_its_number(checkout, n_commands, code):
    commands = [f"echo command {i} >>ran" for i in range(n_commands)]
    (checkout.root / "README.md").write_text("\n".join(["# x", "```sh", *commands, "```", ""]))
    for script in (checkout.root / "scripts").iterdir():
        script.write_text(f"#!/bin/sh\necho {script.name} >>ran\n")
        script.chmod(0o755)
    (checkout.root / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", checkout.root / ".ci" / "run")
    wc = shutil.which("wc", path="/usr/bin:/bin")
    checkout.command("wc", f'#!/bin/sh\nprintf "%8d\\n" "$({wc} "$@")"\n')
    checkout.command("uname", "#!/bin/sh\necho Darwin\n")
    done = checkout.run("bash", ".ci/run")
    assert done.returncode == code, done.stderr
    ran = (checkout.root / "ran").read_text() if code == 0 else ""
    if code == 0:
        assert ran.startswith("command 0\ncommand 1\n")
        assert "check" in ran.split()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_use_nothing_that_only_gnu_or_bash_4_has(script):
    text = script.read_text()
    foreign = (
        r"\breadlink -f|\brealpath\b|\bnproc\b|\btimeout \d|\bgrep -\w*P|\bsed -(i|r)\b|\bstat -c|"
        r"\bdate -d|\bxargs -\w*r|\bcp --|\bmktemp --|\bmapfile\b|\breadarray\b|declare -A|"
        r"\$\{\w+(,,|\^\^|@)|&>>|\|&|\bcoproc\b|\bsort -V|\bhead -n -|\bln --|\bmktemp -p"
    )
    assert re.findall(foreign, text) == []
    shell = "bash" if text.startswith("#!/usr/bin/env bash") else "sh"
    assert subprocess.run([shell, "-n", str(script)], check=False, env=os.environ).returncode == 0
    assert shell == "bash" or not re.search(r"\[\[|<<<|\bfunction \w|\blocal\b", text)
