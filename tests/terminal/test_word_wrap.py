"""Word wrap, as a terminal shows it."""

from __future__ import annotations

import fcntl
import os
import random
import re
import select
import struct
import sys
import termios

import pytest
from wcwidth import wcwidth

from mlxkv.generation.outputs import Chunk
from mlxkv.terminal.one_shot import Printer
from mlxkv.terminal.word_wrap import WordWrap, wrap_for

END = "\x04"
"""Behind all that was written."""
ESCAPE = re.compile(r"\x1b\[(\d*)([DK])|.", re.DOTALL)


class Screen:
    """A terminal that wraps at its last column and knows which of its lines it wrapped itself."""

    def __init__(self, width: int):
        self.width, self.rows, self.x = width, [""], 0
        self.hard = [True]  # the row began with a line feed
        self.wraps = WordWrap(lambda: self.width)

    def write(self, text: str) -> None:
        for match in ESCAPE.finditer(self.wraps(text)):
            if match[2] == "D":
                assert self.x - int(match[1]) >= 0
                self.x -= int(match[1])
            elif match[2] == "K":
                self.rows[-1] = self._until(self.x)
            elif match[0] == "\n":
                self._new_row(hard=True)
            else:
                self._put(match[0])

    def _put(self, char: str) -> None:
        n = wcwidth(char)
        if self.x + n > self.width:
            self._new_row(hard=False)
        self.rows[-1] += char
        self.x += n

    def _new_row(self, hard: bool) -> None:
        self.rows.append("")
        self.hard.append(hard)
        self.x = 0

    def _until(self, x: int) -> str:
        kept = ""
        for char in self.rows[-1]:
            x -= wcwidth(char)
            kept += char if x >= 0 else ""
        return kept

    @property
    def lines(self) -> list[str]:
        """The rows, those that the terminal wrapped itself joined."""
        joined: list[str] = []
        for row, hard in zip(self.rows, self.hard, strict=True):
            joined[len(joined) - (not hard) :] = [row] if hard else [joined[-1] + row]
        return joined


def shown(text: str, width: int, rng: random.Random | None = None) -> Screen:
    """The screen on which the text was streamed: at once, or in random pieces."""
    screen, at = Screen(width), 0
    while at < len(text):
        n = rng.randint(1, 7) if rng else len(text)
        screen.write(text[at : at + n])
        at += n
    return screen


def words_of(rng: random.Random) -> list[str]:
    alphabet = "abcdefghijklm" + "\u00e4\u00f6\u00fc" * rng.randint(0, 1)
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 14))) for _ in range(120)]


@pytest.mark.parametrize("seed", range(12))
def test_no_word_is_torn_and_none_is_lost_however_the_text_is_cut(seed):
    rng = random.Random(seed)
    words = words_of(rng)
    text = "".join(word + rng.choice((" ", " ", " ", "\n", "\n\n")) for word in words)
    for width in (16, 17, 29, 80):
        whole = shown(text, width)
        assert [word for row in whole.rows for word in row.split()] == words
        assert all(whole.hard)
        for row, below in zip(whole.rows, whole.rows[1:], strict=False):
            assert len(row) < width
            # A row ends where the text's line does, or where the next word has no room.
            ends = not row or not below or re.search(rf"\b{row.split()[-1]} *\n", text)
            room = width - 1 - len(row) - 1
            assert ends or len(below.split()[0]) > room
        assert shown(text, width, rng).rows == whole.rows


def test_a_word_moves_to_the_next_line_as_soon_as_it_reaches_the_edge():
    screen = Screen(20)
    for piece in ("one two three ", "four", "teen"):
        screen.write(piece)
    assert screen.rows == ["one two three", "fourteen"]
    assert Screen(20).wraps("held back? no") == "held back? no"


def test_code_blocks_and_tables_keep_their_lines():
    code = "def f(): return 'a line of code that is longer than the terminal is wide'"
    table = "| a table | with a row that is longer than the terminal is wide |"
    text = f"Before it:\n```python\n{code}\n{code} ``` \n```\n{table}\nand text behind it again\n"
    for rng in (None, random.Random(1)):
        lines = shown(text, 22, rng).lines
        assert lines[:5] == ["Before it:", "```python", code, f"{code} ``` ", "```"]
        assert lines[5] == table
        assert lines[6:] == ["and text behind it", "again", ""]


