"""Pictures, which are drawn here."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from mlxkv.bench.acceptance.limit_checks import within
from mlxkv.bench.acceptance.media import different, needs, shown_again
from mlxkv.bench.acceptance.report import brief, holds, said
from mlxkv.bench.acceptance.subject import Subject, figures, next_turn, parts, user
from mlxkv.llm.plan import plan

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = (512, 384)
SIDE = 96
CIRCLE = ("circle", "red", (32, 144))
SQUARES = tuple(("square", "blue", (x, 144)) for x in (32, 208, 384))
GREEN = ("square", "green", (208, 144))
NUMBER = "42817"
READ_AS = (NUMBER, "42,817", "42 817", "42.817", "4 2 8 1 7")


def drawn(*shapes: tuple[str, str, tuple[int, int]], words: str = "") -> Image:
    """A white picture with shapes (`circle` or `square`, colour, corner) and words."""
    from PIL import Image, ImageDraw, ImageFont

    made = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(made)
    for shape, colour, (x, y) in shapes:
        draw_shape = draw.ellipse if shape == "circle" else draw.rectangle
        draw_shape((x, y, x + SIDE, y + SIDE), fill=colour)
    if words:
        draw.text((64, 280), words, "black", ImageFont.load_default(80))
    return made


def png(picture: Image) -> bytes:
    """A picture as a file."""
    to = io.BytesIO()
    picture.save(to, "PNG")
    return to.getvalue()


def about(question: str, *pictures: Any) -> list[dict[str, Any]]:
    """A question about pictures."""
    return user(parts(*(("image", picture) for picture in pictures), question))


def _answer(subject: Subject, question: str, *pictures: Image) -> str:
    needs(subject, "image")
    made = subject.ask(about(question, *pictures))
    bare = subject.ask(user(question), max_tokens=1).stats
    n = made.stats.image_tokens
    holds(n > 0 and made.stats.prompt_tokens >= bare.prompt_tokens + n, "it is not in the prompt")
    return made.text


def is_seen(subject: Subject) -> str:
    """What the model says next depends on the picture."""
    needs(subject, "image")
    pictures = (drawn(shape, words=subject.mark) for shape in (CIRCLE, GREEN))
    return different(subject, *(about("What is this?", picture) for picture in pictures))


def describes(subject: Subject) -> str:
    """A red circle is described."""
    answer = _answer(subject, "What is in this picture?", drawn(CIRCLE))
    said(answer, ["red"], ["circle", "dot", "disc", "disk", "ball", "round"])
    return brief(answer)


def counts(subject: Subject) -> str:
    """Three squares are counted."""
    question = "How many squares are there? Answer with a number."
    answer = _answer(subject, question, drawn(*SQUARES))
    said(answer, ["3", "three"])
    return brief(answer)


def locates(subject: Subject) -> str:
    """A circle is on the left."""
    question = "Is the circle on the left or on the right? Answer in one word."
    answer = _answer(subject, question, drawn(CIRCLE))
    said(answer, ["left"], never=["right"])
    return brief(answer)


def reads(subject: Subject) -> str:
    """Digits are read."""
    answer = _answer(subject, "What number is written here?", drawn(words=NUMBER))
    said(answer, READ_AS)
    return brief(answer)


def compares(subject: Subject) -> str:
    """Two pictures are told apart."""
    question = "Which picture shows a square, the first or the second? Answer in one word."
    answer = _answer(subject, question, drawn(CIRCLE), drawn(GREEN))
    said(answer, ["second", "2", "2nd"], never=["first"])
    return brief(answer)


def another_question(subject: Subject) -> str:
    """Another question about a picture computes nothing of it, also from a file."""
    needs(subject, "image")
    picture = drawn(CIRCLE, words=f"4 {subject.mark}")
    first, then = about("What is this?", picture), about("Where is it?", png(picture))
    return shown_again(subject, first, then)


def second_picture(subject: Subject) -> str:
    """A second picture in a chat computes only itself and what follows."""
    needs(subject, "image")
    subject.needs_pages()
    first = about("What is this?", drawn(CIRCLE, words=f"1 {subject.mark}"))
    picture = drawn(CIRCLE, words=f"2 {subject.mark}")
    then = next_turn(first, "A circle.", about("And this?", picture)[0]["content"])
    before = subject.llm.budget.rows.n_encoded
    stats = subject.reuses(first, then, max_tokens=1).stats
    n = subject.llm.budget.rows.n_encoded - before
    holds(n == 2, f"the encoder ran {n} times for 2 pictures")
    return figures(stats)


def memory(subject: Subject) -> str:
    """Peak memory with a picture is within the plan for that picture."""
    needs(subject, "image")
    picture, llm = drawn(CIRCLE, words=f"3 {subject.mark}"), subject.llm
    stats = subject.ask(about("What is this?", picture), max_tokens=8).stats
    context = stats.prompt_tokens + 8
    planned = plan(llm.path, context=context, kv_type=llm.kv_type, images=[picture])
    return within(subject, stats, planned)
