"""Stop texts are found wherever a stream is split, however many and long they are."""

from __future__ import annotations

import random

from mlxkv.text.stop_strings import StopTexts


def reference(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    """What is shown of a stream, and the stop text that ended it, looked for in the whole text."""
    held = ""
    for piece in pieces:
        held += piece
        found = [(held.find(stop), i) for i, stop in enumerate(stops) if stop in held]
        if found:
            at, i = min(found)
            return held[:at], stops[i]
    return held, None


def test_the_first_stop_text_ends_the_stream_wherever_it_is_split():
    pick = random.Random(7)
    n_found = 0
    for _ in range(3000):
        texts = ["".join(pick.choices("abc", k=pick.randint(1, 5))) for _ in range(3)]
        stops = StopTexts(texts)
        pieces = ["".join(pick.choices("abcd", k=pick.randint(0, 4))) for _ in range(8)]
        shown = ""
        for piece in pieces:
            shown += stops.add(piece)
            if stops.stopped:
                break
        shown += stops.finish()
        assert (shown, stops.found) == reference(texts, pieces)
        n_found += stops.stopped
    assert 500 < n_found < 3000


def test_only_what_may_begin_a_stop_text_is_held_back():
    stops = StopTexts(["abcd", "xyz"])
    assert [stops.add(piece) for piece in ("1ab", "c", "2x", "y", "3")] == [
        "1",
        "",
        "abc2",
        "",
        "xy3",
    ]
    assert stops.finish() == ""


def test_a_token_is_compared_with_few_of_many_stop_texts():
    n_compared = 0

    class Text(str):
        def startswith(self, *args):
            nonlocal n_compared
            n_compared += 1
            return super().startswith(*args)

    stops = StopTexts([Text(f"stop {i}") for i in range(2000)])
    for i in range(10):
        assert stops.add("abcdefghi s") == ("sabcdefghi " if i else "abcdefghi ")
    assert 0 < n_compared < 200
    assert stops.add("top 77") == ""
    assert stops.found == "stop 7"
