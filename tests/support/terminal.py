"""A chat of `mlxkv run` in a pseudo-terminal."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pexpect

from tests.support.command_line import environment

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()=>][A-Z0-9]?|\r")


class Terminal:
    """A chat in a real pseudo-terminal."""

    def __init__(self, home: Path, *args: str, **env: str):
        # The editor writes its prompt anew when it likes, but switches bracketed paste on and off
        # once a line.
        dumb = env.get("TERM") == "dumb"
        self.opened, self.closed = (">>>", "") if dumb else ("\x1b[?2004h", "\x1b[?2004l")
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "mlxkv.cli", "run", *args],
            env=environment(home, PROMPT_TOOLKIT_NO_CPR="1", **env),
            encoding="utf-8",
            codec_errors="replace",
            dimensions=(60, 200),
            timeout=20,
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.child.close(force=True)

    def prompt(self) -> str:
        """Waits until a line can be typed; what was written before."""
        self.child.expect_exact(self.opened)
        text = ESCAPES.sub("", str(self.child.before))
        if self.opened != ">>>":
            self.child.expect_exact(">>>")
        return text

    def say(self, line: str) -> str:
        """Types a line; what is written until the next one can be typed."""
        self.child.sendline(line)
        self.child.expect_exact(self.closed if self.closed else line)
        return self.prompt()

    def press(self, keys: str) -> None:
        self.child.send(keys)

    def end(self) -> tuple[str, int | None]:
        """Waits for the end; what was written, and the exit code."""
        self.child.expect(pexpect.EOF)
        text = ESCAPES.sub("", str(self.child.before))
        self.child.close()
        return text, self.child.exitstatus


def talk_twice(terminal: Terminal, saved: Path) -> None:
    """Two short turns, whose second finds the first again, written to a file."""
    assert "max_tokens = 8" in terminal.say("/set parameter max_tokens 8")
    terminal.say("hello")
    terminal.say("/set verbose")
    second = terminal.say("and again")
    assert "8 tokens" in second
    assert " from RAM, " in second, "the second turn computes only what is new"
    assert f"5 messages in {saved}" in terminal.say(f"/save {saved}")


def stop_an_answer(terminal: Terminal) -> None:
    """Ask for a long answer, and press Ctrl-C while it is decoded."""
    terminal.prompt()
    terminal.child.sendline("tell me everything")
    terminal.child.expect_exact(terminal.closed)
    terminal.child.expect(r"\n(?s:.{20})")  # some of the answer is there
    terminal.press("\x03")
    assert "(stopped)" in terminal.prompt()