def test_a_fence_of_four_is_not_closed_by_three_nor_opened_by_code_in_a_line():
    code = "a line of code that is longer than 22"
    text = f"  ~~~~\n{code}\n~~~\n{code}\n~~~~\n```no fence``` but text of two lines\n"
    lines = shown(text, 22).lines
    assert lines[1:4] == [code, "~~~", code]
    assert lines[5:] == ["```no fence``` but", "text of two lines", ""]


def test_a_word_longer_than_a_line_is_left_to_the_terminal():
    url = "https://example.org/" + "a-long-way/" * 6
    for rng in (None, random.Random(2)):
        screen = shown(f"See {url} for the rest of it.", 24, rng)
        assert url in [line.split(" ")[0] for line in screen.lines]
        assert " ".join(screen.lines).split() == f"See {url} for the rest of it.".split()
        assert all(len(row) <= 24 for row in screen.rows)


def test_lines_end_between_wide_characters_but_not_before_their_punctuation():
    text = "\u6f22\u5b57\u3068\u4eee\u540d\u3067\u66f8\u3044\u305f\u6587\u3002" * 4
    for width in (16, 17, 20, 21):
        screen = shown(text, width)
        assert "".join(screen.rows) == text and all(screen.hard)
        for row, below in zip(screen.rows, screen.rows[1:], strict=False):
            assert sum(map(wcwidth, row)) < width
            assert not below.startswith("\u3002")
        assert shown(text, width, random.Random(width)).rows == screen.rows


def test_items_of_lists_continue_below_their_text():
    rows = shown("- one two three four five six\n1. one two three four five\n", 20).rows
    assert rows == ["- one two three", "  four five six", "1. one two three", "   four five", ""]


def test_another_width_counts_from_the_next_word_on():
    screen = Screen(40)
    screen.write("words for a wide terminal, half a wo")
    screen.width = 60
    screen.write("rd and then more of the words")
    assert screen.rows == ["words for a wide terminal, half a word and then more of the", "words"]
    narrow = WordWrap(iter([60, 60, 20, 20]).__next__)
    assert narrow("words for a wide terminal, half a wo")
    assert "\x1b" not in narrow("rd and")
    assert narrow(" more") == " more"


@pytest.fixture
def terminal(monkeypatch):
    """A pseudo-terminal of 20 columns: its end for a program, and a function that reads ours."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
    with os.fdopen(theirs, "w") as stream:

        def read() -> str:
            """All of it: a read may return what has come so far."""
            stream.write(END)
            stream.flush()
            data = b""
            while not data.endswith(END.encode()):
                assert select.select([ours], [], [], 10)[0], data
                data += os.read(ours, 4096)
            return data.decode().removesuffix(END).replace("\r\n", "\n")

        yield stream, read
    os.close(ours)


def test_answers_and_reasoning_are_wrapped_on_a_terminal(terminal, monkeypatch):
    stream, read = terminal
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    printer = Printer()
    printer(Chunk("", reasoning="a thought of more words"))
    for piece in ("An answer of wor", "dings. "):
        printer(Chunk(piece))
    printer(Chunk("", reasoning="again"))
    printer.end()
    assert read() == (
        "(reasoning)\na thought of more\nwords\n\nAn answer of wor\x1b[4D\x1b[K\nwordings."
        "\n(reasoning)\nagain\n\n"
    )


def test_pipes_and_dumb_terminals_get_the_text_as_it_is(terminal, monkeypatch, tmp_path):
    stream, _ = terminal
    assert wrap_for(stream) is not None
    monkeypatch.setenv("TERM", "dumb")
    assert wrap_for(stream) is None
    monkeypatch.setenv("TERM", "xterm")
    with (tmp_path / "file").open("w") as file:
        assert wrap_for(file) is None
