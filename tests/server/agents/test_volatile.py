"""What changes in the head of an agent's prompt is found, and nothing else is."""

from __future__ import annotations

import time

import pytest

from mlxkv.server.agents.volatile import MAX_PIECES, Piece, cut, cut_reminders

GIT = (
    "gitStatus: As it was at the start.\nCurrent branch: main\n\nStatus:\n M a.py\n\nRecent:\nabc x"
)
ENV = "<env>\nWorking directory: /home/me\nToday's date: 2026-03-01\n</env>"


@pytest.mark.parametrize(
    ("text", "kept", "pieces"),
    [
        (f"Help.\n\n{ENV}\n\nYou are a model.", "Help.\n\nYou are a model.", {"env": ENV}),
        (f"Help.\n\n{GIT}\n", "Help.", {"gitstatus": GIT}),
        (f"Help.\n\n{GIT}\n\n# Rules\nNone.", "Help.\n\n# Rules\nNone.", {"gitstatus": GIT}),
        (
            "Help.\nCurrent date: 2026-03-01\nCurrent working directory: /home/me",
            "Help.",
            {
                "current date": "Current date: 2026-03-01",
                "current working directory": "Current working directory: /home/me",
            },
        ),
        (
            "# Env\n - Primary working directory: /a\n   - Is a git repository: true\n - A: b",
            "# Env\n - A: b",
            {
                "primary working directory": " - Primary working directory: /a",
                "is a git repository": "   - Is a git repository: true",
            },
        ),
        ("Today's date is Monday.\nHelp.", "Help.", {"today's date": "Today's date is Monday."}),
        (
            "CWD: /a\nHelp.\ncwd: /b",
            "Help.",
            {"cwd": "CWD: /a", "cwd#1": "cwd: /b"},
        ),
    ],
)
def test_what_changes_is_cut_out_in_whole_lines(text, kept, pieces):
    assert cut(text) == (kept, [Piece(kind, lines) for kind, lines in pieces.items()])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Help.\n\n",
        "Today is a good day. Mind the working directory.",
        "Never write the current date into a file.",
        "Call `date` for the current date: it is not told.",
        "Put <env> around it, and </env> behind.",
        "The workspace: a folder.",
    ],
)
def test_other_texts_stay_as_they_are(text):
    assert cut(text) == (text, [])


def test_a_text_is_the_same_whatever_changes_in_it():
    one = cut(f"Help.\n\n{ENV}\nMore.\n\n{GIT}")[0]
    other = cut(f"Help.\n\n{ENV.replace('me', 'you')}\nMore.\n\n{GIT} y\n?? b.py")[0]
    assert one == other == cut("Help.\n\n<env></env>\nMore.\n\ngitStatus: clean\n")[0]


def test_of_a_users_message_only_what_the_client_has_put_there_counts():
    date = "Today's date is 2026-03-01."
    text = f"<system-reminder>\n# Date\n{date}\n\nMind it.\n</system-reminder>\n\n{date} Is it?"
    kept, pieces = cut_reminders(text)
    assert kept == f"<system-reminder>\n# Date\n\nMind it.\n</system-reminder>\n\n{date} Is it?"
    assert pieces == [Piece("reminder 1: today's date", date)]
    assert cut_reminders(f"{ENV}\nWhat is it?") == (f"{ENV}\nWhat is it?", [])


def test_a_text_of_many_such_lines_is_none_of_an_agents_head():
    text = "cwd: /a\n" * (MAX_PIECES + 1)
    assert cut(text) == (text, [])
    reminder = f"<system-reminder>\n{text}</system-reminder>"
    assert cut_reminders(reminder) == (reminder, [])


@pytest.mark.parametrize(
    "text",
    ["<env>\n", "<system-reminder>", "gitStatus:\n# x\n", "cwd: /a\n", " \t", "- " * 50 + "\n",
     "the the current\n", "\n"],
)  # fmt: skip
def test_the_time_for_a_text_grows_with_its_length(text):
    """A client's text must not stop the server: no length costs its square."""
    long = text * ((1 << 20) // len(text))
    started = time.process_time()
    cut(long)
    cut_reminders(long)
    assert time.process_time() - started < 5
