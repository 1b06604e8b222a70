"""The commands that `kills` ends with SIGKILL, and how it is checked what they leave behind.

Each works on folders of its own and on a tiny random model, in which every fault shows as a
damaged file, an error, or an answer other than that of a cold run.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlxkv.llm.llm import load
from mlxkv.saved_kv.gc import gc
from mlxkv.saved_kv.registry import KVNames
from tests.support.command_line import chat_model, environment
from tests.support.hub_server import Hub, serve

TEXT = "The weir was built in 1874 of granite from the upper quarry, and mended twice. " * 30
QUESTIONS = [f"{TEXT[: 700 + 300 * i]} And then, {i}?" for i in range(4)]
N_ANSWER = 8
FINISH_S = 120.0


class Wrong(Exception):
    """Something was damaged, or an answer was another."""


class Target:
    """A command to be killed.

    Args:
        home: folder of its own.

    Attributes:
        env: of its processes.
    """

    def __init__(self, home: Path):
        self.home = home
        self.model = chat_model(home / "models" / "tiny", max_position_embeddings=8192)
        self.kv = home / "kv"
        self.env = environment(
            home, MLXKV_MODELS=str(home / "models"), MLXKV_KV=str(self.kv), MLXKV_KV_DISK="1GiB"
        )
        os.environ.update({name: self.env[name] for name in ("MLXKV_MODELS", "MLXKV_KV_DISK")})
        self.prepare()

    def prepare(self) -> None:
        """Make what is needed once."""

    def command(self, i: int) -> list[str]:
        """The arguments of the i-th process."""
        raise NotImplementedError

    def start(self, i: int) -> subprocess.Popen[bytes]:
        """The i-th process."""
        return self._process(self.command(i))

    def check(self, i: int) -> None:
        """Look at what the i-th process left; raises Wrong."""
        raise NotImplementedError

    @contextmanager
    def ready(self) -> Iterator[None]:
        """What must be there while the processes run."""
        yield

    def finish(self, i: int) -> None:
        """Let the i-th process end by itself."""
        process = self.start(i)
        if process.wait(FINISH_S) != 0:
            raise Wrong(f"{self.command(i)} does not end well when it is not killed")

    def _process(self, args: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "mlxkv.cli", *args],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def _answers(self, folder: Path, name: str | None = None) -> list[str]:
        """Greedy answers with the KV of a folder, in this process."""
        os.environ["MLXKV_KV"] = str(folder)
        llm = load(self.model)
        try:
            if name is not None:
                return [
                    llm.generate("And then?", kv_from=name, max_tokens=N_ANSWER, temperature=0).text
                ]
            return [
                llm.generate(question, max_tokens=N_ANSWER, temperature=0).text
                for question in QUESTIONS
            ]
        finally:
            llm.close()

    def _whole(self) -> None:
        """Every file of the KV folder is whole, or a leftover that is removed."""
        damaged = gc(self.kv).damaged
        if damaged:
            raise Wrong(f"{damaged} damaged files")


class Serve(Target):
    """A server while it loads, answers, and writes pages."""

    def prepare(self) -> None:
        self.cold = self._answers(self.home / "cold")
        self._port = itertools.count(21_000 + os.getpid() % 20_000)
        self._end = threading.Event()

    def command(self, i: int) -> list[str]:
        return ["serve", "--port", str(next(self._port)), "--model", "tiny"]

    def start(self, i: int) -> subprocess.Popen[bytes]:
        args = self.command(i)
        process = self._process(args)
        threading.Thread(target=self._ask, args=(args[2], process), daemon=True).start()
        return process

    def _ask(self, port: str, process: subprocess.Popen[bytes]) -> None:
        """Ask for answers until the server is gone."""
        url = f"http://127.0.0.1:{port}/v1/completions"
        for n in itertools.count():
            if process.poll() is not None:
                return
            asked = {
                "model": "tiny",
                "prompt": QUESTIONS[n % len(QUESTIONS)],
                "max_tokens": N_ANSWER,
                "temperature": 0,
            }
            request = urllib.request.Request(
                url, json.dumps(asked).encode(), {"content-type": "application/json"}
            )
            with suppress(OSError, ValueError):
                urllib.request.urlopen(request, timeout=30).read()
                continue
            time.sleep(0.02)

    def finish(self, i: int) -> None:
        """The time of start, load and four answers stands for a whole run."""
        process = self.start(i)
        time.sleep(4)
        process.terminate()
        process.wait(FINISH_S)

    def check(self, i: int) -> None:
        self._whole()
        if self._answers(self.kv) != self.cold:
            raise Wrong("an answer other than the cold one")


class Save(Target):
    """`kv save`, under a new name and over a saved one in turn."""

    def prepare(self) -> None:
        (self.home / "text").write_text(TEXT)
        self.finish(0)
        self.cold = self._answers(self.kv, "book0")
        KVNames(self.kv).remove("book0")

    def command(self, i: int) -> list[str]:
        return ["kv", "save", f"book{i // 2}", "-m", "tiny", "--raw", str(self.home / "text")]

    def check(self, i: int) -> None:
        self._whole()
        for saved in KVNames(self.kv).list():
            if self._answers(self.kv, saved.name) != self.cold:
                raise Wrong(f"{saved.name} gives another answer")
        if i % 2:
            shutil.rmtree(self.kv, ignore_errors=True)


class Import(Save):
    """`kv import` of a file, into an empty folder and into one that has its pages in turn."""

    def prepare(self) -> None:
        (self.home / "text").write_text(TEXT)
        process = self._process(["kv", "save", "book", "-m", "tiny", "--raw", f"{self.home}/text"])
        process.wait(FINISH_S)
        self.cold = self._answers(self.kv, "book")
        KVNames(self.kv).export("book", self.home / "book.kv")
        shutil.rmtree(self.kv)

    def command(self, i: int) -> list[str]:
        return ["kv", "import", str(self.home / "book.kv"), "--name", f"copy{i}"]


class Gc(Target):
    """`kv gc` of a folder with leftovers, damage, and pages over the cap."""

    def prepare(self) -> None:
        text = self.home / "text"
        text.write_text(TEXT)
        self._process(["kv", "save", "book", "-m", "tiny", "--raw", str(text), "--pin"]).wait()
        self.cold = self._answers(self.kv, "book")
        self._answers(self.kv)
        shutil.copytree(self.kv, self.home / "full")
        self.env["MLXKV_KV_DISK"] = "2MiB"

    def command(self, i: int) -> list[str]:
        return ["kv", "gc"]

    def start(self, i: int) -> subprocess.Popen[bytes]:
        shutil.rmtree(self.kv, ignore_errors=True)
        shutil.copytree(self.home / "full", self.kv)
        named = {key.file_name for key in KVNames(self.kv).load("book").keys}
        others = [path for path in self.kv.rglob("*.safetensors") if path.name not in named]
        others[i % len(others)].write_bytes(b"no page")
        (self.kv / "tmp" / "1-2-3").write_bytes(bytes(1000))
        return super().start(i)

    def check(self, i: int) -> None:
        names = KVNames(self.kv)
        if names.missing(names.load("book")):
            raise Wrong("pinned pages are gone")
        gc(self.kv)
        self._whole()
        if self._answers(self.kv, "book") != self.cold:
            raise Wrong("an answer other than the cold one")


class Convert(Target):
    """`convert` of a checkpoint into a new directory."""

    def prepare(self) -> None:
        self.out = self.home / "models" / "made"
        self.finish(0)
        self.files = _content(self.out)
        shutil.rmtree(self.out)

    def command(self, i: int) -> list[str]:
        return ["convert", str(self.model), "-o", str(self.out), "--quantize", "affine8"]

    def check(self, i: int) -> None:
        if self.out.exists():
            _same(self.files, self.out)
            shutil.rmtree(self.out)
        elif i % 5 == 0:
            self.finish(i)
            self.check(i)
        others = {path.name for path in self.out.parent.iterdir()} - {"tiny"}
        if any(not name.startswith(".") for name in others):
            raise Wrong(f"half a model under the name {others}")


class Pull(Target):
    """`pull` from a hub on loopback; each one goes on where the one before it was killed."""

    def prepare(self) -> None:
        files = {path.name: path.read_bytes() for path in self.model.iterdir() if path.is_file()}
        self.hub = Hub({"org/tiny": files})

    @contextmanager
    def ready(self) -> Iterator[None]:
        with serve(self.hub):
            self.env["HF_ENDPOINT"] = self.hub.url
            self.cold = self._run("tiny")
            yield

    def command(self, i: int) -> list[str]:
        return ["pull", "org/tiny"]

    def check(self, i: int) -> None:
        """Use what is there, which fetches what is not, and forget it; each third time."""
        if i % 3 == 0:
            if self._run("org/tiny") != self.cold:
                raise Wrong("a model that answers otherwise")
            snapshots = [*(self.home / "hf").rglob("snapshots/*")]
            for name, content in self.hub.repos["org/tiny"].items():
                if name.endswith(".safetensors") and (snapshots[0] / name).read_bytes() != content:
                    raise Wrong(f"{name} is not whole")
            shutil.rmtree(self.home / "hf")

    def _run(self, model: str) -> str:
        """A greedy answer of a model, in a process of its own."""
        args = ["run", model, "hi", "-n", "8", "--temperature", "0"]
        command = [sys.executable, "-m", "mlxkv.cli", *args]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Wrong(done.stderr.strip())
        return done.stdout


def _content(folder: Path) -> dict[str, bytes]:
    """Files by name; without the record of when and how they came."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "mlxkv.json" and ".cache" not in path.parts
    }


def _same(files: dict[str, bytes], folder: Path) -> None:
    found = _content(folder)
    if found != files:
        differ = sorted(k for k in {*found, *files} if found.get(k) != files.get(k))
        raise Wrong(f"{folder.name} is there and not whole: {differ}")


TARGETS = {"serve": Serve, "kv save": Save, "kv import": Import, "kv gc": Gc, "convert": Convert,
           "pull": Pull}  # fmt: skip
